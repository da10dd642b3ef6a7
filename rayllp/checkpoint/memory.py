"""States of blocks in host memory, and copies of them on other workers, from which a run recovers lost workers without a disk.

Every worker keeps its own last state and a copy of another worker's last state; while newer ones are exchanged, it keeps the older ones,
too. The exchange runs in the background, over a process group of its own. It ends with a small all-reduce, after which all workers have the
new states and can drop the old ones. So whenever a worker is lost, there is a step of which all survivors have their own states and one of
them has a copy of the lost worker's.

With replicas every block is on several workers, and nothing is copied. If the optimizer's state is sharded over the replicas, each worker
copies its share to another replica.
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
"""Number of states that a worker keeps if it exchanges no copies."""
PATIENCE_S, SLOWEST_BYTES_S = 30.0, 10e6
"""Time limit of an exchange: 30 s, plus the time that the largest state takes over a link of 10 MB/s. Lost workers are noticed earlier."""


@dataclass
class Inventory:
    """The steps of which a worker holds its own state, and those of which it holds a copy of another worker's."""

    own: tuple[int, ...]
    neighbours: tuple[int, ...]


class HeldStates:
    """Keeps the last states of a worker, and copies of another worker's, in host memory.

    Args:
        engine: the engine whose block's states are kept.
        connect: returns a channel to all workers, given the time limit of its messages in seconds; nothing else uses this channel. It
            returns None if another replica has the same states, so that no copies are needed.
        predecessor: the worker's HeldStates from before the workers were connected anew; its states are taken over.
        offset: copies go from rank r to rank r + offset.

    Attributes:
        seconds: time to take the last state, on the training thread, and time to exchange it, in the background.
    """

    def __init__(
        self, engine: Engine, connect: Callable[[float], Channel | None], predecessor: "HeldStates | None" = None, offset: int = 1
    ) -> None:
        self.state = BlockState(engine)
        self._connect = connect
        channel = connect(PATIENCE_S)
        self.channel = channel if channel is not None and channel.size > 1 else None
        self.offset = offset
        self._own: dict[int, Tensor] = {} if predecessor is None else predecessor._own
        self._neighbours: dict[int, Tensor] = {} if predecessor is None else predecessor._neighbours
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

    def keep(self, step: int) -> None:
        """Keep the current state, after `step` steps; its copy is sent in the background.

        Raises:
            ChannelError: the previous state's copy could not be exchanged, because a worker is gone.
        """
        self._idle.wait()
        if self._failure is not None:
            raise ChannelError(f"step {step}: the neighbour's copy did not arrive: {self._failure}") from self._failure
        started = time.perf_counter()
        buffer = self._spare.pop() if self._spare else self.state.new_buffer()
        self.state.copy_into(buffer)
        with self._lock:
            self._own[step] = buffer
        self.seconds = time.perf_counter() - started, self.seconds[1]
        if self.channel is None:
            self._forget_before(min(sorted(self._own)[-KEPT:]))
        else:
            self._idle.clear()
            self._work.put(step)

    def inventory(self) -> Inventory:
        """Return the steps whose states are held: this worker's own, and the copies."""
        with self._lock:
            return Inventory(tuple(sorted(self._own)), tuple(sorted(self._neighbours)))

    def restore(self, step: int) -> None:
        """Restore this worker's own state after `step` steps."""
        self.state.restore(self._own[step])

    def give(self, step: int, *, neighbour: bool, weights: bool = True) -> Tensor:
        """Return the state after `step` steps: the copy of another worker's, or this worker's own, with or without its weights."""
        if neighbour:
            return self._neighbours[step]
        state = self._own[step]
        return state if weights else state[self.state.copied].clone()  # a copy, since sending a view would send the whole tensor

    def wait(self) -> None:
        """Wait until all workers hold the last state, or the exchange has failed."""
        self._idle.wait()

    def close(self) -> None:
        """End the background thread once its exchange ends or fails, and drop the connections. States are kept."""
        self._work.put(None)
        with self._lock:
            self.channel = None

    def _exchange_all(self) -> None:
        while (step := self._work.get()) is not None:
            started = time.perf_counter()
            try:
                self._exchange(step)
                self.seconds = self.seconds[0], time.perf_counter() - started
            except Exception as error:  # a worker is gone: the next call of `keep` says so, and held states stay
                traceback.clear_frames(error.__traceback__)  # frames would keep connections open, and others waiting
                self._failure = error.with_traceback(None)
            self._idle.set()

    def _exchange(self, step: int) -> None:
        channel, tag = self.channel, MessageTag(step, "copies")
        assert channel is not None
        outgoing = self._own[step][self.state.copied]
        if not self._sizes:
            sizes = torch.zeros(channel.size, dtype=torch.float64)
            sizes[channel.rank] = len(outgoing)
            self._sizes = [int(size) for size in channel.all_reduce(sizes, tag).tolist()]
            channel = self._connect(PATIENCE_S + max(self._sizes) * self.state.dtype.itemsize / SLOWEST_BYTES_S)
            assert channel is not None
            with self._lock:
                self.channel = self.channel and channel  # it may have been closed meanwhile
        sender, receiver = ((channel.rank + shift) % channel.size for shift in (-self.offset, self.offset))
        spec = StateSpec((torch.Size((self._sizes[sender],)),), (self.state.dtype,), torch.device("cpu"))
        (received,) = channel.exchange([(outgoing, receiver)], [(spec, sender)], tag)
        assert isinstance(received, Tensor)
        with self._lock:
            self._neighbours[step] = received
        channel.finish()
        channel.all_reduce(torch.zeros(1), tag)  # all workers have this state: older ones can be dropped
        self._forget_before(step)

    def _forget_before(self, step: int) -> None:
        with self._lock:
            for old in [held for held in self._own if held < step]:
                self._spare.append(self._own.pop(old))
            for old in [held for held in self._neighbours if held < step]:
                del self._neighbours[old]


