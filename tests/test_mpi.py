"""States sent by MPI: training is as exact as over other channels, on Ray too, and all ranks notice when one is lost."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rayllp.channel import MessageTag, StateSpec
from rayllp.channel.pmi import Lifeline, ProcessManager
from rayllp.cluster.mpi_group import MPIProcess, check_size, sized
from rayllp.errors import ChannelError, ClusterError, DataError, RayllpError, SettingsError
from tests.conftest import losses_over_threads, make_engine, merge, run_mpi_processes, run_processes, tiny, train_engine
from tests.test_recovery import drive, read, undisturbed, weights

TAG = MessageTag(3, "forward", "relaxation")


def losses_over_mpi(world, *configs):
    """Return this process's losses of three steps."""
    return [[stats.loss for stats in train_engine(make_engine(config, world.channel(0, 60.0)), 3)] for config in configs]


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_a_step_over_mpi_is_the_step_over_threads(workers):
    exact = tiny(mgrit={"levels": {"forward": 1, "backward": 1}}, workers=workers)
    cycled = tiny(buffers={"open": 0, "close": 0}, mgrit={"coarsening": 3}, adaptive={"probe_every": 2}, workers=workers)
    wanted = losses_over_threads(tiny(mgrit={"levels": {"forward": 1, "backward": 1}}), 3)
    by_threads = losses_over_threads(cycled, 3)
    for serial, parallel in run_mpi_processes(workers, losses_over_mpi, exact, cycled):
        assert serial == pytest.approx(wanted, abs=1e-10)
        assert parallel == by_threads  # to the bit


def large(channel):
    """Send messages of 16 MiB both ways at once, each before anything is received, while the sender does something else."""
    other, count = 1 - channel.rank, 4 * 1024**2
    channel.send(torch.full((count,), float(channel.rank)), other, TAG)
    time.sleep(0.3)
    found = channel.receive(StateSpec.of(torch.zeros(count)), other, TAG)
    channel.finish()
    halves = channel.all_reduce(torch.full((3,), 1.5, dtype=torch.bfloat16), TAG)
    return float(found.sum()) / count, halves.dtype, halves.tolist()


def _large(world):
    return large(world.channel(0, 30.0))


def test_large_messages_and_reduced_precision():
    assert run_mpi_processes(2, _large) == [(1.0, torch.bfloat16, [3.0] * 3), (0.0, torch.bfloat16, [3.0] * 3)]


def _one_goes(world):
    channel = world.channel(0, 60.0)
    if channel.rank == 1:
        time.sleep(0.5)  # the others are out of the call that made their channel
        world.disconnect()
        return None, 0.0
    started = time.monotonic()
    with pytest.raises(ChannelError) as caught:
        channel.receive(StateSpec.of(torch.zeros(2)), 1, TAG)
    return str(caught.value), time.monotonic() - started


def test_who_waits_for_a_worker_that_is_gone_is_told_at_once():
    for message, waited in run_mpi_processes(3, _one_goes)[::2]:
        assert "received nothing from worker 1: the connection was lost (a worker is gone)" in message
        assert waited < 10


# The process manager ----------------------------------------------------------------------------------------------------------------


def say(meeting, *lines):
    """Send these lines to the process manager; return its answer to each, None where it hangs up."""
    with socket.create_connection((meeting.host, meeting.port), timeout=5) as connection, connection.makefile("rw") as file:
        answers = []
        for line in lines:
            file.write(line + "\n")
            file.flush()
            answers.append(file.readline().strip() or None)
        return answers


def test_the_manager_lets_in_who_has_a_key_and_stops_listening_when_all_are_there():
    manager = ProcessManager("127.0.0.1", ["a", "a", "b"])
    meeting = manager.rendezvous
    assert len({*meeting.keys}) == 3
    wrong = next(key for key in range(10) if key not in meeting.keys)
    assert say(meeting, f"cmd=initack pmiid={wrong}") == [None]
    assert say(meeting, "cmd=get kvsname=x key=PMI_process_mapping") == [None]  # no key was shown
    assert say(meeting, "nonsense") == [None]

    def enter(rank):
        connection = socket.create_connection((meeting.host, meeting.port), timeout=5)
        connection.sendall(f"cmd=initack pmiid={meeting.keys[rank]}\n".encode())
        file = connection.makefile("rw")
        assert [file.readline().strip() for _ in range(4)] == [
            "cmd=initack rc=0",
            "cmd=set size=3",
            f"cmd=set rank={rank}",
            "cmd=set debug=0",
        ]
        return connection, file

    members, lines = zip(*(enter(rank) for rank in range(3)), strict=True)
    assert say(meeting, f"cmd=initack pmiid={meeting.keys[0]}") == [None]  # that rank is there
    lines[0].write("cmd=get kvsname=x key=PMI_process_mapping\n")
    lines[0].flush()
    assert lines[0].readline() == "cmd=get_result rc=0 msg=success value=(vector,(0,1,2),(1,1,1))\n"
    lifelines = [Lifeline(meeting, rank, 5.0) for rank in range(3)]
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:  # the last lifeline may not have been heard yet
        try:
            socket.create_connection((meeting.host, meeting.port), timeout=5).close()
        except ConnectionRefusedError:
            break
        except ConnectionError:  # the listener was closed before this one was accepted
            continue
        time.sleep(0.01)
    else:
        pytest.fail("the manager still listens")
    assert all(lifeline.is_intact() for lifeline in lifelines)
    members[1].shutdown(socket.SHUT_RDWR)  # as if its process had died
    while time.monotonic() < deadline and any(lifeline.is_intact() for lifeline in lifelines):
        time.sleep(0.01)
    assert not any(lifeline.is_intact() for lifeline in lifelines)
    manager.close()


