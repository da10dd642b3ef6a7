"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 5.0


class ProgressDisplay:
    """Loss, tokens/s, mode and ρ. Use as a context manager."""

    def __init__(self, steps: int, first_step: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live = self.console.is_terminal
        self._steps, self._shown, self._rho = steps, 0.0, "ρ –"
        self._bar = Progress(
            TextColumn("{task.fields[mode]:8}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(), console=self.console, transient=False,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, completed=first_step, mode="", status="")

    def __enter__(self) -> "ProgressDisplay":
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    def update(self, metric: Mapping[str, Any]) -> None:
        """Show a step."""
        if metric["rho_forward"] is not None or metric["rho_backward"] is not None:
            self._rho = f"ρ {_short(metric['rho_forward'])}/{_short(metric['rho_backward'])}"
        speed = metric["tokens"] / max(metric["step_time_s"], 1e-9)
        status = f"loss {metric['loss']:.3f}  {speed:,.0f} tokens/s  {self._rho}"
        done = metric["step"] + 1
        if self._live:
            self._bar.update(self._task, completed=done, mode=metric["mode"], status=status)
        elif time.monotonic() - self._shown > PLAIN_EVERY_S or done == self._steps:
            self._shown = time.monotonic()
            self.console.print(f"step {done}/{self._steps}  {metric['mode']}  {status}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
