"""Messages between the workers of one solve, and the deferred work that a worker does while it waits for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.state import State

PhaseListener = Callable[[str, int], None]
"""Called as each phase of a solve begins, with the phase's name and level."""


class DeferredWork(Protocol):
    """Work that no other worker waits for, such as `DeferredSweeps`."""

    def advance(self) -> bool:
        """Do the next piece of work. Returns False if none is left."""
        ...


@dataclass(frozen=True)
class Communicator:
    """The channel of one solve, and what to do while waiting on it.

    Attributes:
        channel: the channel to the other workers; `LocalChannel.alone()` for one worker.
        tag: the training step and the solve that messages belong to; named in errors.
        while_waiting: deferred work, such as layers of an earlier solve, to do while this solve would otherwise wait for a message.
    """

    channel: Channel
    tag: MessageTag
    while_waiting: DeferredWork | None = None

    @property
    def rank(self) -> int:
        """This worker's rank."""
        return self.channel.rank

    def send(self, state: State, destination: int, phase: str, level: int) -> None:
        """Send a state to `destination`, without waiting. `phase` and `level` name the message in errors."""
        self.channel.send(state, destination, self.tag.at(phase, level))

    def receive(self, spec: StateSpec, source: int, phase: str, level: int) -> State:
        """Receive the next state from `source`. Until it arrives, do deferred work, piece by piece.

        So the order in which a worker does its work depends on when messages arrive; the values do not.

        Args:
            spec: shapes and dtypes of the state.

        Raises:
            ChannelError: the state did not come within the time limit, or the sender is gone.
        """
        deferred = self.while_waiting
        while deferred is not None and not self.channel.arrived(spec, source) and deferred.advance():
            pass
        return self.channel.receive(spec, source, self.tag.at(phase, level))

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        """Sum `tensor` over all workers in place, and return it; `what` names the sum in errors.

        Raises:
            ChannelError: a worker did not take part within the time limit.
        """
        return self.channel.all_reduce(tensor, self.tag.at(what, 0))
