"""A block's state in host memory, and a copy of it with the next worker: what a lost worker comes back from without a disk.

A state is one flat tensor: weights and the optimizer's moments, parameter by parameter, then step counts. Every worker keeps the last
two of its own and of the previous worker's. They travel in the background, over a process group of their own, and a step's exchange ends
with a small all-reduce: then that step is held everywhere, and an older one can be overwritten. So whatever moment a worker is lost
at, there is a step that all survivors and the lost worker's neighbour have.
"""

import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.engine import Engine
from rayllp.errors import ChannelError, ClusterError

KEPT = 2
PATIENCE_S, SLOWEST_BYTES_S = 30.0, 10e6
"""A state may be on its way for so long, and for as long as a link of 10 MB/s takes for it; a worker that is gone is noticed before."""


class Place(NamedTuple):
    """What a state has of a parameter.

    Attributes:
        moments: names of what the optimizer keeps of it, each of its shape.
    """

    name: str
    shape: tuple[int, ...]
    moments: tuple[str, ...]

    @property
    def size(self) -> int:
        """Numbers in the state, but for the step count."""
        return (1 + len(self.moments)) * math.prod(self.shape)


Layout = tuple[Place, ...]
"""A block's parameters, in the order in which a state has them."""


class BlockState:
    """Reads and writes a block's state as one flat tensor on the host, shape (size,), in the weights' dtype."""

    def __init__(self, engine: Engine) -> None:
        self.engine, optimizer = engine, engine.optimizer
        self.parameters: list[nn.Parameter] = list(engine.block.parameters.values())
        self.layout: Layout = tuple(Place(name, tuple(p.shape), optimizer.moments_of(p)) for name, p in engine.block.parameters.items())
        self.dtype = engine.block.dtype
        self.size = sum(place.size for place in self.layout) + len(self.parameters)

    def room(self) -> Tensor:
        """An empty flat tensor; where the block is on a GPU, in pinned memory."""
        return torch.empty(self.size, dtype=self.dtype, pin_memory=self.engine.device.type == "cuda")

    def take(self, into: Tensor) -> None:
        """Copy the block's state."""
        sources = [part for parameter, place in self._places() for part in self._parts(parameter, place)]
        torch._foreach_copy_([view for views in _views(into, self.layout) for view in views], sources, non_blocking=True)
        into[-len(self.parameters) :] = torch.tensor([self._count(p) for p in self.parameters], dtype=self.dtype)
        if self.engine.device.type == "cuda":
            torch.cuda.current_stream(self.engine.device).synchronize()

    def put(self, flat: Tensor) -> None:
        """Make the block what it was."""
        for (parameter, place), (value, moments, count) in zip(self._places(), parts_of(flat, self.layout), strict=True):
            self._put(parameter, place, value, moments, count)

    def gather(self, states: Sequence[tuple[Layout, Tensor]]) -> None:
        """Make the block what it was when its layers were shared out otherwise.

        Args:
            states: of the blocks that had them, each with its layout.

        Raises:
            ClusterError: a parameter is in none of them.
        """
        tied = self.engine.block.architecture.tied_to
        known = {
            place.name: (place.shape, part) for layout, state in states for place, part in zip(layout, parts_of(state, layout), strict=True)
        }
        for parameter, place in self._places():
            shape, part = known.get(place.name, known.get(tied.get(place.name, place.name), (None, None)))
            if part is None or shape != place.shape:
                raise ClusterError(f"{place.name} {place.shape} is not in the states of the workers that had this block's layers")
            self._put(parameter, place, *part)

    def _places(self) -> Iterator[tuple[nn.Parameter, Place]]:
        return zip(self.parameters, self.layout, strict=True)

    def _put(self, parameter: nn.Parameter, place: Place, value: Tensor, moments: list[Tensor], count: float) -> None:
        parameter.data.copy_(value)
        kept = dict(zip(place.moments, moments, strict=True))
        if self.engine.optimizer.counts_steps(parameter):
            kept["step"] = torch.tensor(count)
        self.engine.optimizer.set_state(parameter, kept if count else {})  # before the first step the optimizer has no state

    def _parts(self, parameter: nn.Parameter, place: Place) -> list[Tensor]:
        state = self.engine.optimizer.state_of(parameter)
        return [parameter.data, *(state[name] if name in state else torch.zeros_like(parameter.data) for name in place.moments)]

    def _count(self, parameter: nn.Parameter) -> float:
        """Steps that the optimizer has done; of one that does not count them, 1 once it has done any."""
        state = self.engine.optimizer.state_of(parameter)
        return float(state.get("step", bool(state)))


