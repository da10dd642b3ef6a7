"""The journal passes on what happens in a run: to the files of the run directory, listeners, and the user's terminal."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from rayllp.report.progress import ProgressDisplay
from rayllp.report.run_directory import RunDirectory

SCALARS = "loss grad_norm lr tokens_per_s mfu rho_forward rho_backward bias cosine noise loss_gap consistency consistency_weight".split()
"""Names of the metrics of a step that loggers show as curves, if they were measured."""


class Listener:
    """Base of objects that are told what happens in a run. Pass one as `rayllp.train(listeners=[…])`, for a plot of your own, say.

    A subclass defines the methods that it needs; the others do nothing. They are called in the process that called `train`, between chunks
    of steps, so training waits for them. An exception from a method ends the run. Steps that are repeated after a failure are reported
    again, after a call of `on_rewind`.
    """

    def on_step(self, metric: Mapping[str, Any]) -> None:
        """A training step was done.

        Args:
            metric: a line of metrics.jsonl: "step" (from 0), "loss", "mode", "step_time_s", "rho_forward" (None unless probed), ….
        """

    def on_event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """An event happened: a switch of modes, fault, resize, restore, checkpoint or early stop, for example.

        Args:
            step: number of steps done before it.
            kind: as in events.jsonl.
            details: the other fields of its line, without the time.
        """

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation was done, with the exact forward.

        Args:
            step: number of steps done before it.
            metrics: "loss" and the metrics of the task.
        """

    def on_rewind(self, step: int) -> None:
        """The steps from this one on come next, and replace any reported before: a session begins, or the run has gone back.

        Args:
            step: number of steps done before it.
        """

    def on_end(self, step: int, metrics: Mapping[str, float], sample: str) -> None:
        """The session has ended without an error: after the last step, or because the run was stopped.

        Args:
            step: number of steps done.
            metrics: results of the last evaluation; empty if the run was stopped.
            sample: generated text; empty if there is none.
        """


class Journal:
    """Records one session of a run. Use `open` to create it."""

    def __init__(self, run: RunDirectory, display: ProgressDisplay, listeners: Sequence[Listener]) -> None:
        self._run, self._display, self._listeners = run, display, listeners
        self._trouble: str | None = None

    @classmethod
    @contextmanager
    def open(
        cls, run: RunDirectory, steps: int, first_step: int, console: Console, listeners: Sequence[Listener] = ()
    ) -> Iterator["Journal"]:
        """Open a journal for one session of a run, and close it at the end.

        Args:
            steps: number of steps of the whole run.
            first_step: number of steps that are done already.
        """
        with ProgressDisplay(steps, first_step, console) as display:
            yield cls(run, display, listeners)

    def say(self, text: str) -> None:
        """Show the user a line of text."""
        self._display.say(text)

    def progress(self, what: str, done: int, size: int) -> None:
        """Show the user the progress of something other than training, such as an evaluation."""
        self._display.beside(what, done, size)

    def step(self, metric: Mapping[str, Any]) -> None:
        """Record a training step, and tell the listeners."""
        self._run.metric(metric)
        self._warn()
        self._display.update(metric)
        for listener in self._listeners:
            listener.on_step(metric)

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Record an event as a line of events.jsonl, and tell the listeners."""
        self._run.event(step, kind, **details)
        self._warn()
        for listener in self._listeners:
            listener.on_event(step, kind, details)

    def evaluation(self, step: int, metrics: Mapping[str, float], split: str = "validation") -> None:
        """Record the results of an evaluation, and tell the listeners."""
        self._run.evaluation(step, split, **metrics)
        for listener in self._listeners:
            listener.on_evaluation(step, metrics)

    def rewind(self, step: int) -> None:
        """Discard the records of the steps from this one on, as they will be done again, and tell the listeners."""
        self._run.truncate(step)
        for listener in self._listeners:
            listener.on_rewind(step)

    def end(self, step: int, metrics: Mapping[str, float], sample: str) -> None:
        """Tell the listeners that the session has ended; takes what `Listener.on_end` takes."""
        for listener in self._listeners:
            listener.on_end(step, metrics, sample)

    def _warn(self) -> None:
        """Warn the user when the run directory cannot be written, and say when it can be written again."""
        trouble = self._run.trouble
        if trouble is not None and self._trouble is None:
            self.say(f"WARNING: {self._run.path} cannot be written ({trouble}); training goes on, and records wait in memory")
        elif trouble is None and self._trouble is not None:
            self.say(f"{self._run.path} can be written again; no record is lost, except for points in TensorBoard")
        self._trouble = trouble
