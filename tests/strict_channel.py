"""Workers as threads whose messages keep NCCL's rules, so that tests without GPUs find what would hang between GPUs.

What a worker issues to one communicator is carried out in that order, one after the other: a send ends when its receiver has come to the
matching receive. What is issued together (`exchange`) proceeds together. A receive waits, since what is computed next needs it; a send does
not. When no worker can go on, each is told at once what all of them wait for.

torch.distributed has a communicator for each pair of workers, and one of all for what is issued together and for collective operations. The
strictest rule is one communicator for everything.

https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/p2p.html
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, Pending, Receives, Sends, StateSpec, unexpected_message
from rayllp.errors import ChannelError
from rayllp.state import State, combine

T = TypeVar("T")


@dataclass(eq=False)
class Part:
    """One of the messages that were issued together, or this worker's part of a collective operation."""

    kind: str  # "send", "receive", or the operation's name
    peer: int | None
    tag: MessageTag
    given: Any = None
    found: Any = None
    done: bool = False

    def __str__(self) -> str:
        to = {"send": f" to worker {self.peer}", "receive": f" from worker {self.peer}"}.get(self.kind, "")
        return f"{self.kind}{to} ({self.tag})"


@dataclass
class World:
    """All groups of channels of one test. It sees when no worker can go on."""

    size: int
    pairs: bool = True  # as torch has it; else one communicator for everything
    condition: threading.Condition = field(default_factory=threading.Condition)
    groups: list["Group"] = field(default_factory=list)
    stuck: set[int] = field(default_factory=set)  # workers that wait, or have ended
    failure: str | None = None

    def group(self, ranks: Sequence[int]) -> list["StrictChannel"]:
        """Return channels between these workers, in this order."""
        made = Group(self, tuple(ranks), [defaultdict(deque) for _ in ranks])
        self.groups.append(made)
        return [StrictChannel(made, rank) for rank in range(len(ranks))]

    def wait(self, worker: int, parts: Sequence[Part]) -> None:
        """Wait until these operations are done."""
        with self.condition:
            while not all(part.done for part in parts):
                if self.failure is None:
                    self.stuck.add(worker)
                    self.check()
                if self.failure is not None:
                    raise ChannelError(self.failure)
                self.condition.wait(timeout=30)
            self.stuck.discard(worker)

    def check(self) -> None:
        if (
            len(self.stuck) == self.size
            and self.failure is None
            and any(line for group in self.groups for lines in group.lines for line in lines.values())
        ):
            waits = [
                f"worker {group.ranks[rank]}: {', '.join(map(str, (part for part in line[0] if not part.done)))}"
                for group in self.groups
                for rank, lines in enumerate(group.lines)
                for line in lines.values()
                if line
            ]
            self.failure = "nobody can go on: " + "; ".join(waits)
            self.condition.notify_all()

    def end(self, worker: int, failure: BaseException | None = None) -> None:
        """Note that this worker issues nothing any more."""
        with self.condition:
            self.stuck.add(worker)
            if failure is not None and self.failure is None:
                self.failure = f"worker {worker} failed: {failure!r}"
                self.condition.notify_all()
            self.check()


