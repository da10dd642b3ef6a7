"""The interface by which workers exchange messages, and the tag that every message carries."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from rayllp.errors import ChannelError, MessageTimeoutError
from rayllp.state import State, tensors

T = TypeVar("T")


@dataclass(frozen=True)
class MessageTag:
    """Identifies a message by training step, solve ("forward", "adjoint", …), phase of the cycle and level.

    Errors name it, and a receiver refuses a message whose tag is not the one that it expects.
    """

    step: int
    solve: str
    phase: str = ""
    level: int = 0

    def at(self, phase: str, level: int) -> "MessageTag":
        """Return the tag of the same solve at another phase and level of its cycle."""
        return MessageTag(self.step, self.solve, phase, level)

    def __str__(self) -> str:
        return f"step {self.step}, {self.solve} {self.phase}, level {self.level}"


@dataclass(frozen=True)
class StateSpec:
    """Shapes, dtypes and device of a state's tensors, from which a receiver allocates them."""

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    bare: bool = True  # whether a state of one tensor is that tensor rather than a tuple of one

    @staticmethod
    def of(state: State) -> "StateSpec":
        """Return the spec of this state."""
        parts = tensors(state)
        return StateSpec(
            tuple(part.shape for part in parts), tuple(part.dtype for part in parts), parts[0].device, isinstance(state, Tensor)
        )

    def build(self, parts: list[Tensor]) -> State:
        """Return these tensors as a state: a bare tensor where the spec says so, otherwise a tuple."""
        return parts[0] if self.bare else tuple(parts)

    def zeros(self) -> State:
        """Return a state of zeros."""
        parts = zip(self.shapes, self.dtypes, strict=True)
        return self.build([torch.zeros(shape, dtype=dtype, device=self.device) for shape, dtype in parts])


Sends = Sequence[tuple[State, int]]
"""States to send, each with the rank of its receiver."""
Receives = Sequence[tuple[StateSpec, int]]
"""Specs of states to receive, each with the rank of its sender."""
Pending: TypeAlias = Callable[[], T]
"""A collective that is under way: the function waits for its result and returns it. It raises ChannelError if a worker did not take part
within the time limit, or is gone. All workers have to begin their collectives, and to wait for them, in the same order.
"""


class Channel(ABC):
    """Messages between the workers of one group. Messages from one worker to another arrive in the order in which they were sent.

    Attributes:
        rank: this worker's rank in the group.
        size: number of workers in the group.
        synchronous_sends: True if, as with NCCL, a send completes only once its receiver has come to the matching receive, and two workers
            carry out their messages to each other in the order of issue. Two workers that both send before they receive would then
            deadlock: see `exchange`.
    """

    rank: int
    size: int
    synchronous_sends: bool = False

    @abstractmethod
    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        """Send `state`, and return at once. The state must not be changed afterwards."""

    @abstractmethod
    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        """Wait for the next state from `source`, and return it.

        Raises:
            ChannelError: the state did not come within the time limit, or the sender is gone.
        """

    def exchange(self, sends: Sends, receives: Receives, tag: MessageTag) -> list[State]:
        """Send states to other workers and receive states from others at the same time.

        For workers that send to each other before either receives: with `send` and `receive` they would deadlock if sends are synchronous.

        Returns: the received states, in the order of `receives`.
        """
        for state, destination in sends:
            self.send(state, destination, tag)
        return [self.receive(spec, source, tag) for spec, source in receives]

    def broadcast(self, state: State | None, spec: StateSpec, source: int, tag: MessageTag) -> State:
        """Return the state of worker `source` on every worker. `source` sends it to each of the others in turn.

        Args:
            state: the state to send, on `source`; ignored on the other workers.
            spec: shapes and dtypes of the state.

        Raises:
            ChannelError: the source has no state, or the state did not come within the time limit, or the source is gone.
        """
        if self.rank != source:
            return self.receive(spec, source, tag)
        if state is None:
            raise ChannelError(f"{tag}: worker {source} is to broadcast a state, and has none")
        for other in range(self.size):
            if other != source:
                self.send(state, other, tag)
        return state

    def arrived(self, spec: StateSpec, source: int) -> bool:
        """Return True if the next state from `source` has arrived, so that `receive` would not wait. False where a channel cannot tell."""
        return False

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        """Sum `tensor` over all workers in place, and return it. All workers get the same bits.

        Raises:
            ChannelError: a worker did not take part within the time limit, or is gone.
        """
        return self.begin_all_reduce(tensor, tag)()

    @abstractmethod
    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> Pending[Tensor]:
        """Begin `all_reduce`, and return at once. The tensor must not be used before the sum has been waited for."""

    def all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> list[State]:
        """Return every worker's `state`, in order of rank. All have the same spec; this worker's own state is not copied.

        Raises:
            ChannelError: a state did not come within the time limit, or a worker is gone.
        """
        return self.begin_all_gather(state, spec, tag)()

    @abstractmethod
    def begin_all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> Pending[list[State]]:
        """Begin `all_gather`, and return at once."""

    def all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> list[Tensor]:
        """Send part j to worker j, and return the parts that the workers have sent to this one, in order of rank.

        Args:
            parts: one flat tensor for each worker. All have the same length and dtype, on all workers.

        Raises:
            ChannelError: a part did not come within the time limit, or a worker is gone.
        """
        return self.begin_all_to_all(parts, tag)()

    @abstractmethod
    def begin_all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> Pending[list[Tensor]]:
        """Begin `all_to_all`, and return at once."""

    def prepost_receives(self, key: Hashable | None) -> AbstractContextManager[None]:
        """Return a context in which the same messages are received, in the same order, as in the last context with this key.

        The channel knows what comes next, so it may post each receive before the message is needed.

        Args:
            key: names the sequence of messages. None: nothing is known of the messages inside.
        """
        return nullcontext()

    def finish(self) -> None:  # noqa: B027  (a channel that keeps nothing has nothing to wait for)
        """Wait until everything that was sent has left, so that its memory can be used again.

        A channel may hold on to all that was sent until then. A worker that keeps sending calls this where the receivers are known to have
        received most of it.
        """

    def close(self) -> None:  # noqa: B027  (nor anything to close)
        """Give up the connection to the other workers."""


