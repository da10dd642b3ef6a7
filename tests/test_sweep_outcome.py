"""How a sweep ends, as people and scripts see it: failed trials, exit codes, a directory that was moved."""

import io
import signal

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rayllp.cli import FAILED, app
from rayllp.errors import SettingsError
from rayllp.tuning import run as module
from rayllp.tuning.results import _last_line, _say
from rayllp.tuning.run import _create, _read_sweep
from rayllp.tuning.sweep import load_sweep, make_sweep

SWEEP = "space: {optimizer.lr: {choice: [0.1, 0.2]}}\nsearcher: grid\nscheduler: none\n"


def test_a_sweep_that_was_moved_says_where_it_has_to_be(tmp_path):
    folder = _create(tmp_path / "old", make_sweep({"space": {"optimizer.lr": {"choice": [0.1]}}}), None)
    assert _read_sweep(folder).space
    moved = folder.rename(tmp_path / "new")
    with pytest.raises(SettingsError, match=rf"{moved} is a sweep that began in {folder}.*ln -s {moved} {folder}"):
        _read_sweep(moved)
    folder.symlink_to(moved)
    assert _read_sweep(folder).space


def test_failed_trials_are_told_with_what_the_first_of_them_said(tmp_path):
    error = 'Traceback (most recent call last):\n  File "x.py", line 1\nDataError: text.txt does not exist\n'
    assert _last_line(error) == "DataError: text.txt does not exist"
    row = {"settings": {}, "validation_loss": None, "parallel_share": None}
    rows = [{**row, "trial": "a", "state": "failed", "error": _last_line(error)}, {**row, "trial": "b", "state": "done", "error": None}]
    out = io.StringIO()
    _say(make_sweep({"space": {"optimizer.lr": {"choice": [0.1]}}}), rows, None, tmp_path, [], Console(file=out, width=200))
    assert "1 of 2 trials failed; a: DataError: text.txt does not exist" in out.getvalue()


class Results(list):
    """Made-up results of Ray Tune, with trials that finished or failed."""

    @property
    def num_terminated(self):
        return self.count("TERMINATED")


def ended(states, number=None):
    """Do as Ray Tune does: install a handler of SIGINT, restore the old one when interrupted, and return in any case."""
    original = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: signal.signal(signal.SIGINT, original))
    if number is not None:
        signal.raise_signal(number)
    return Results(states)


@pytest.mark.parametrize(
    ("states", "code"),
    [(["TERMINATED"] * 2, 0), (["TERMINATED", "ERROR"], FAILED), (["ERROR", "ERROR"], FAILED), (["TERMINATED", "PAUSED"], FAILED)],
)
def test_the_exit_code_says_whether_all_trials_came_to_an_end(tmp_path, monkeypatch, states, code):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    load_sweep(tmp_path / "sweep.yaml")
    monkeypatch.setattr(module, "tune", lambda sweep, output, resume: ended(states))
    assert CliRunner().invoke(app, ["tune", str(tmp_path / "sweep.yaml")]).exit_code == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_exit_code_says_which_signal_ended_a_sweep(tmp_path, monkeypatch, number):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    monkeypatch.setattr(module, "tune", lambda sweep, output, resume: ended(["PAUSED"], number))
    assert CliRunner().invoke(app, ["tune", str(tmp_path / "sweep.yaml")]).exit_code == 128 + number
