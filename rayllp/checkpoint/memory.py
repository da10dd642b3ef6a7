"""A block's state in host memory, and a copy of it with the next worker: what a lost worker comes back from without a disk.

Every worker keeps the last two of its own and of the previous worker's. They travel in the background, over a process group of their own,
and a step's exchange ends with a small all-reduce: then that step is held everywhere, and an older one can be overwritten. So whatever
moment a worker is lost at, there is a step that all survivors and the lost worker's neighbour have.

With replicas every block is on several workers, and nothing is copied; but where these share out the optimizer's state, each has the next
one's share.
"""

import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.checkpoint.states import BlockState
from rayllp.config import TrainConfig
from rayllp.engine import Engine
from rayllp.errors import ChannelError

KEPT = 2
PATIENCE_S, SLOWEST_BYTES_S = 30.0, 10e6
"""A state may be on its way for so long, and for as long as a link of 10 MB/s takes for it; a worker that is gone is noticed before."""


@dataclass
class Inventory:
    """Steps whose state a worker holds: its own, and the previous worker's."""

    own: tuple[int, ...]
    neighbours: tuple[int, ...]


class NeighbourCopies:
    """Keeps the last states of a worker, and copies of those of one before it, in host memory.

    Args:
        connect: a channel to all workers, used by nothing else, whose messages may take so many seconds; None: own states only, where
            another replica has the same.
        before: what kept them until the workers' connections broke; its states are taken over.
        offset: copies go to the worker so many ranks on.

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

    def give(self, step: int, *, neighbour: bool, weights: bool = True) -> Tensor:
        """The copy of another worker's state after `step` steps, or the own one; without weights what is behind them."""
        if neighbour:
            return self._neighbours[step]
        state = self._own[step]
        return state if weights else state[self.state.copied].clone()  # a view would be sent with all that it is a view of

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
        leaving = self._own[step][self.state.copied]
        if not self._sizes:
            sizes = torch.zeros(channel.size, dtype=torch.float64)
            sizes[channel.rank] = len(leaving)
            self._sizes = [int(size) for size in channel.all_reduce(sizes, tag).tolist()]
            channel = self._connect(PATIENCE_S + max(self._sizes) * self.state.dtype.itemsize / SLOWEST_BYTES_S)
            assert channel is not None
            with self._lock:
                self.channel = self.channel and channel  # it may have been closed meanwhile
        before = (channel.rank - self.offset) % channel.size
        spec = StateSpec((torch.Size((self._sizes[before],)),), (self.state.dtype,), torch.device("cpu"))
        (received,) = channel.exchange([(leaving, (channel.rank + self.offset) % channel.size)], [(spec, before)], tag)
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


class Source(NamedTuple):
    """A state that a survivor can give.

    Attributes:
        holder: who has it.
        owner: whose it is; another one's than the holder's is a copy.
        has_weights: False: what is given is behind the weights, which somebody else gives.
    """

    holder: int
    owner: int
    has_weights: bool = True

    @property
    def is_copy(self) -> bool:
        """Whether the holder has it as another worker's."""
        return self.holder != self.owner


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Which worker holds what, by rank (replica · blocks + block).

    Attributes:
        blocks: workers of a replica.
        replicas: how many there are; each has the same weights.
        sharded: whether the optimizer's state is shared out among them.
        offset: a worker's copy goes to the one so many ranks on; sharded, that has the same block in another replica.
    """

    blocks: int
    replicas: int = 1
    sharded: bool = False
    offset: int = 1

    @staticmethod
    def of(config: TrainConfig, nodes: Sequence[str]) -> "Copies":
        """Those of a run whose workers, by rank, are on these nodes."""
        blocks, sharded = config.layer_workers, config.shards_optimizer
        offset = copy_offset(nodes, blocks if sharded else 1)
        return Copies(blocks=blocks, replicas=config.mesh.data, sharded=sharded, offset=offset)

    def sources(self, rank: int, step: int, held: Mapping[int, Inventory]) -> list[Source] | None:
        """What makes up a worker's state after `step` steps; None: something of it is lost.

        Args:
            held: by the survivors.
        """
        own = {other for other, found in held.items() if step in found.own}
        if rank in own:
            return [Source(rank, rank)]
        replica = next((Source(other, other) for other in sorted(own) if other % self.blocks == rank % self.blocks), None)
        holder = (rank + self.offset) % (self.blocks * self.replicas)
        copy = Source(holder, rank, not self.sharded) if holder in held and step in held[holder].neighbours else None
        wanted = [replica, copy] if self.sharded else [copy if self.replicas == 1 else replica]
        return None if None in wanted else [source for source in wanted if source is not None]

    def sources_of_all(self, step: int, held: Mapping[int, Inventory]) -> list[Source] | None:
        """What makes up all blocks' states."""
        wanted = range(self.blocks * (self.replicas if self.sharded else 1))
        found = [self.sources(rank, step, held) for rank in wanted]
        if None in found:
            return None
        first: dict[int, Source] = {}  # of each block, to give its weights
        chosen = sorted({source for sources in found for source in sources or ()})
        for source in chosen:
            if source.has_weights:
                first.setdefault(source.owner % self.blocks, source)
        return [source._replace(has_weights=source in first.values()) for source in chosen]

    def common_step(self, held: Mapping[int, Inventory]) -> int | None:
        """The last step that all survivors have, and of which no state is lost; None: there is none."""
        steps = set.intersection(*(set(found.own) for found in held.values()))
        return max((step for step in steps if self.sources_of_all(step, held) is not None), default=None)


def copy_offset(nodes: Sequence[str], stride: int = 1) -> int:
    """How many ranks on a worker's copy goes, so that a lost node takes no state with both its holders; `stride` where that cannot be.

    Args:
        nodes: of the workers, by rank.
        stride: a multiple of it.
    """
    count = len(nodes)
    apart = (n for n in range(stride, count, stride) if all(nodes[rank] != nodes[(rank + n) % count] for rank in range(count)))
    return next(apart, stride)
