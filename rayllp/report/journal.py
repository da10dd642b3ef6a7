"""The journal passes on what happens in a run: to the files of the run directory, TensorBoard, listeners, and the user's terminal."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from rich.console import Console

from rayllp.config import TrainConfig
from rayllp.report.progress import ProgressDisplay
from rayllp.report.rundir import RunDirectory, as_hparams, flatten

SCALARS = "loss grad_norm lr tokens_per_s mfu rho_forward rho_backward bias cosine noise consistency consistency_weight".split()
"""Names of the metrics of a step that TensorBoard shows, if they were measured."""


class Listener(Protocol):
    """Interface of an object that is told what happens in a run. Pass it as `rayllp.train(listeners=[…])`, for a plot of your own, say.

    A subclass defines the methods that it needs; the others do nothing. They are called in the process that called `train`, between chunks
    of steps, so training waits for them. An exception from a method ends the run. Steps that are repeated after a failure are reported
    again.
    """

    def step(self, metric: Mapping[str, Any]) -> None:
        """A training step was done.

        Args:
            metric: a line of metrics.jsonl: "step" (from 0), "loss", "mode", "step_time_s", "rho_forward" (None unless probed), ….
        """

    def event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """An event happened: a switch of modes, fault, resize, restore, checkpoint or early stop, for example.

        Args:
            step: number of steps done before it.
            kind: as in events.jsonl.
            details: the other fields of its line, without the time.
        """

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation was done, with the exact forward.

        Args:
            step: number of steps done before it.
            metrics: "loss" and the metrics of the task.
        """


class Journal:
    """Records one session of a run. Use `open` to create it."""

    def __init__(
        self, run: RunDirectory, display: ProgressDisplay, listeners: Sequence[Listener], first_step: int = 0, *, tensorboard: bool = True
    ) -> None:
        self._run, self._display, self._listeners, self._draws = run, display, listeners, tensorboard
        self._again_from: int | None = first_step  # what TensorBoard has from this step on is discarded when it is opened
        self._board: Any = None
        self._trouble: str | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        run: RunDirectory,
        steps: int,
        first_step: int,
        console: Console,
        listeners: Sequence[Listener] = (),
        *,
        tensorboard: bool = True,
    ) -> Iterator["Journal"]:
        """Open a journal for one session of a run, and close it at the end.

        Args:
            steps: number of steps of the whole run.
            first_step: number of steps that are done already.
            tensorboard: True to write for TensorBoard.
        """
        with ProgressDisplay(steps, first_step, console) as display:
            journal = cls(run, display, listeners, first_step, tensorboard=tensorboard)
            try:
                yield journal
            finally:
                journal._close_board()

    def say(self, text: str) -> None:
        """Show the user a line of text."""
        self._display.say(text)

    def progress(self, what: str, done: int, size: int) -> None:
        """Show the user the progress of something other than training, such as an evaluation."""
        self._display.beside(what, done, size)

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Record an event as a line of events.jsonl, and tell the listeners."""
        self._run.event(step, kind, **details)
        self._warn()
        for listener in self._listeners:
            listener.event(step, kind, details)

    def gain(self, step: int, gain: Mapping[str, Any], sentence: str) -> None:
        """Record what a session's layer-parallel steps gained over exact ones: as an event, in TensorBoard, and as a line for the user."""
        self.event(step, "gain", **gain)
        for name in ("speedup", "speedup_over_one"):
            if gain[name] is not None:
                self.scalar(f"gain/{name}", gain[name], step)
        self.say(sentence)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve in TensorBoard. It is dropped while the run directory cannot be written."""
        self._draw(lambda board: board.add_scalar(name, value, step))

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Add a histogram of those values that are finite to TensorBoard."""
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            self._draw(lambda board: board.add_histogram(name, torch.tensor(finite), step))

    def finish(self, config: TrainConfig, metrics: Mapping[str, float], sample: str, step: int) -> None:
        """Record the end of the run in TensorBoard: settings and results of the last evaluation (HParams), and a sample of text."""
        if sample:
            self._draw(lambda board: board.add_text("sample", _as_code(sample), step))
        settings = as_hparams(flatten(config.model_dump(mode="json")))
        results = {f"hparam/{name}": value for name, value in metrics.items()}
        if results:
            self._draw(lambda board: board.add_hparams(settings, results, run_name=".", global_step=step))

    def rewind(self, step: int) -> None:
        """Discard what TensorBoard has of the steps from this one on, as they will be done again."""
        self._close_board()
        self._again_from = step

    def _open_board(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step, self._again_from = self._again_from, None
        self._board = SummaryWriter(str(self._run.path / "tensorboard"), purge_step=step)
        # Opening the board also discards the evaluation after `step` steps. It will not be repeated, so it is added again.
        for line in self._run.evaluations() if step else ():
            if line["step"] == step:
                for name in line.keys() - {"step", "split"}:
                    self._board.add_scalar(f"{line['split']}/{name}", line[name], step)

    def _draw(self, draw: Callable[[Any], None]) -> None:
        if not self._draws or self._run.trouble is not None:
            return
        try:
            if self._board is None:
                self._open_board()
            draw(self._board)
        except OSError:  # writing metrics.jsonl will fail, too, and be reported; the board is not closed, as that would hang
            self._board = None

    def step(self, metric: Mapping[str, Any]) -> None:
        """Record a training step, and tell the listeners."""
        self._run.metric(metric)
        self._warn()
        self._display.update(metric)
        for listener in self._listeners:
            listener.step(metric)
        step = metric["step"]
        for name in SCALARS:
            if metric[name] is not None:
                self.scalar(f"train/{name}", metric[name], step)
        self.scalar("train/serial", float(metric["mode"] == "serial"), step)
        for n, constant in enumerate(metric["lipschitz"] or ()):
            self.scalar(f"lipschitz/layer_{n:05d}", constant, step)
        self.histogram("layers/lipschitz", metric["lipschitz"] or (), step)
        for direction, levels in (metric["rho_by_point"] or {}).items():
            for level, factors in enumerate(levels):
                self.histogram(f"rho_{direction}/level_{level}", [factor for factor in factors if factor is not None], step)
        self.histogram("blocks/bias", [bias for bias, _ in metric["bias_by_block"] or ()], step)

    def evaluation(self, step: int, metrics: Mapping[str, float], split: str = "validation") -> None:
        """Record the results of an evaluation, and tell the listeners."""
        self._run.evaluation(step, split, **metrics)
        for listener in self._listeners:
            listener.evaluation(step, metrics)
        for name, value in metrics.items():
            self.scalar(f"{split}/{name}", value, step)

    def _warn(self) -> None:
        """Warn the user when the run directory cannot be written, and say when it can be written again."""
        trouble = self._run.trouble
        if trouble is not None and self._trouble is None:
            self.say(f"WARNING: {self._run.path} cannot be written ({trouble}); training goes on, and what it records waits")
        elif trouble is None and self._trouble is not None:
            self.say(f"{self._run.path} can be written again; nothing of the record is missing but points in TensorBoard")
        self._trouble = trouble

    def _close_board(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            with suppress(OSError):
                board.close()


def _as_code(text: str) -> str:
    """Return Markdown that shows a text literally: its lines are indented, so that nothing in it is taken as markup."""
    return "".join(f"    {line}\n" for line in text.splitlines())
