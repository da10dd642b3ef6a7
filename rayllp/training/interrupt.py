"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) while a run or a sweep goes on."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 1.0
"""Signals that come within so long of the first are the same wish: job managers send several, and to all of a process group."""


class Stopped(KeyboardInterrupt):
    """The program was asked to end, and has nothing to save.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells count: 128 and the signal's number."""
        return 128 + self.number


class Stopping:
    """What is done when this process is asked to end. Use `stopping`.

    Attributes:
        number: of the signal that has asked; None: none has.
    """

    def __init__(self, asked: Callable[[], None] | None) -> None:
        self.number: int | None = None
        self._asked, self._at_once, self._since = asked, 0, 0.0
        self._terminals = [number for number in range(3) if _is_terminal(number)]

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What happens inside is given up when the process is asked to end.

        Raises:
            Stopped: it was asked, now or before.
        """
        self._at_once += 1
        try:
            if self.number is not None:
                raise Stopped(self.number)
            yield
        finally:
            self._at_once -= 1

    def handle(self, number: int, frame: Any) -> None:
        """A signal has come."""
        if number == signal.SIGHUP:
            self._leave_terminal()
        now = time.monotonic()
        if self.number is not None and now - self._since < AGAIN_S:
            return
        again, self.number, self._since = self.number is not None, number, now
        # Ray's calls pass on KeyboardInterrupt, and no other exception of a handler.
        if again or self._asked is None or self._at_once:
            raise Stopped(number)
        self._asked()

    def _leave_terminal(self) -> None:
        """Nobody reads any more, and what is written would fail."""
        null = os.open(os.devnull, os.O_RDWR)
        for number in self._terminals:
            os.dup2(null, number)
        os.close(null)


@contextlib.contextmanager
def stopping(asked: Callable[[], None] | None = None) -> Iterator[Stopping]:
    """Heed SIGINT, SIGTERM and, unless nohup has it ignored, SIGHUP.

    Args:
        asked: is called at the first one; None: everything inside is given up then. At a second one it is in any case.

    Raises:
        Stopped: what is inside was given up.
    """
    state, before = Stopping(asked), {}
    with contextlib.suppress(ValueError):  # not the main thread: the caller has its own way to stop
        for number in ASKING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, state.handle)
    try:
        yield state
    except Stopped:
        raise
    except KeyboardInterrupt:  # Ray's calls raise a plain one for ours
        raise Stopped(state.number or signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupting() -> Iterator[Callable[[], int | None]]:
    """SIGTERM and SIGHUP are as good as Ctrl-C inside, for which Ray Tune has its own answer: it keeps the sweep's state, and returns.

    Yields what tells the number of the signal that came; None: none did.

    Raises:
        Stopped: one came while Tune was not at work, or a second one.
    """
    state = Stopping(None)
    asked: list[int] = []

    def forward(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            state._leave_terminal()
        asked.append(number)
        signal.raise_signal(signal.SIGINT)

    def interrupt(number: int, frame: Any) -> None:
        raise Stopped(asked[0] if asked else number)

    def found() -> int | None:
        # Tune takes SIGINT for itself, and gives it back when it was interrupted.
        mine = signal.getsignal(signal.SIGINT) is interrupt
        return (asked[0] if asked else signal.SIGINT) if mine else None

    before = {signal.SIGINT: signal.signal(signal.SIGINT, interrupt)}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, forward)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:
        return False
