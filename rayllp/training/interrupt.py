"""Handling of Ctrl-C (SIGINT), SIGTERM and a closed terminal (SIGHUP) during a run or a sweep."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 1.0
"""Signals this soon after the first one are taken as the same request: job managers send several, to the whole process group."""


class Stopped(KeyboardInterrupt):
    """The program was asked to end and has nothing to save.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The exit code that shells use: 128 plus the number of the signal."""
        return 128 + self.number


class Stopping:
    """The signal handler of a run. Use `stopping` to install it.

    Args:
        on_first: is called at the first signal; None: the first signal raises `Stopped`.

    Attributes:
        number: number of the signal that asked this process to end; None if there was none.
    """

    def __init__(self, on_first: Callable[[], None] | None) -> None:
        self.number: int | None = None
        self._on_first, self._at_once, self._since = on_first, 0, 0.0
        self._terminals = [number for number in range(3) if _is_terminal(number)]

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Stopped` at the first signal while inside this context.

        Raises:
            Stopped: a signal comes, or has come before.
        """
        self._at_once += 1
        try:
            if self.number is not None:
                raise Stopped(self.number)
            yield
        finally:
            self._at_once -= 1

    def handle(self, number: int, frame: Any) -> None:
        """Handle a signal. The second request always raises `Stopped`."""
        if number == signal.SIGHUP:
            self._leave_terminal()
        now = time.monotonic()
        if self.number is not None and now - self._since < AGAIN_S:
            return
        again, self.number, self._since = self.number is not None, number, now
        # Ray's blocking calls let KeyboardInterrupt through, but no other exception of a signal handler.
        if again or self._on_first is None or self._at_once:
            raise Stopped(number)
        self._on_first()

    def _leave_terminal(self) -> None:
        """Send output to /dev/null: the terminal is gone, and writing to it would fail."""
        null = os.open(os.devnull, os.O_RDWR)
        for number in self._terminals:
            os.dup2(null, number)
        os.close(null)


@contextlib.contextmanager
def stopping(on_first: Callable[[], None] | None = None) -> Iterator[Stopping]:
    """Handle SIGINT, SIGTERM and, unless nohup has it ignored, SIGHUP.

    Args:
        on_first: is called at the first signal. None: the first signal raises `Stopped`, as the second one always does.

    Raises:
        Stopped: what was running inside was given up.
    """
    state, before = Stopping(on_first), {}
    with contextlib.suppress(ValueError):  # not in the main thread: the caller has its own way to stop
        for number in ASKING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, state.handle)
    try:
        yield state
    except Stopped:
        raise
    except KeyboardInterrupt:  # Ray's calls turn our exception into a plain KeyboardInterrupt
        raise Stopped(state.number or signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupting() -> Iterator[Callable[[], int | None]]:
    """Treat SIGTERM and SIGHUP as Ctrl-C, which Ray Tune handles itself: it saves the sweep's state and returns.

    Yields a function that returns the number of the signal that came, or None.

    Raises:
        Stopped: a signal came while Tune was not running, or a second one came.
    """
    state = Stopping(None)
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            state._leave_terminal()
        received.append(number)
        signal.raise_signal(signal.SIGINT)

    def interrupt(number: int, frame: Any) -> None:
        raise Stopped(received[0] if received else number)

    def signal_received() -> int | None:
        # While it runs, Tune has its own handler of SIGINT. It restores ours after an interrupt.
        mine = signal.getsignal(signal.SIGINT) is interrupt
        return (received[0] if received else signal.SIGINT) if mine else None

    before = {signal.SIGINT: signal.signal(signal.SIGINT, interrupt)}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, forward)
    try:
        yield signal_received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:
        return False
