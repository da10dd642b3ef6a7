"""Early stopping: a run ends once its evaluations no longer improve. One worker in this process, without Ray."""

import io

import pytest
from rich.console import Console

from rayllp.config import load_config
from rayllp.errors import SettingsError
from rayllp.report import RunDirectory, read_lines
from rayllp.report.page.figures import describe_event
from rayllp.training.driver import train_session
from rayllp.training.prepare import prepare
from tests.conftest import tiny
from tests.test_evaluation_parts import Here

WAITING = {"steps": 20, "eval": {"every": 2, "batches": 1, "patience": 2}, "snapshot_every": 0, "checkpoint": {"best": True}}


class Alone(Here):
    """The one worker of a run."""

    def start(self, config, network, batches):
        return [
            {"network": self.worker.engine.block.architecture.transformers_config(), "rank": 0, "layers": [], "parameters": 0, "pid": 0}
        ]


def run_of(path, **changes):
    config = tiny(**WAITING, **changes)
    prepared = prepare(config, path)
    run, out = prepared.run or RunDirectory.create(path, config), io.StringIO()
    result = train_session(config, run, Alone(config), prepared.inputs, prepared.resume_from, console=Console(file=out, width=200))
    return run, result, out.getvalue()


def test_a_run_ends_when_evaluations_become_no_better(tmp_path):
    run, result, said = run_of(tmp_path / "run", optimizer={"lr": 1e-300})  # no weight changes
    assert (result.steps, result.stopped, result.stopped_early) == (6, False, True)
    lines = read_lines(run.path / "evals.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 6]
    assert result.validation_loss == lines[-1]["loss"]
    (event,) = (event for event in read_lines(run.path / "events.jsonl") if event["kind"] == "stop")
    reason = f"2 evaluations in a row were no better than {lines[0]['loss']:.4f} after step 2"
    assert (event["step"], event["reason"]) == (6, reason)
    assert describe_event(event) == f"step 6: stopped early: {reason}"
    assert f"step 6: stopped early: {reason}" in said
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_2", "step_6"]  # the best, and the last
    with pytest.raises(SettingsError, match="holds another run"):  # it has ended
        prepare(tiny(**WAITING, optimizer={"lr": 1e-300}), run.path)


def test_a_run_that_becomes_better_goes_on(tmp_path):
    _, result, _ = run_of(tmp_path / "run", optimizer={"lr": 3e-3})
    assert (result.steps, result.stopped_early) == (20, False)


def test_what_counts(tmp_path):
    run, settings = RunDirectory(tmp_path), tiny(**WAITING).eval
    found = []
    losses = {2: 3.0, 3: 1.0, 4: float("nan"), 6: 2.5, 8: 2.5, 10: 2.6}  # step 3 was an end
    for step, loss in losses.items():
        run.evaluation(step, "validation", loss)
        found.append((run.best_of_patience(settings) or {}).get("step"))
    assert found == [None, None, None, None, None, 6]
    run.truncate(8)  # a fault takes it back
    assert run.best_of_patience(settings) is None
    assert run.best_of_patience(settings.model_copy(update={"patience": None})) is None
    with pytest.raises(SettingsError, match=r"patience=3 counts evaluations, of which every=0 makes none on the way: set eval.every"):
        load_config(None, ["eval.patience=3", "eval.every=0"])