class Source(NamedTuple):
    """A state that a survivor can give.

    Attributes:
        holder: rank of the worker that has it.
        owner: rank of the worker whose state it is.
        has_weights: False if it is given without its weights, because another source gives the same ones.
    """

    holder: int
    owner: int
    has_weights: bool = True

    @property
    def is_copy(self) -> bool:
        """True if the holder has a copy of another worker's state."""
        return self.holder != self.owner


@dataclass(frozen=True, kw_only=True)
class CopyPlacement:
    """Which worker holds which states. Ranks are replica · blocks + block.

    Attributes:
        blocks: number of workers of a replica.
        replicas: number of replicas, all of which have the same weights.
        sharded: True if the optimizer's state is sharded over the replicas.
        offset: copies go from rank r to rank r + offset. If sharded, that worker has the same block in another replica.
    """

    blocks: int
    replicas: int = 1
    sharded: bool = False
    offset: int = 1

    @staticmethod
    def of(config: TrainConfig, nodes: Sequence[str]) -> "CopyPlacement":
        """Return the placement of copies for a run.

        Args:
            nodes: the workers' nodes, by rank.
        """
        blocks, sharded = config.layer_workers, config.shards_optimizer
        offset = copy_offset(nodes, blocks if sharded else 1)
        return CopyPlacement(blocks=blocks, replicas=config.mesh.data, sharded=sharded, offset=offset)

    def sources(self, rank: int, step: int, held: Mapping[int, Inventory]) -> list[Source] | None:
        """Return the sources of a worker's state after `step` steps; None if a part of it is lost.

        Args:
            held: what each survivor holds, by rank.
        """
        survivors = {other for other, inventory in held.items() if step in inventory.own}
        if rank in survivors:
            return [Source(rank, rank)]
        replica = next((Source(other, other) for other in sorted(survivors) if other % self.blocks == rank % self.blocks), None)
        holder = (rank + self.offset) % (self.blocks * self.replicas)
        copy = Source(holder, rank, not self.sharded) if holder in held and step in held[holder].neighbours else None
        needed = [replica, copy] if self.sharded else [copy if self.replicas == 1 else replica]
        return None if None in needed else [source for source in needed if source is not None]

    def sources_of_all(self, step: int, held: Mapping[int, Inventory]) -> list[Source] | None:
        """Return the sources of all blocks' states after `step` steps, with each weight once; None if a part is lost."""
        ranks = range(self.blocks * (self.replicas if self.sharded else 1))
        by_rank = [self.sources(rank, step, held) for rank in ranks]
        if None in by_rank:
            return None
        weights_from: dict[int, Source] = {}  # by block
        chosen = sorted({source for sources in by_rank for source in sources or ()})
        for source in chosen:
            if source.has_weights:
                weights_from.setdefault(source.owner % self.blocks, source)
        return [source._replace(has_weights=source in weights_from.values()) for source in chosen]

    def common_step(self, held: Mapping[int, Inventory]) -> int | None:
        """Return the last step that all survivors have and of which no state is lost; None if there is none."""
        steps = set.intersection(*(set(inventory.own) for inventory in held.values()))
        return max((step for step in steps if self.sources_of_all(step, held) is not None), default=None)


def copy_offset(nodes: Sequence[str], stride: int = 1) -> int:
    """Return by how many ranks copies are shifted, so that no state is on the same node as its copy.

    Args:
        nodes: the workers' nodes, by rank.
        stride: the result is a multiple of this, and equals it if no shift separates all states from their copies.
    """
    count = len(nodes)
    apart = (n for n in range(stride, count, stride) if all(nodes[rank] != nodes[(rank + n) % count] for rank in range(count)))
    return next(apart, stride)
