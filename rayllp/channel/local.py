"""Workers as threads of one process, for tests and small studies. Time limits and order of messages are as between processes."""

import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from rayllp.channel.base import Coming, Leaving, MessageTag, StateSpec, exchange_one_by_one, schedules_differ, too_late
from rayllp.errors import ChannelError
from rayllp.state import State, detach

T = TypeVar("T")
LOOK_S = 0.2
"""Seconds between two checks whether another thread has failed."""


class _Queues(dict[tuple[int, int], Any]):
    """Queues by (sender, receiver). They are made when first asked for, since few of many workers talk to each other."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def __missing__(self, pair: tuple[int, int]) -> Any:
        with self._lock:
            return self.setdefault(pair, queue.SimpleQueue())


class _Hub:
    """What the channels of all threads share."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.queues = _Queues()
        self.sums = _Queues()
        self.barrier = threading.Barrier(size)
        self.slots: list[Tensor | None] = [None] * size
        self.states: list[State | None] = [None] * size
        self.parts: list[list[Tensor]] = [[] for _ in range(size)]


class LocalChannel:
    """One thread's channel to the other threads."""

    sends_wait = False

    def __init__(self, hub: _Hub, rank: int) -> None:
        self._hub, self.rank, self.size = hub, rank, hub.size

    @staticmethod
    def group(size: int, timeout_s: float = 30.0) -> list["LocalChannel"]:
        """Return the channels of `size` workers, in order of rank."""
        hub = _Hub(size, timeout_s)
        return [LocalChannel(hub, rank) for rank in range(size)]

    @staticmethod
    def alone() -> "LocalChannel":
        """Return the channel of a single worker."""
        return LocalChannel.group(1)[0]

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self._hub.queues[self.rank, destination].put((tag, detach(state)))

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        try:
            sent, state = self._hub.queues[source, self.rank].get(timeout=self._hub.timeout_s)
        except queue.Empty:
            raise too_late(tag, source, self.rank, self._hub.timeout_s) from None
        if sent != tag:
            raise schedules_differ(tag, sent, self.rank, source)
        return state

    def exchange(self, leaving: Leaving, coming: Coming, tag: MessageTag) -> list[State]:
        return exchange_one_by_one(self, leaving, coming, tag)

    def arrived(self, spec: StateSpec, source: int) -> bool:
        return not self._hub.queues[source, self.rank].empty()

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        hub = self._hub
        hub.slots[self.rank] = tensor.clone()
        self._meet(tag)
        total = torch.stack([slot for slot in hub.slots if slot is not None]).sum(0)
        self._meet(tag)
        return tensor.copy_(total)

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> "_LocalReduction":
        given = tensor.clone()
        for other in range(self.size):
            if other != self.rank:
                self._hub.sums[self.rank, other].put((tag, given))
        return _LocalReduction(self._hub, self.rank, tensor, tag)

    def all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> list[State]:
        hub = self._hub
        hub.states[self.rank] = detach(state)
        self._meet(tag)
        found = [other for other in hub.states if other is not None]
        self._meet(tag)
        return found

    def all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> list[Tensor]:
        hub = self._hub
        hub.parts[self.rank] = [part.clone() for part in parts]
        self._meet(tag)
        found = [theirs[self.rank] for theirs in hub.parts]
        self._meet(tag)
        return found

    def _meet(self, tag: MessageTag) -> None:
        """Wait until all workers have come to this point of a collective."""
        try:
            self._hub.barrier.wait(self._hub.timeout_s)
        except threading.BrokenBarrierError:
            raise ChannelError(
                f"{tag}: worker {self.rank} waited {self._hub.timeout_s:g} s for all {self.size} workers to meet in a collective"
            ) from None

    def program(self, key: Hashable | None) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self._hub.barrier.abort()


class _LocalReduction:
    """An all-reduce that is under way; this worker's share has been handed to the others."""

    def __init__(self, hub: _Hub, rank: int, tensor: Tensor, tag: MessageTag) -> None:
        self._hub, self._rank, self._tensor, self._tag = hub, rank, tensor, tag

    def wait(self) -> Tensor:
        shares = [self._tensor if other == self._rank else self._share(other) for other in range(self._hub.size)]
        return self._tensor.copy_(torch.stack(shares).sum(0))

    def _share(self, other: int) -> Tensor:
        """Wait for another worker's share of the sum."""
        deadline = time.monotonic() + self._hub.timeout_s
        while not self._hub.barrier.broken and time.monotonic() < deadline:
            try:
                sent, share = self._hub.sums[other, self._rank].get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if sent != self._tag:
                raise schedules_differ(self._tag, sent, self._rank, other)
            return share
        raise too_late(self._tag, other, self._rank, self._hub.timeout_s)


def run_workers(size: int, work: Callable[[LocalChannel], T], timeout_s: float = 30.0) -> list[T]:
    """Run `work` in `size` threads, each with its own channel, and return the results in order of rank.

    If threads fail, one of their errors is raised: not a ChannelError if there is another, since the loss of one worker fails all others.
    """
    channels = LocalChannel.group(size, timeout_s)

    def guarded(channel: LocalChannel) -> T:
        try:
            return work(channel)
        except BaseException:
            channel.close()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, channel) for channel in channels]
        errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise next((error for error in errors if not isinstance(error, ChannelError)), errors[0])
    return [future.result() for future in futures]
