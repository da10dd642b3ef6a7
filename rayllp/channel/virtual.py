"""Workers on logical clocks: messages carry times instead of waiting for them, so that a schedule can be timed without running it."""

import queue

from torch import Tensor

from rayllp.channel.base import MessageTag, StateSpec
from rayllp.channel.local import LocalChannel
from rayllp.state import State


class Clock:
    """One worker's logical time, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def spend(self, seconds: float) -> None:
        self.now += seconds


class VirtualChannel:
    """A LocalChannel whose messages also carry the sender's time: receiving moves the receiver's clock to their arrival.

    Args:
        inner: carries the messages.
        clock: this worker's.
        message_s: time from sending to arrival.
    """

    def __init__(self, inner: LocalChannel, clock: Clock, message_s: float) -> None:
        self._inner, self.clock, self.message_s = inner, clock, message_s
        self.rank, self.size = inner.rank, inner.size
        self._arrivals: dict[tuple[int, int], queue.SimpleQueue[float]] = inner.shared_queues("arrivals")

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self._arrivals[self.rank, destination].put(self.clock.now + self.message_s)
        self._inner.send(state, destination, tag)

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        state = self._inner.receive(spec, source, tag)
        self.clock.now = max(self.clock.now, self._arrivals[source, self.rank].get(timeout=1.0))
        return state

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        return self._inner.all_reduce(tensor, tag)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self._inner.close()
