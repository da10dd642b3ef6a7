"""`rayllp chaos`: when it kills which worker, and a real run whose workers it kills."""

import itertools
import statistics
import threading
import time

import pytest
import ray

from rayllp.cluster import chaos
from rayllp.cluster.actor_names import NAMESPACE, group_name, is_group, number_of, run_name, worker_name
from rayllp.cluster.chaos import (
    RayTarget,
    TrainingWatch,
    Worker,
    choose_victim,
    inject_failures,
    kill_as_planned,
    planned_kills,
)
from rayllp.errors import ClusterError, SettingsError
from rayllp.quantities import DURATIONS, quantity
from rayllp.report import RunDirectory
from rayllp.training.driver import Driver
from tests.conftest import tiny, train_by
from tests.test_train import read, wait_until

# When and whom -----------------------------------------------------------------------------------------------------------------


DURATION_TEXTS = {"20s": 20, "15m": 900, "1h": 3600, "0.5s": 0.5, " 1.5h ": 5400, "20 s": 20, "1e3s": 1000}


@pytest.mark.parametrize("text", DURATION_TEXTS)
def test_durations(text):
    assert quantity(text, "--mtbf", DURATIONS) == DURATION_TEXTS[text]


@pytest.mark.parametrize("text", ["20", "s", "0s", "-3s", "1d", "1h30m", "nans", "9" * 400 + "h", "²s", ""])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(SettingsError, match=r"^--for .*: write a number above 0 and a unit \(s, m, h\), such as 20s$"):
        quantity(text, "--for", DURATIONS)


def test_strikes_are_as_faults_are_and_as_the_seed_says():
    first, again, other = (list(itertools.islice(planned_kills(20.0, seed), 4000)) for seed in (1, 1, 2))
    assert first == again != other
    waits = [after_s for after_s, _ in first]
    assert statistics.mean(waits) == pytest.approx(20, rel=0.05)
    assert statistics.stdev(waits) == pytest.approx(20, rel=0.1)  # exponential: as wide as its mean
    living = [Worker(rank, f"run/worker_{rank}") for rank in (2, 0, 1)]
    struck = [choose_victim(living, pick).number for _, pick in first]
    assert struck == [choose_victim(living[::-1], pick).number for _, pick in first]
    assert all(struck.count(rank) == pytest.approx(4000 / 3, rel=0.1) for rank in range(3))


