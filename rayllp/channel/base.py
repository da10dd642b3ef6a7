"""How workers talk: the one interface, and the name that every message carries."""

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rayllp.errors import ChannelError, MessageTimeoutError
from rayllp.state import State, tensors


@dataclass(frozen=True)
class MessageTag:
    """What a message is, for errors: training step, solve ("forward", "adjoint", …), phase of the cycle, level."""

    step: int
    solve: str
    phase: str = ""
    level: int = 0

    def at(self, phase: str, level: int) -> "MessageTag":
        """The same solve, at a phase and level of its cycle."""
        return MessageTag(self.step, self.solve, phase, level)

    def __str__(self) -> str:
        return f"step {self.step}, {self.solve} {self.phase}, level {self.level}"


@dataclass(frozen=True)
class StateSpec:
    """Shapes and dtypes of a state's tensors, so that a receiver can make room."""

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    bare: bool = True  # a bare tensor rather than a tuple of one

    @staticmethod
    def of(state: State) -> "StateSpec":
        """That of a state at hand."""
        parts = tensors(state)
        return StateSpec(
            tuple(part.shape for part in parts), tuple(part.dtype for part in parts), parts[0].device, isinstance(state, Tensor)
        )

    def build(self, parts: list[Tensor]) -> State:
        """A state of these parts: a tensor where a single one is meant, else a tuple."""
        return parts[0] if self.bare else tuple(parts)

    def zeros(self) -> State:
        """A state of zeros."""
        parts = zip(self.shapes, self.dtypes, strict=True)
        return self.build([torch.zeros(shape, dtype=dtype, device=self.device) for shape, dtype in parts])


Leaving = Sequence[tuple[State, int]]
"""States, and the workers that they go to."""
Coming = Sequence[tuple[StateSpec, int]]
"""States that are to come, and the workers that they come from."""


class Reduction(Protocol):
    """A sum that was begun."""

    def wait(self) -> Tensor:
        """The tensor that was given, which the sum is in now.

        Raises:
            ChannelError: a worker did not take part within the time limit, or is gone.
        """
        ...


class Channel(Protocol):
    """Messages between the workers of one group. Messages from one worker to another arrive in the order sent.

    Attributes:
        sends_wait: whether what two workers issue to each other is carried out in that order, a send ending when the other has come to its
            receive, as NCCL does. Two workers that both send, then receive, would wait for ever: see `exchange`.
    """

    rank: int
    size: int
    sends_wait: bool

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        """Hand over `state`; returns at once. The state must not be changed afterwards."""
        ...

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        """Wait for the next state from `source`.

        Raises:
            ChannelError: it did not come within the time limit, or the sender is gone.
        """
        ...

    def exchange(self, leaving: Leaving, coming: Coming, tag: MessageTag) -> list[State]:
        """Send states to others and receive states from others at once; those received, in the order of `coming`.

        For workers that send to each other before either receives: where messages are carried out in the order in which they were issued
        (NCCL), each would wait for the other.
        """
        ...

    def arrived(self, spec: StateSpec, source: int) -> bool:
        """Whether the next state from `source` is there, so that `receive` would not wait. False where a channel cannot tell."""
        ...

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        """The sum of `tensor` over all workers, in place; the same bits on every worker."""
        ...

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> Reduction:
        """Begin to sum `tensor` over all workers, in place; returns at once. Until it was waited for it must be left alone.

        Several may be on their way. All workers begin, and wait for, the same ones in the same order.
        """
        ...

    def all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> list[State]:
        """Every worker's `state`, all of one spec, in order of the ranks; the own one is not copied.

        Raises:
            ChannelError: one of them did not come within the time limit, or a worker is gone.
        """
        ...

    def all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> list[Tensor]:
        """Part j of each worker to worker j: what this one is given, in order of the ranks.

        Args:
            parts: one for each worker, flat, all of one length and dtype on all workers.

        Raises:
            ChannelError: one of them did not come within the time limit, or a worker is gone.
        """
        ...

    def program(self, key: Hashable | None) -> AbstractContextManager[None]:
        """What is received inside is what was received inside the last time with this key: a channel may prepare for it. None: not so."""
        ...

    def finish(self) -> None:
        """Wait until everything sent has left, so that its memory can be used again.

        A channel may hold all that was sent until then: who sends on and on calls this where the receivers are known to be as far.
        """
        ...

    def close(self) -> None:
        """Give up the connection."""
        ...


class ChannelAround:
    """A channel that hands everything to another one: what does something besides overrides what it must."""

    def __init__(self, inner: Channel) -> None:
        self.inner = inner
        self.rank, self.size, self.sends_wait = inner.rank, inner.size, inner.sends_wait

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self.inner.send(state, destination, tag)

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        return self.inner.receive(spec, source, tag)

    def exchange(self, leaving: Leaving, coming: Coming, tag: MessageTag) -> list[State]:
        return self.inner.exchange(leaving, coming, tag)

    def arrived(self, spec: StateSpec, source: int) -> bool:
        return self.inner.arrived(spec, source)

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        return self.inner.all_reduce(tensor, tag)

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> Reduction:
        return self.inner.begin_all_reduce(tensor, tag)

    def all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> list[State]:
        return self.inner.all_gather(state, spec, tag)

    def all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> list[Tensor]:
        return self.inner.all_to_all(parts, tag)

    def program(self, key: Hashable | None) -> AbstractContextManager[None]:
        return self.inner.program(key)

    def finish(self) -> None:
        self.inner.finish()

    def close(self) -> None:
        self.inner.close()


def exchange_one_by_one(channel: Channel, leaving: Leaving, coming: Coming, tag: MessageTag) -> list[State]:
    """`Channel.exchange` where a message leaves whether or not its receiver waits for it."""
    for state, destination in leaving:
        channel.send(state, destination, tag)
    return [channel.receive(spec, source, tag) for spec, source in coming]


def schedules_differ(tag: MessageTag, sent: MessageTag, receiver: int, sender: int) -> ChannelError:
    """The error of a message that is another one than was waited for."""
    return ChannelError(f"worker {receiver} waits for {tag} from worker {sender}, which sent {sent}: the schedules differ")


def failure(tag: MessageTag, source: int, destination: int, reason: str) -> ChannelError:
    """The error of a message that did not arrive."""
    return ChannelError(f"{tag}: worker {destination} received nothing from worker {source}: {reason}")


def too_late(tag: MessageTag, source: int, destination: int, limit_s: float, details: str = "") -> MessageTimeoutError:
    """The error of a message that did not arrive in time."""
    reason = f"time limit of {limit_s:g} s passed{details}"
    return MessageTimeoutError(f"{tag}: worker {destination} received nothing from worker {source}: {reason}")
