"""Runs that end, or go on, after a failure: a loss that is not finite, a lost worker, a full disk, or the user's interrupt."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import ray

from rayllp.cluster.joining import PATIENT
from rayllp.errors import ClusterError, NonFiniteError
from rayllp.report import RunDirectory
from rayllp.training.driver import Driver
from tests.conftest import tiny, train_by
from tests.test_train import living_actors, placement_groups, read, wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Sabotaged(Driver):
    """A driver that harms its workers before step 3."""

    def act(self):
        raise NotImplementedError

    def _next_chunk(self, step):
        if step == 3:
            self.act()
        return super()._next_chunk(step)[:1]


def drive(kind, config, path):
    return train_by(kind, config, RunDirectory.create(path, config))[0]


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_layer(tmp_path):
    class Poisoned(Sabotaged):
        def act(self):
            def poison(worker):
                weight = worker.engine.block.parameters.get("transformer.h.7.ln_2.weight")
                if weight is not None:  # another worker has this layer
                    weight.data.fill_(float("inf"))

            ray.get([worker.__ray_call__.remote(poison) for worker in self.workers.workers])

    with pytest.raises(NonFiniteError, match=r"step 3: .*layer 7: its output is not finite.*step_3"):
        drive(Poisoned, tiny(workers=2, steps=6, max_failures=0), tmp_path / "run")
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 3
    assert [e["kind"] for e in read(tmp_path / "run" / "events.jsonl")] == ["checkpoint", "fault"]
    assert (tmp_path / "run" / "checkpoints" / "step_3" / "manifest.json").exists()
    assert not placement_groups()


def test_a_lost_worker_ends_the_run_at_once_and_leaves_nothing(tmp_path):
    class Murdered(Sabotaged):
        def act(self):
            ray.kill(self.workers.workers[1], no_restart=True)
            self.since = time.monotonic()

    started = time.monotonic()
    with pytest.raises(ClusterError, match="worker 1 was lost"):
        drive(Murdered, tiny(workers=2, steps=6, max_failures=0), tmp_path / "run")
    assert time.monotonic() - started < 60
    assert not placement_groups()
    wait_until(lambda: not living_actors())


def test_a_closed_terminal_leaves_a_checkpoint_and_no_process(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rayllp", "train"]
    settings = ["--set", "steps=100000", "--set", "eval.every=0", "--set", "workers=1", "--set", "spare_workers=false"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", *PATIENT)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--output", str(run), *settings], stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        metrics = run / "metrics.jsonl"
        wait_until(lambda: process.poll() is not None or (metrics.exists() and len(read(metrics)) > 3), 120)
        assert process.poll() is None, (tmp_path / "log").read_text()
        others = psutil.Process(process.pid).children(recursive=True)
        (worker,) = (other for other in others if "ray::BlockWorker" in " ".join(other.cmdline()))
        assert worker.nice() == psutil.Process(process.pid).nice()
        (parent,) = (other for other in others if other.name() == "raylet")  # the worker's own is overwritten by its title
        assert parent.environ()["OMP_WAIT_POLICY"] == "PASSIVE"

        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(60) == 128 + signal.SIGHUP, (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{len(read(metrics))}"
    assert (checkpoint / "manifest.json").exists()
    assert [event["kind"] for event in read(run / "events.jsonl")].count("fault") == 0
    assert f"rayllp train --resume {run}" in (tmp_path / "log").read_text()
    assert not psutil.wait_procs(others, timeout=10)[1]


def test_training_goes_on_where_nothing_can_be_written(tmp_path):
    class Walled(Sabotaged):
        def act(self):
            self.run.path.rename(tmp_path / "aside")
            self.run.path.write_text("in the way")

        def _next_chunk(self, step):
            if step == 5:
                self.run.path.unlink()
                (tmp_path / "aside").rename(self.run.path)
            return super()._next_chunk(step)

    result = drive(Walled, tiny(workers=2, steps=7, checkpoint={"every": 4}), tmp_path / "run")
    assert result.steps == 7
    assert [m["step"] for m in read(result.directory / "metrics.jsonl")] == list(range(7))
    events = read(result.directory / "events.jsonl")
    assert [e["step"] for e in events if e["kind"] == "fault" and "checkpoint not written" in e["reason"]] == [4, 5]
    # Tried again as soon as another chunk was done.
    assert [e["step"] for e in events if e["kind"] == "checkpoint"] == [6, 7]
    assert not placement_groups()
    wait_until(lambda: not living_actors())