def parts_of(state: Tensor, layout: Layout) -> list[tuple[Tensor, list[Tensor], float]]:
    """Value, moments and step count of each parameter in a state."""
    counts = state[len(state) - len(layout) :].tolist()
    return [(value, moments, count) for (value, *moments), count in zip(_views(state, layout), counts, strict=True)]


def _views(state: Tensor, layout: Layout) -> Iterator[list[Tensor]]:
    """Of each parameter, the views of its weights and of its moments."""
    start = 0
    for place in layout:
        yield list(state[start : start + place.size].view(-1, *place.shape).unbind())
        start += place.size


@dataclass
class Inventory:
    """Steps whose state a worker holds: its own, and the previous worker's."""

    own: tuple[int, ...]
    neighbours: tuple[int, ...]


class NeighbourCopies:
    """Keeps the last states of a block, and of the block before it, in host memory.

    Args:
        connect: a channel to the other blocks of the same replica, used by nothing else, whose messages may take so many seconds; None:
            own states only, where another replica has the same.
        before: what kept them until the workers' connections broke; its states are taken over.
        offset: copies go to the worker so many blocks on (`copy_offset`).

    Attributes:
        seconds: that the last state took to take, on the training thread, and to exchange, in the background.
    """

    def __init__(
        self, engine: Engine, connect: Callable[[float], Channel | None], before: "NeighbourCopies | None" = None, offset: int = 1
    ) -> None:
        self.state = BlockState(engine)
        self._connect = connect
        channel = connect(PATIENCE_S)
        self.channel = channel if channel is not None and channel.size > 1 else None
        self.offset = offset
        self._own: dict[int, Tensor] = {} if before is None else before._own
        self._neighbours: dict[int, Tensor] = {} if before is None else before._neighbours
        self._spare: list[Tensor] = []
        self._lock = threading.Lock()
        self._idle = threading.Event()
        self._idle.set()
        self._failure: Exception | None = None
        self._work: queue.Queue[int | None] = queue.Queue()
        self.seconds = (0.0, 0.0)
        self._sizes: list[int] = []
        if self.channel is not None:
            threading.Thread(target=self._exchange_all, daemon=True, name="copies").start()

    def take(self, step: int) -> None:
        """Keep the state that `step` steps have made; its copy goes to the next worker while training goes on.

        Raises:
            ChannelError: the copy of the step before could not be exchanged: a worker is gone.
        """
        self._idle.wait()
        if self._failure is not None:
            raise ChannelError(f"step {step}: the neighbour's copy did not arrive: {self._failure}") from self._failure
        started = time.perf_counter()
        room = self._spare.pop() if self._spare else self.state.room()
        self.state.take(room)
        with self._lock:
            self._own[step] = room
        self.seconds = time.perf_counter() - started, self.seconds[1]
        if self.channel is None:
            self._forget_before(min(sorted(self._own)[-KEPT:]))
        else:
            self._idle.clear()
            self._work.put(step)

    def inventory(self) -> Inventory:
        """The steps whose states are held, one's own and the neighbour's."""
        with self._lock:
            return Inventory(tuple(sorted(self._own)), tuple(sorted(self._neighbours)))

    def roll_back(self, step: int) -> None:
        """Make the block what it was after `step` steps."""
        self.state.put(self._own[step])

    def give(self, step: int, *, neighbour: bool) -> Tensor:
        """The state after `step` steps of the previous worker, or of this block."""
        return (self._neighbours if neighbour else self._own)[step]

    def adopt(self, state: Tensor) -> None:
        """Make the block what `state` says.

        Raises:
            ClusterError: it is of another block.
        """
        if state.shape != (self.state.size,) or state.dtype != self.state.dtype:
            raise ClusterError(f"a state of {tuple(state.shape)} {state.dtype} for a block of {self.state.size} {self.state.dtype} numbers")
        self.state.put(state)

    def wait(self) -> None:
        """Until the last state is held everywhere, or cannot be."""
        self._idle.wait()

    def close(self) -> None:
        """End the background thread, once its exchange ends or fails, and let go of the connections."""
        self._work.put(None)
        with self._lock:
            self.channel = None

    def _exchange_all(self) -> None:
        while (step := self._work.get()) is not None:
            started = time.perf_counter()
            try:
                self._exchange(step)
                self.seconds = self.seconds[0], time.perf_counter() - started
            except Exception as error:  # a worker is gone: whoever calls next is told, and what is held stays
                traceback.clear_frames(error.__traceback__)  # what they hold would keep the connections open, and others waiting
                self._failure = error.with_traceback(None)
            self._idle.set()

    def _exchange(self, step: int) -> None:
        channel, tag = self.channel, MessageTag(step, "copies")
        assert channel is not None
        if not self._sizes:
            sizes = torch.zeros(channel.size, dtype=torch.float64)
            sizes[channel.rank] = self.state.size
            self._sizes = [int(size) for size in channel.all_reduce(sizes, tag).tolist()]
            channel = self._connect(PATIENCE_S + max(self._sizes) * self.state.dtype.itemsize / SLOWEST_BYTES_S)
            assert channel is not None
            with self._lock:
                self.channel = self.channel and channel  # it may have been closed meanwhile
        before = (channel.rank - self.offset) % channel.size
        spec = StateSpec((torch.Size((self._sizes[before],)),), (self.state.dtype,), torch.device("cpu"))
        (received,) = channel.exchange([(self._own[step], (channel.rank + self.offset) % channel.size)], [(spec, before)], tag)
        assert isinstance(received, Tensor)
        with self._lock:
            self._neighbours[step] = received
        channel.finish()
        channel.all_reduce(torch.zeros(1), tag)  # all have it: older ones are of no use any more
        self._forget_before(step)

    def _forget_before(self, step: int) -> None:
        with self._lock:
            for old in [kept for kept in self._own if kept < step]:
                self._spare.append(self._own.pop(old))
            for old in [kept for kept in self._neighbours if kept < step]:
                del self._neighbours[old]