class ChannelWrapper(Channel):
    """A channel that passes every call on to another one. Base class of channels that add something to some of the calls.

    A broadcast is not passed on: it consists of this channel's own sends and receives, so what a subclass adds to these applies to it, too.
    The same is true of an all-gather and an all-to-all, which are begun and waited for.
    """

    def __init__(self, inner: Channel) -> None:
        self.inner = inner
        self.rank, self.size, self.synchronous_sends = inner.rank, inner.size, inner.synchronous_sends

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self.inner.send(state, destination, tag)

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        return self.inner.receive(spec, source, tag)

    def exchange(self, sends: Sends, receives: Receives, tag: MessageTag) -> list[State]:
        return self.inner.exchange(sends, receives, tag)

    def arrived(self, spec: StateSpec, source: int) -> bool:
        return self.inner.arrived(spec, source)

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        return self.inner.all_reduce(tensor, tag)

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> Pending[Tensor]:
        return self.inner.begin_all_reduce(tensor, tag)

    def begin_all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> Pending[list[State]]:
        return self.inner.begin_all_gather(state, spec, tag)

    def begin_all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> Pending[list[Tensor]]:
        return self.inner.begin_all_to_all(parts, tag)

    def prepost_receives(self, key: Hashable | None) -> AbstractContextManager[None]:
        return self.inner.prepost_receives(key)

    def finish(self) -> None:
        self.inner.finish()

    def close(self) -> None:
        self.inner.close()


def unexpected_message(tag: MessageTag, sent: MessageTag, receiver: int, sender: int) -> ChannelError:
    """Return the error for a message other than the one that was expected."""
    return ChannelError(f"worker {receiver} waits for {tag} from worker {sender}, which sent {sent}: the schedules differ")


def receive_failed(tag: MessageTag, source: int, destination: int, reason: str) -> ChannelError:
    """Return the error for a message that did not arrive."""
    return ChannelError(f"{tag}: worker {destination} received nothing from worker {source}: {reason}")


def timed_out(tag: MessageTag, source: int, destination: int, limit_s: float, details: str = "") -> MessageTimeoutError:
    """Return the error for a message that did not arrive within the time limit of `limit_s` seconds."""
    reason = f"time limit of {limit_s:g} s passed{details}"
    return MessageTimeoutError(f"{tag}: worker {destination} received nothing from worker {source}: {reason}")
