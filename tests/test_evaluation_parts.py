"""Evaluations in parts give the same figures, and a run can be stopped between two parts; checkpoints by time. Without Ray."""

import io
import time

import pytest
from rich.console import Console

from rayllp.channel import run_workers
from rayllp.cluster.worker import BlockWorker
from rayllp.errors import CheckpointError
from rayllp.report import Journal, RunDirectory, read_lines
from rayllp.training.checkpointing import Checkpointer
from rayllp.training.evaluation import Evaluator
from rayllp.training.inputs import Network, TrainingInputs
from rayllp.training.worker_group import WorkerGroup
from tests.conftest import make_engine, tiny


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_of_an_evaluation_make_the_same_figures(workers):
    def work(channel):
        engine = make_engine(tiny(workers=workers), channel)
        whole, parts = engine.evaluate(5), engine.evaluation(5)
        while (found := parts.advance(2)) is None:
            assert parts.done < parts.size
        return whole == found, parts.done == parts.size > 4

    assert run_workers(workers, work) == [(True, True)] * workers


class Here(WorkerGroup):
    """A group of one worker, in this process."""

    device = "cpu"

    def __init__(self, config):
        self.config, self.calls = config, []
        self.worker = BlockWorker(0, config, 1)
        self.worker.engine = make_engine(config)

    def call(self, method, *arguments, timeout_s=None):
        self.calls.append((method, *arguments))
        return [getattr(self.worker, method)(*arguments)]

    is_started = False

    def start(self, config, network, batches):
        raise NotImplementedError

    def rebuild(self, config, network):
        raise NotImplementedError

    def shutdown(self):
        """Do nothing."""


def evaluate(tmp_path, stop_after):
    config = tiny(eval={"batches": 40}, checkpoint={"best": True})
    run, workers = RunDirectory.create(tmp_path / "run", config), Here(config)
    inputs = TrainingInputs(Network(None), workers.worker.engine.batches)
    with Journal.open(run, config.steps, 0, Console(file=io.StringIO())) as journal:
        checkpointer = Checkpointer(run, workers, journal, config)
        evaluator = Evaluator(run, workers, checkpointer, journal, config.eval, inputs, lambda: len(workers.calls) >= stop_after)
        evaluator.evaluate(3)
    return run, workers, checkpointer, evaluator


def test_an_evaluation_goes_by_parts_and_is_recorded_once(tmp_path):
    run, workers, checkpointer, evaluator = evaluate(tmp_path, 100)
    assert workers.calls[0] == ("evaluate", 40, 0, 1)
    assert 1 < len(workers.calls) < workers.worker.engine.evaluation(40).size
    found = workers.worker.engine.evaluate(40)
    assert read_lines(run.path / "evals.jsonl") == [{"step": 3, "split": "validation", **found}]
    assert evaluator.last == 3
    assert checkpointer.is_wanted(3)  # it is the best so far


def test_a_run_that_is_stopped_gives_up_its_evaluation_and_records_nothing_of_it(tmp_path):
    run, workers, checkpointer, evaluator = evaluate(tmp_path, 1)
    assert len(workers.calls) == 1
    assert not (run.path / "evals.jsonl").exists()
    assert evaluator.last == -1
    assert not checkpointer.is_wanted(3)


@pytest.mark.parametrize(("minutes", "wanted"), [(10.0, [False, True, False]), (0.0, [False, False, False])])
def test_a_checkpoint_comes_by_time_where_none_comes_by_steps(tmp_path, monkeypatch, minutes, wanted):
    config = tiny(checkpoint={"minutes": minutes})
    run, workers = RunDirectory.create(tmp_path / "run", config), Here(config)
    found = []
    with Journal.open(run, config.steps, 0, Console(file=io.StringIO())) as journal:
        checkpointer, began = Checkpointer(run, workers, journal, config), time.monotonic()
        for passed in (599, 601, 1100):
            monkeypatch.setattr(time, "monotonic", lambda passed=passed: began + passed)
            found.append(checkpointer.is_wanted(passed))
            if found[-1]:
                checkpointer.save(passed, {})
    assert found == wanted


def test_the_best_is_the_best_while_its_checkpoint_is_being_written(tmp_path):
    config = tiny(checkpoint={"best": True})
    run, workers = RunDirectory.create(tmp_path / "run", config), Here(config)
    with Journal.open(run, config.steps, 0, Console(file=io.StringIO())) as journal:
        checkpointer = Checkpointer(run, workers, journal, config)
        checkpointer.note_loss(2, 3.0, 1)
        checkpointer.note_loss(2, 3.5, 1)
        checkpointer.begin(2, {})
        checkpointer.note_loss(4, 3.0, 1)  # before anybody has looked whether all is written
        assert not checkpointer.is_wanted(4)
        checkpointer.finish()
    assert run.read_best() == checkpointer.best == {"step": 2, "loss": 3.0, "batches": 1}


def test_a_last_checkpoint_that_cannot_be_written_says_why(tmp_path):
    config = tiny()
    run, workers = RunDirectory.create(tmp_path / "run", config), Here(config)
    (run.path / "checkpoints").write_text("in the way")
    with (
        Journal.open(run, config.steps, 0, Console(file=io.StringIO())) as journal,
        pytest.raises(CheckpointError, match=r"step 4: its checkpoint cannot be written below .*: .*(exists|directory).* Make room"),
    ):
        Checkpointer(run, workers, journal, config).save(4, {})