def copy_offset(nodes: Sequence[str]) -> int:
    """How many blocks on a worker's copy goes, so that a lost node takes no state with both its holders; 1 where all are on one node.

    Args:
        nodes: of the workers, in the order of their blocks.
    """
    count = len(nodes)
    apart = (n for n in range(1, count) if all(nodes[rank] != nodes[(rank + n) % count] for rank in range(count)))
    return next(apart, 1)


def common_step(inventories: dict[int, Inventory], lost: set[int], blocks: int, offset: int = 1) -> int | None:
    """The last step that all survivors, and a holder of each lost worker's state, have; None: there is none.

    Args:
        inventories: of the survivors, by rank (replica · blocks + block).
        lost: ranks of the others.
        offset: where copies go.
    """
    steps = set.intersection(*(set(found.own) for found in inventories.values()))
    for rank in lost:
        steps &= {step for _, _, held in _holders(rank, inventories, blocks, offset) for step in held}
    return max(steps, default=None)


def holder_of(rank: int, step: int, inventories: dict[int, Inventory], blocks: int, offset: int = 1) -> tuple[int, bool]:
    """Who has a lost worker's state after `step` steps, and whether as the next worker (else as a replica)."""
    return next((holder, neighbour) for holder, neighbour, held in _holders(rank, inventories, blocks, offset) if step in held)


def _holders(rank: int, inventories: dict[int, Inventory], blocks: int, offset: int) -> list[tuple[int, bool, tuple[int, ...]]]:
    """Survivors that have states of a lost worker: replicas, then the next worker; whether as the latter, and of which steps."""
    found = [(other, False, held.own) for other, held in inventories.items() if other % blocks == rank % blocks]
    after = rank // blocks * blocks + (rank + offset) % blocks
    return [*found, (after, True, inventories[after].neighbours)] if after in inventories else found
