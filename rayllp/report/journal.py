"""What happens in a run, told to all who listen: the run directory's files, TensorBoard, and the person who watches."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from rich.console import Console

from rayllp.config import TrainConfig
from rayllp.report.progress import ProgressDisplay
from rayllp.report.rundir import RunDirectory, flatten

SCALARS = "loss grad_norm lr tokens_per_s mfu rho_forward rho_backward bias cosine noise consistency consistency_weight".split()
"""What TensorBoard gets of each step, where it was measured."""


class Listener(Protocol):
    """Who else is told: give one to `rayllp.train(listeners=[…])`, for Weights & Biases, MLflow, or a plot of your own.

    A class that derives from this one writes the methods that it needs, and inherits the others, which do nothing. They are called in the
    process that called `train`, between chunks of steps: time spent here is time not trained. What a method raises ends the run. After a
    fault, steps that are done again are told again.
    """

    def step(self, metric: Mapping[str, Any]) -> None:
        """A training step.

        Args:
            metric: a line of metrics.jsonl: "step" (from 0), "loss", "mode", "step_time_s", "rho_forward" (None unless probed), ….
        """

    def event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """A switch, fault, resize, restore, checkpoint or early stop.

        Args:
            step: steps done before it.
            kind: as in events.jsonl.
            details: what else its line has, but for the time.
        """

    def evaluation(self, step: int, found: Mapping[str, float]) -> None:
        """An evaluation, by the exact forward.

        Args:
            step: steps done before it.
            found: "loss", and the task's metric.
        """


class Journal:
    """Use `open`."""

    def __init__(
        self, run: RunDirectory, display: ProgressDisplay, listeners: Sequence[Listener], first_step: int = 0, *, tensorboard: bool = True
    ) -> None:
        self._run, self._display, self._listeners, self._draws = run, display, listeners, tensorboard
        self._again_from: int | None = first_step  # what TensorBoard has from this step on is forgotten when it is opened
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
        """A journal for one sitting of a run, of which `first_step` steps are done."""
        with ProgressDisplay(steps, first_step, console) as display:
            journal = cls(run, display, listeners, first_step, tensorboard=tensorboard)
            try:
                yield journal
            finally:
                journal._close_board()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self._display.say(text)

    def progress(self, what: str, done: int, size: int) -> None:
        """How far something is that is no training, for the person who watches."""
        self._display.beside(what, done, size)

    def event(self, step: int, kind: str, **details: Any) -> None:
        """A line of events.jsonl."""
        self._run.event(step, kind, **details)
        self._warn()
        for listener in self._listeners:
            listener.event(step, kind, details)

    def gain(self, step: int, found: Mapping[str, Any], sentence: str) -> None:
        """What a sitting's layer-parallel steps have gained over exact ones: an event, TensorBoard's scalars, and a line."""
        self.event(step, "gain", **found)
        for name in ("speedup", "speedup_over_one"):
            if found[name] is not None:
                self.scalar(f"gain/{name}", found[name], step)
        self.say(sentence)

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point in TensorBoard; none while the run directory cannot be written."""
        self._draw(lambda board: board.add_scalar(name, value, step))

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """A histogram in TensorBoard, of values that are finite."""
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            self._draw(lambda board: board.add_histogram(name, torch.tensor(finite), step))

    def finish(self, config: TrainConfig, found: Mapping[str, float], sample: str, step: int) -> None:
        """The run has ended: in TensorBoard its settings beside what the last evaluation found (HParams), and a sample of its text."""
        if sample:
            self._draw(lambda board: board.add_text("sample", _as_code(sample), step))
        flat = flatten(config.model_dump(mode="json"))
        settings = {name: value if isinstance(value, bool | int | float | str) else json.dumps(value) for name, value in flat.items()}
        results = {f"hparam/{name}": value for name, value in found.items()}
        if results:
            self._draw(lambda board: board.add_hparams(settings, results, run_name=".", global_step=step))

    def rewind(self, step: int) -> None:
        """Steps from this one on are done again: TensorBoard forgets what it has of them."""
        self._close_board()
        self._again_from = step

    def _open_board(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step, self._again_from = self._again_from, None
        self._board = SummaryWriter(str(self._run.path / "tensorboard"), purge_step=step)
        # An evaluation after so many steps goes with them, though it is not done again.
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
        self.scalar("train/serial", float(metric["mode"] == "serial"), step)
        for n, constant in enumerate(metric["lipschitz"] or ()):
            self.scalar(f"lipschitz/layer_{n:05d}", constant, step)
        self.histogram("layers/lipschitz", metric["lipschitz"] or (), step)
        for direction, levels in (metric["rho_by_point"] or {}).items():
            for level, factors in enumerate(levels):
                self.histogram(f"rho_{direction}/level_{level}", [factor for factor in factors if factor is not None], step)
        self.histogram("blocks/bias", [bias for bias, _ in metric["bias_by_block"] or ()], step)

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


def _as_code(text: str) -> str:
    """Markdown that shows a text as it is: every line indented, so that nothing in it is markup."""
    return "".join(f"    {line}\n" for line in text.splitlines())
