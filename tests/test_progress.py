"""The progress display: what a person sees, and that a run does not need anyone to read it."""

import io

import pytest
from rich.console import Console

from rayllp.report import progress
from rayllp.report.progress import ProgressDisplay
from rayllp.training.messages import note_without_pipeline
from tests.conftest import IN_TURN, tiny

STEP = {"step": 0, "loss": 1.0, "mode": "serial", "tokens_per_s": 80.0, "mfu": None, "rho_forward": None, "rho_backward": None}


def test_long_work_beside_training_is_shown(monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    out = io.StringIO()
    with ProgressDisplay(4, console=Console(file=out)) as display:
        display.beside("translation", 10, 1014)
    assert "translation: 10 of 1014" in out.getvalue()


def test_a_second_bar_goes_when_training_goes_on():
    with ProgressDisplay(4, console=Console(file=io.StringIO(), force_terminal=True)) as display:
        display.beside("evaluation", 1, 8)
        display.beside("evaluation", 4, 8)
        assert [(task.description, task.completed, task.total) for task in display._bar.tasks[1:]] == [("evaluation", 4, 8)]
        display.beside("sample", 0, 200)
        assert [task.description for task in display._bar.tasks] == ["train", "sample"]
        display.update(STEP)
        assert [task.description for task in display._bar.tasks] == ["train"]


class Gone(io.StringIO):
    """A terminal that is closed, or a pipe whose reader ends."""

    error = None

    def write(self, text):
        if self.error is not None:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")])
@pytest.mark.parametrize("terminal", [False, True])
def test_nobody_has_to_read_it(error, terminal):
    out = Gone()
    with ProgressDisplay(1, console=Console(file=out, force_terminal=terminal)) as display:
        display.say("somebody reads")
        out.error = error
        display.update(STEP)
        display.beside("evaluation", 1, 2)
        display.say("a line")
    assert "somebody reads" in out.getvalue()
    assert "a line" not in out.getvalue()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"microbatches": 2}, "microbatches=2 makes 2 microbatches for 4 workers; give at least 4"),
        ({"batch_size": 2}, "a batch of 2 sequences makes 2 microbatches for 4 workers"),
        ({"batch_size": 4, "accumulate": 2}, None),
        ({"microbatches": 4}, None),
        ({"microbatches": 2, "mode": "parallel"}, None),
        ({"microbatches": 2, **IN_TURN}, None),
        ({"batch_size": 1, "workers": 1}, None),
    ],
)
def test_exact_steps_without_a_pipeline_are_told_of(changes, note):
    found = note_without_pipeline(tiny(**{"workers": 4, "batch_size": 8, "mode": "serial", **changes}))
    assert found is None if note is None else note in found