def test_names_are_one_runs_alone(tmp_path, monkeypatch):
    run = run_name(tmp_path / "my run")
    assert number_of(worker_name(run, 12), run) == 12
    assert worker_name(run, 12) != worker_name(run, 12)
    assert is_group(group_name(run), run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("my run")
    assert run_name(tmp_path / "link") == run
    for other in ("my run2", "my_run", "my%20run", "run", "my run/worker_3.0123abcd"):
        name = run_name(tmp_path / other)
        assert number_of(worker_name(name, 0), run) is None
        assert not is_group(group_name(name), run)


class Fake:
    """A made-up run with three workers, one of which dies by other hands first; the run ends after it was looked at this many times."""

    def __init__(self, looks=1000):
        self.looks, self.workers = looks, [Worker(rank, f"run/worker_{rank}.0") for rank in range(3)]
        self.gaps = 2

    def alive(self):
        self.looks -= 1
        return self.looks >= 0

    def living(self):
        self.gaps -= 1
        return [] if self.gaps >= 0 else self.workers

    def kill(self, worker):
        return worker.number != 0


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(chaos.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(chaos.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + max(seconds, 1e-3)))
    return now


def test_strikes_until_the_time_is_over(clock):
    struck, waiting = [], iter([False] * 10)
    plan = iter([(2.0, 0.99), (3.0, 0.0), (100.0, 0.5)])
    # The second falls on worker 0, which is always dead already: it is tried again, and time goes by.
    ending = kill_as_planned(Fake(), plan, 7.0, lambda: next(waiting, True), lambda worker: struck.append((clock[0], worker.number)))
    assert ending == "the time is up"
    # 5 s until a step is done, the first kill 2 s later; nobody is there for two looks of half a second.
    assert struck == [(pytest.approx(8.0, abs=0.01), 2)]
    assert clock[0] == pytest.approx(12.0, abs=0.5)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("trains", [True, False])
def test_strikes_end_with_the_run(trains):
    assert kill_as_planned(Fake(looks=5), planned_kills(1e6, 0), None, lambda: trains, print) == "the run has ended"


def test_a_run_trains_when_its_metrics_grow(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("1\n2\n3\n")
    watch = TrainingWatch(tmp_path)
    assert not watch.has_trained()
    path.write_text("1\n")  # gone back to a checkpoint: the two will be repeated
    assert not watch.has_trained()
    path.write_text("1\n2\n")
    assert watch.has_trained()
    assert not TrainingWatch(tmp_path / "none").has_trained()


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"not a run directory \(no config.yaml\): give the directory"):
        inject_failures(tmp_path, 1.0)


# A real run --------------------------------------------------------------------------------------------------------------------


STEPS = 40


class Patient(Driver):
    """Trains slowly until the kills are over, so that the first one comes before the run's end on any machine."""

    def _next_chunk(self, step):
        chunk = super()._next_chunk(step)
        if self.chaos_is_over.is_set():
            return chunk
        time.sleep(0.1)
        return chunk[:1]


def train(run, config, over, outcome):
    try:
        outcome.append(train_by(Patient, config, run, chaos_is_over=over)[0])
    except Exception as error:
        outcome.append(error)


class Bystander:
    def ping(self):
        return True


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.study
def test_a_run_survives_chaos_and_others_do_not_see_it(tmp_path):
    config = tiny(workers=2, steps=STEPS, dtype="float32", snapshot_every=1, spare_workers=False)
    run = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(ClusterError, match=r"no worker of .*run is alive .* resume it with rayllp train --resume"):
        inject_failures(run.path, 1.0)
    # Of another run, whose name begins as this one's does; and one that has this run's name elsewhere.
    other = worker_name(run_name(tmp_path / "run2"), 0)
    places = {NAMESPACE: other, "elsewhere": worker_name(run_name(run.path), 0)}
    bystanders = [ray.remote(Bystander).options(name=name, namespace=namespace, num_cpus=0).remote() for namespace, name in places.items()]
    over, outcome, said = threading.Event(), [], []
    thread = threading.Thread(target=train, args=(run, config, over, outcome), daemon=True)
    thread.start()
    try:
        first_s, second_s = (after_s for after_s, _ in itertools.islice(planned_kills(2.0, 7), 2))
        limit_s = first_s + second_s / 2
        wait_until(lambda: (run.path / "metrics.jsonl").exists() or outcome, 60)
        assert not outcome
        killed = inject_failures(run.path, 2.0, 7, limit_s, said.append)
    finally:
        over.set()
    thread.join(60)
    assert not thread.is_alive(), said
    (result,) = outcome
    assert not isinstance(result, Exception), (said, result)
    assert result.steps == STEPS
    assert ray.get([bystander.ping.remote() for bystander in bystanders], timeout=10) == [True, True]
    assert killed == 1
    struck = read(run.path / "chaos.jsonl")
    assert len(struck) == killed
    assert all(line["kind"] == "chaos" and line["number"] in (0, 1) and line["time"] for line in struck)
    assert sum(line.endswith(f"killed worker {struck[0]['number']}") for line in said) >= 1
    assert "1 worker killed" in said[-1]
    events = read(run.path / "events.jsonl")
    faults, restores = ([event for event in events if event["kind"] == kind] for kind in ("fault", "restore"))
    assert struck[0]["number"] in faults[0]["ranks"]
    assert restores
    assert restores[0]["source"] in ("memory", "the start")
    assert [metric["step"] for metric in read(run.path / "metrics.jsonl")] == list(range(STEPS))
    assert not RayTarget(run_name(run.path)).alive()