@dataclass
class Group:
    """What the channels of one communicator share: for each worker, the operations that it has issued and that are not done."""

    world: World
    ranks: tuple[int, ...]
    lines: list[dict[int | None, deque[list[Part]]]]  # of each worker, by the other one of the pair; None: of all

    def issue(self, rank: int, parts: list[Part], peer: int | None = None) -> list[Part]:
        with self.world.condition:
            self.lines[rank][peer if self.world.pairs else None].append(parts)
            self._go_on()
        return parts

    def _go_on(self) -> None:
        """Carry out whatever can be."""
        moved = True
        while moved:
            moved = any([*(self._meet(rank, peer) for rank, lines in enumerate(self.lines) for peer in list(lines)), self._gather()])
            for line in (line for lines in self.lines for line in lines.values()):
                while line and all(part.done for part in line[0]):
                    line.popleft()
                    moved = True
            if moved:
                self.world.stuck.clear()  # whoever waits looks again
                self.world.condition.notify_all()

    def _meet(self, rank: int, peer: int | None) -> bool:
        """Match sends at the head of one worker's queue with receives at the head of another's."""
        moved = False
        for part in _head(self.lines[rank][peer]):
            if part.kind != "send" or part.done:
                continue
            others = _head(self.lines[part.peer][None if peer is None else rank])
            match = next((other for other in others if (other.kind, other.peer, other.done) == ("receive", rank, False)), None)
            if match is None:
                continue
            if match.tag != part.tag:
                self.world.failure = self.world.failure or str(unexpected_message(match.tag, part.tag, part.peer, rank))
                return False
            match.found = detach_copy(part.given)
            part.done = match.done = moved = True
        return moved

    def _gather(self) -> bool:
        """Carry out a collective operation that all workers have come to."""
        heads = [head[0] if len(head := _head(lines[None])) == 1 else None for lines in self.lines]
        first = heads[0]
        if first is None or first.kind in ("send", "receive") or any(head is None or head.kind != first.kind for head in heads):
            return False
        given = [head.given for head in heads if head is not None]
        for rank, head in enumerate(heads):
            assert head is not None
            if head.kind == "all_reduce":
                head.found = torch.stack(given).sum(0)
            else:
                head.found = [detach_copy(state) for state in given] if head.kind == "all_gather" else [row[rank].clone() for row in given]
            head.done = True
        return True


def _head(line: deque[list[Part]]) -> list[Part]:
    return line[0] if line else []


def detach_copy(state: State) -> State:
    return combine(lambda part: part.detach().clone(), state)


class StrictChannel(Channel):
    """One worker's end of a communicator."""

    synchronous_sends = True

    def __init__(self, group: Group, rank: int) -> None:
        self._group, self.rank, self.size = group, rank, len(group.ranks)

    def _wait(self, parts: Sequence[Part]) -> None:
        self._group.world.wait(self._group.ranks[self.rank], parts)

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self._group.issue(self.rank, [Part("send", destination, tag, state)], destination)

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        (part,) = parts = self._group.issue(self.rank, [Part("receive", source, tag)], source)
        self._wait(parts)
        return part.found

    def exchange(self, sends: Sends, receives: Receives, tag: MessageTag) -> list[State]:
        outgoing = [Part("send", destination, tag, state) for state, destination in sends]
        incoming = [Part("receive", source, tag) for _, source in receives]
        if outgoing or incoming:
            self._wait(self._group.issue(self.rank, [*outgoing, *incoming]))
        return [part.found for part in incoming]

    def _together(self, kind: str, given: Any, tag: MessageTag) -> Callable[[], Any]:
        (part,) = parts = self._group.issue(self.rank, [Part(kind, None, tag, given)])

        def end() -> Any:
            self._wait(parts)
            return part.found

        return end

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> Pending[Tensor]:
        end = self._together("all_reduce", tensor.clone(), tag)
        return lambda: tensor.copy_(end())

    def begin_all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> Pending[list[State]]:
        return self._together("all_gather", state, tag)

    def begin_all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> Pending[list[Tensor]]:
        return self._together("all_to_all", list(parts), tag)

    def finish(self) -> None:
        with self._group.world.condition:
            parts = [part for line in self._group.lines[self.rank].values() for issued in line for part in issued]
        self._wait(parts)


def run_strictly(size: int, work: Callable[[StrictChannel], T], *, pairs: bool = True) -> list[T]:
    """Run workers as `run_workers` does, with NCCL's rules; a message that nobody receives is an error.

    Args:
        pairs: False: one communicator for everything.
    """
    world = World(size, pairs)

    def guarded(channel: StrictChannel) -> T:
        try:
            found = work(channel)
            channel.finish()
        except BaseException as error:
            world.end(channel.rank, error)
            raise
        world.end(channel.rank)
        return found

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, channel) for channel in world.group(range(size))]
        errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise next((error for error in errors if not isinstance(error, ChannelError)), errors[0])
    return [future.result() for future in futures]
