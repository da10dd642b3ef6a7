"""What happens in a run, told to all who listen: the run directory's files, TensorBoard, and the person who watches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from rich.console import Console

from rayllp.report.progress import ProgressDisplay
from rayllp.report.rundir import RunDirectory

SCALARS = "loss grad_norm lr rho_forward rho_backward bias cosine noise consistency consistency_weight".split()
"""What TensorBoard gets of each step, where it was measured."""


class Listener(Protocol):
    """Who else is told."""

    def step(self, metric: Mapping[str, Any]) -> None:
        """A training step, as metrics.jsonl has it."""

    def event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """As events.jsonl has it."""

    def evaluation(self, step: int, found: Mapping[str, float]) -> None:
        """Validation loss and metrics."""


class Journal:
    """Use `open`."""

    def __init__(self, run: RunDirectory, display: ProgressDisplay, listeners: Sequence[Listener]) -> None:
        self._run, self._display, self._listeners = run, display, listeners
        self._board: Any = None
        self._trouble: str | None = None

    @classmethod
    @contextmanager
    def open(
        cls, run: RunDirectory, steps: int, first_step: int, console: Console, listeners: Sequence[Listener] = ()
    ) -> Iterator["Journal"]:
        """A journal for one sitting of a run, of which `first_step` steps are done."""
        with ProgressDisplay(steps, first_step, console) as display:
            journal = cls(run, display, listeners)
            try:
                yield journal
            finally:
                journal._close_board()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self._display.say(text)

    def event(self, step: int, kind: str, **details: Any) -> None:
        """A line of events.jsonl."""
        self._run.event(step, kind, **details)
        self._warn()
        for listener in self._listeners:
            listener.event(step, kind, details)

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point in TensorBoard; none while the run directory cannot be written."""
        if self._run.trouble is not None:
            return
        try:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self._run.path / "tensorboard"))
            self._board.add_scalar(name, value, step)
        except OSError:  # metrics.jsonl will meet the same, and say so; closing it would wait for its dead thread
            self._board = None

    def step(self, metric: Mapping[str, Any]) -> None:
        """A training step."""
        self._run.metric(metric)
        self._warn()
        self._display.update(metric)
        for listener in self._listeners:
            listener.step(metric)
        step = metric["step"]
        for name in SCALARS:
            if metric[name] is not None:
                self.scalar(f"train/{name}", metric[name], step)
        self.scalar("train/tokens_per_s", metric["tokens"] / max(metric["step_time_s"], 1e-9), step)
        self.scalar("train/serial", float(metric["mode"] == "serial"), step)
        for n, constant in enumerate(metric["lipschitz"] or ()):
            self.scalar(f"lipschitz/layer_{n:05d}", constant, step)

    def evaluation(self, step: int, found: Mapping[str, float], split: str = "validation") -> None:
        """What an evaluation found."""
        self._run.evaluation(step, split, **found)
        for listener in self._listeners:
            listener.evaluation(step, found)
        for name, value in found.items():
            self.scalar(f"{split}/{name}", value, step)

    def _warn(self) -> None:
        """Say that the run directory cannot be written, or can again."""
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
