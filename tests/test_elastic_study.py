"""Long runs, started by hand: `make test ARGS="-m study"`. Faults, sessions on different numbers of workers, kills during writes."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch

import rayllp
from rayllp.checkpoint import checkpoints, read_manifest, step_of
from rayllp.report import RunDirectory
from rayllp.training.driver import Driver
from tests.conftest import tiny, train_by
from tests.test_recovery import drive, weights
from tests.test_train import read

pytestmark = pytest.mark.study


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("mode", ["serial", "parallel"])
def test_300_steps_with_three_kills_and_a_hang_end_bit_equal(mode, tmp_path):
    limits = {"receive_timeout_s": 20, "hang_timeout_s": 20}
    config = tiny(
        workers=3, steps=300, dtype="float32", mode=mode, snapshot_every=1, adaptive={"probe_every": 25}, model={"dropout": 0.1}, **limits
    )
    whole, _ = drive(config, tmp_path / "whole")
    generator = random.Random(mode)
    steps = sorted(generator.sample(range(5, 295), 4))
    phases = generator.sample(["forward", "adjoint", "optimizer", "hang"], 4)
    faults = [(generator.randrange(3), step, phase) for step, phase in zip(steps, phases, strict=True)]
    broken, _ = drive(config, tmp_path / "broken", faults)
    restores = [e for e in read(broken.directory / "events.jsonl") if e["kind"] == "restore"]
    print(mode, faults, [(e["source"], e["steps_lost"], e["seconds"]) for e in restores])
    assert [e["source"] for e in restores] == ["memory"] * 4
    assert [m["loss"] for m in read(broken.directory / "metrics.jsonl")] == [m["loss"] for m in read(whole.directory / "metrics.jsonl")]
    first, second = weights(whole.directory), weights(broken.directory)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Halting(Driver):
    """Stops after `until` steps, as Ctrl-C would."""

    until = 0

    def _between_chunks(self, step):
        super()._between_chunks(step)
        self.ends = step >= self.until

    def _next_chunk(self, step):
        return super()._next_chunk(step)[: max(1, self.until - step)]


SETTINGS = {"steps": 100, "model": {"layers": 14, "dropout": 0.1}, "mgrit": {"coarsening": 2}, "snapshot_every": 0, "spare_workers": False}
SITTINGS = [{"workers": 4}, {"workers": 3}, {"workers": 1}, {"workers": 5}, {"workers": 4, "mesh": {"data": 2, "layer": 2}}]


def sit(mode, path):
    """Run one session of a run in a process of its own, with a cluster of its own."""
    ray.init(address="local", num_cpus=5, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    settings = {**SETTINGS, "mode": mode}
    rayllp.train(tiny(**settings, **SITTINGS[0]), output=path / "whole")
    run = RunDirectory.create(path / "run", tiny(**settings, **SITTINGS[0]))
    for number, sitting in enumerate(SITTINGS, 1):
        config = tiny(**settings, **sitting)
        train_by(Halting, config, run, resume_from=checkpoints(run.checkpoints), until=20 * number)
    ray.shutdown()


@pytest.mark.parametrize("mode", ["serial", "parallel"])
def test_sittings_on_4_3_1_5_and_2_by_2_workers(mode, tmp_path):
    """Each session goes on from the checkpoint of the one before; the losses are those of a single session."""
    process = multiprocessing.get_context("spawn").Process(target=sit, args=(mode, tmp_path))
    process.start()
    process.join(600)
    assert process.exitcode == 0
    metrics, alone = read(tmp_path / "run" / "metrics.jsonl"), read(tmp_path / "whole" / "metrics.jsonl")
    assert [m["workers"] for m in metrics] == [n for n in (4, 3, 1, 5, 4) for _ in range(20)]
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(metrics, alone, strict=True))
    print(mode, f"largest difference of a step's loss {gap:.1e}")
    assert gap < 1e-5


KILLS = 20


def test_killing_everything_during_a_write_leaves_a_complete_checkpoint(tmp_path):
    """The driver, its cluster and all workers get SIGKILL while a checkpoint is written; the next session goes on from the newest one."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "rayllp", "train", "--output", str(run)]
    for setting in ("steps=100000", "eval.every=0", "checkpoint.every=2", "checkpoint.keep=3", "model.width=256", "spare_workers=false"):
        command += ["--set", setting]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    generator, partial, resumed = random.Random(0), 0, []
    for kill in range(KILLS):
        known = [step_of(path) for path in checkpoints(run / "checkpoints")]
        events = len(read(run / "events.jsonl")) if kill else 0
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            # At some time within the writing of a checkpoint that this sitting made, or shortly after.
            wanted = generator.randrange(1, 4)
            _wait(process, lambda n=wanted, k=known: sum(step_of(p) not in k for p in checkpoints(run / "checkpoints")) >= n, log)
            _wait(process, lambda: any((run / "checkpoints").glob(".step_*.partial")), log)
            time.sleep(generator.uniform(0, 0.4))
        finally:
            _kill_all(process)
        left = list((run / "checkpoints").glob(".step_*.partial"))
        partial += bool(left)
        found = checkpoints(run / "checkpoints")
        assert read_manifest(found[-1])["step"] == step_of(found[-1])
        if kill:
            restore = next(e for e in read(run / "events.jsonl")[events:] if e["kind"] == "restore")
            resumed.append(step_of(Path(restore["path"])))
            assert resumed[-1] == known[-1]
            assert not [e for e in read(run / "events.jsonl")[events:] if e["kind"] == "fault"]
    print(f"{KILLS} kills, {partial} with a half-written checkpoint; went on from steps {resumed}")
    assert partial >= KILLS // 2
    steps = [m["step"] for m in read_whole_lines(run / "metrics.jsonl")]
    assert steps == list(range(len(steps)))


def test_a_machine_that_was_suspended_goes_on(tmp_path):
    """Driver, cluster and workers are stopped for a minute, as on a laptop that is closed: there is no fault, and no step is lost."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "rayllp", "train", "--output", str(run), "--set", "steps=1000000", "--set", "eval.every=0"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        _wait(process, lambda: len(_metrics(run)) > 20, log)
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in everyone:
            one.send_signal(signal.SIGSTOP)
        time.sleep(60)
        done = len(_metrics(run))
        for one in reversed(everyone):
            one.send_signal(signal.SIGCONT)
        _wait(process, lambda: len(_metrics(run)) > done + 50, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 128 + signal.SIGTERM
    finally:
        if process.poll() is None:
            _kill_all(process)
    assert not [event for event in read(run / "events.jsonl") if event["kind"] == "fault"]
    steps = [metric["step"] for metric in read(run / "metrics.jsonl")]
    assert steps == list(range(len(steps)))


def _metrics(run):
    return read_whole_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []


def read_whole_lines(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _wait(process, condition, log, limit_s=180):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def _kill_all(process):
    victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGSTOP)  # nobody tidies up after another
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait(30)
    psutil.wait_procs(victims[1:], timeout=30)
