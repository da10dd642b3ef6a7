"""The part of a forward solve's last sweep that nobody else waits for, and a channel whose waits are used for it.

Only the end of the last interval leads on: to the loss, and from there into the adjoint's coarse chain, which reads graphs at C-points
alone. So a worker puts the other intervals off. It takes their layers while it would wait for the adjoint, and those that are left when
an adjoint step asks for them. The order of work thus depends on when messages arrive, its results do not.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from rayllp.channel.base import Channel, ChannelAround, MessageTag, StateSpec
from rayllp.state import State


@dataclass
class DeferredRun:
    """Part of an interval: its layers, ascending, and the steps through them, one a `next`."""

    layers: range
    steps: Iterator[None]
    taken: int = 0

    def advance(self) -> bool:
        """Take the next step; False if there is none."""
        if self.taken == len(self.layers):
            return False
        next(self.steps)
        self.taken += 1
        return True


class DeferredSweeps:
    """Pieces of a last sweep that have yet to be made, in the order in which the adjoint's last sweep wants them."""

    def __init__(self) -> None:
        self.runs: deque[DeferredRun] = deque()

    def advance(self) -> bool:
        """Take one layer; False if nothing is left."""
        while self.runs:
            if self.runs[0].advance():
                return True
            self.runs.popleft()
        return False

    def reach(self, layer: int) -> None:
        """Take the layers of its piece up to this one, if they were put off and not taken since."""
        for piece in self.runs:
            if layer in piece.layers:
                while piece.layers.start + piece.taken <= layer:
                    piece.advance()
                return


class RunsDeferredWhileWaiting(ChannelAround):
    """A channel that takes deferred layers for as long as what is to be received is not there."""

    def __init__(self, inner: Channel, deferred: DeferredSweeps) -> None:
        super().__init__(inner)
        self.deferred = deferred

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        while not self.inner.arrived(spec, source) and self.deferred.advance():
            pass
        return self.inner.receive(spec, source, tag)
