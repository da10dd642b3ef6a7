"""The progress display of a run: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 5.0


class ProgressDisplay:
    """Shows loss, tokens/s, MFU (if known), mode and ρ. Use as a context manager."""

    def __init__(self, steps: int, first_step: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live = self.console.is_terminal
        self._steps, self._shown, self._rho = steps, 0.0, "ρ –"
        self._beside: tuple[str, TaskID] | None = None
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
            with unread():
                self._leave_beside()
                self._bar.stop()

    def update(self, metric: Mapping[str, Any]) -> None:
        """Show a training step."""
        if metric["rho_forward"] is not None or metric["rho_backward"] is not None:
            self._rho = f"ρ {_short(metric['rho_forward'])}/{_short(metric['rho_backward'])}"
        used = "" if metric["mfu"] is None else f"MFU {metric['mfu']:.1%}  "
        status = f"loss {metric['loss']:.3f}  {metric['tokens_per_s']:,.0f} tokens/s  {used}{self._rho}"
        done = metric["step"] + 1
        if self._live:
            with unread():
                self._leave_beside()
                self._bar.update(self._task, completed=done, mode=metric["mode"], status=status)
        elif self._is_time() or done == self._steps:
            self.say(f"step {done}/{self._steps}  {metric['mode']}  {status}")

    def beside(self, what: str, done: int, size: int) -> None:
        """Show the progress of something other than training, by a second bar that stays until the next step or the next such bar."""
        if not self._live:
            if self._is_time() and done < size:
                self.say(f"{what}: {done} of {size}")
            return
        with unread():
            if self._beside is None or self._beside[0] != what:
                self._leave_beside()
                self._beside = (what, self._bar.add_task(what, total=size, mode="", status=what))
            self._bar.update(self._beside[1], completed=done, total=size)

    def _leave_beside(self) -> None:
        if self._beside is not None:
            self._bar.remove_task(self._beside[1])
            self._beside = None

    def _is_time(self) -> bool:
        """True if it is time for another plain line."""
        now = time.monotonic()
        due = now - self._shown > PLAIN_EVERY_S
        if due:
            self._shown = now
        return due

    def say(self, text: str) -> None:
        """Print a line that stays on the screen."""
        tell(self.console, text)


def tell(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: not wrapped, and without interpreting markup. It is dropped if the output is closed."""
    with unread():
        console.print(text, highlight=False, soft_wrap=True, markup=False, style=style)


@contextmanager
def unread() -> Iterator[None]:
    """Ignore that the terminal or the reader of a pipe is gone, so that a run goes on without it."""
    with suppress(OSError, SystemExit):  # rich raises SystemExit for a broken pipe
        yield


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