# On Ray ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_over_mpi_is_that_over_gloo_though_a_rank_is_killed(tmp_path):
    settings = {"workers": 3, "steps": 10, "dtype": "float32", "snapshot_every": 1, "adaptive": {"probe_every": 4}}
    whole = run_processes(3, undisturbed, tiny(**settings))
    run, _ = drive(tiny(**merge(settings, {"channel": "mpi"})), tmp_path / "mpi", [(1, 6, "forward")])
    events = read(run.directory / "events.jsonl")
    assert [e["ranks"] for e in events if e["kind"] == "fault"] == [[1]]
    assert [e["source"] for e in events if e["kind"] == "restore"] == ["memory"]
    assert not [e for e in events if e["kind"] == "resize"]
    assert [(m["loss"], m["rho_forward"]) for m in read(run.directory / "metrics.jsonl")] == whole[0][0]
    expected = {name: value for _, parameters in whole for name, value in parameters.items()}
    found = {name.partition("/weight/")[2]: value for name, value in weights(run.directory).items() if "/weight/" in name}
    assert all(torch.equal(found[name], torch.from_numpy(expected[name])) for name in found)


# By MPI's own launcher --------------------------------------------------------------------------------------------------------------


def mpiexec(count, *arguments):
    """Run `rayllp train` in this many processes; return the exit code and all output."""
    command = [
        str(Path(sys.executable).with_name("mpiexec")),
        "-n",
        str(count),
        sys.executable,
        "-m",
        "rayllp",
        "train",
        "--launcher",
        "mpi",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_processes_of_mpis_launcher_train_without_ray(tmp_path):
    config = tiny(steps=6, checkpoint={"every": 4}).model_dump(mode="json", exclude_unset=True) | {"workers": None}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    code, said = mpiexec(2, str(file), "--output", str(tmp_path / "run"))
    assert code == 0, said
    assert "after 6 steps (exact forward)" in said
    found = [m["loss"] for m in read(tmp_path / "run" / "metrics.jsonl")]
    assert found == losses_over_threads(tiny(steps=6, workers=2), 6)


class Answering:
    """Takes the place of a process's worker."""

    def __init__(self, rank):
        self.rank = rank

    def add(self, number):
        return self.rank + number

    def fail(self, rank, *, is_picklable=True):
        if self.rank == rank:
            raise DataError("no such file") if is_picklable else type("Local", (Exception,), {})("lost")
        return None

    def fail_unpicklably(self, rank):
        return self.fail(rank, is_picklable=False)


def _calls(world):
    process = MPIProcess()
    process.worker = Answering(process.rank)
    if process.rank > 0:
        process.serve()
        return None
    found = [process.call("add", 5)]
    for method, rank in (("fail", 1), ("fail_unpicklably", 1), ("fail", 0)):
        with pytest.raises(RayllpError) as caught:
            process.call(method, rank)
        found.append((type(caught.value), str(caught.value)))
    found.append(process.call("add", 6))  # after failures it goes on
    process.stop()
    return found


def test_rank_0_calls_all_processes_and_gets_their_answers_or_the_first_failure():
    found = run_mpi_processes(2, _calls)
    failures = [(DataError, "no such file"), (ClusterError, "worker 1 failed: Local: lost"), (DataError, "no such file")]
    assert found == [[[5, 6], *failures, [6, 7]], None]


def test_the_settings_must_fit_the_processes():
    assert sized(None, 3).world == 3
    with pytest.raises(SettingsError, match="2 processes were launched for workers=3: make them equal, or leave workers out"):
        check_size(tiny(workers=3), 2)
    with pytest.raises(SettingsError, match="set workers to a number"):
        check_size(tiny(workers={"min": 1, "max": 2}), 2)
