"""Logging to TensorBoard (the setting `log_to`): curves, histograms, a sample of text, and settings beside results (HParams)."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from rayllp.config import TrainConfig
from rayllp.config.nested import Stage, stage_at
from rayllp.report.journal import SCALARS, Listener
from rayllp.report.run_directory import RunDirectory, as_hparams, flatten

EVENT_SCALARS = {
    "gain": {"speedup": "gain/speedup", "speedup_over_one": "gain/speedup_over_one"},
    "resize": {"workers": "train/workers"},
    "restore": {"seconds": "recovery/seconds"},
}
"""For each kind of event, the fields that are drawn as curves if they have a value, with the names of the curves."""


class TensorBoard(Listener):
    """Writes to RUN/tensorboard. Points are dropped while the run directory cannot be written.

    Args:
        first_step: number of steps that are done already. Points from there on are discarded when the files are opened.
    """

    def __init__(self, config: TrainConfig, run: RunDirectory, first_step: int = 0) -> None:
        self._config, self._run = config, run
        self._again_from: int | None = first_step
        self._board: Any = None
        self._stage: Stage | None = None  # the stage of nested iteration whose depth was added last

    def on_step(self, metric: Mapping[str, Any]) -> None:
        """Add the step's scalars, and histograms of what it has measured by layer, point or worker."""
        step = metric["step"]
        for name in SCALARS:
            if metric[name] is not None:
                self._scalar(f"train/{name}", metric[name], step)
        self._scalar("train/serial", float(metric["mode"] == "serial"), step)
        for n, constant in enumerate(metric["lipschitz"] or ()):
            self._scalar(f"lipschitz/layer_{n:05d}", constant, step)
        self._histogram("layers/lipschitz", metric["lipschitz"] or (), step)
        for direction, levels in (metric["rho_by_point"] or {}).items():
            for level, factors in enumerate(levels):
                self._histogram(f"rho_{direction}/level_{level}", [factor for factor in factors if factor is not None], step)
        self._histogram("layers/bias", [bias for bias, _ in metric["bias_by_layer"] or ()], step)
        if self._config.nested.factors:
            self._show_depth(step)

    def on_event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Add what an event measured."""
        for field, name in EVENT_SCALARS.get(kind, {}).items():
            if details.get(field) is not None:
                self._scalar(name, details[field], step)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the validation loss and metrics."""
        for name, value in metrics.items():
            self._scalar(f"validation/{name}", value, step)

    def on_rewind(self, step: int) -> None:
        """Discard the points of the steps from this one on, as they will be done again."""
        self.close()
        self._again_from, self._stage = step, None

    def on_end(self, step: int, metrics: Mapping[str, float], sample: str) -> None:
        """Add the sample, and the settings beside the results of the last evaluation."""
        if sample:
            self._draw(lambda board: board.add_text("sample", _as_code(sample), step))
        settings = as_hparams(flatten(self._config.model_dump(mode="json")))
        results = {f"hparam/{name}": value for name, value in metrics.items()}
        if results:
            self._draw(lambda board: board.add_hparams(settings, results, run_name=".", global_step=step))

    def close(self) -> None:
        """Write what has not been written yet."""
        board, self._board = self._board, None
        if board is not None:
            with suppress(OSError):
                board.close()

    def _show_depth(self, step: int) -> None:
        """Add the number of layers where a stage of nested iteration begins, or the session does."""
        if self._stage is None or step >= self._stage.end:
            self._stage = stage_at(self._config, step)
            self._scalar("train/layers", self._stage.config.model.layers, step)

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._draw(lambda board: board.add_scalar(name, value, step))

    def _histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Add a histogram of those values that are finite."""
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            self._draw(lambda board: board.add_histogram(name, torch.tensor(finite), step))

    def _draw(self, draw: Callable[[Any], None]) -> None:
        if self._run.trouble is not None:
            return
        try:
            if self._board is None:
                self._open()
            draw(self._board)
        except OSError:  # writing metrics.jsonl will fail, too, and be reported; the board is not closed, as that would hang
            self._board = None

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step, self._again_from = self._again_from, None
        self._board = SummaryWriter(str(self._run.path / "tensorboard"), purge_step=step)
        # Opening the board also discards the evaluation after `step` steps. It will not be repeated, so it is added again.
        for line in self._run.evaluations() if step else ():
            if line["step"] == step:
                for name in line.keys() - {"step", "split"}:
                    self._board.add_scalar(f"{line['split']}/{name}", line[name], step)


def _as_code(text: str) -> str:
    """Return Markdown that shows a text literally: its lines are indented, so that nothing in it is taken as markup."""
    return "".join(f"    {line}\n" for line in text.splitlines())
