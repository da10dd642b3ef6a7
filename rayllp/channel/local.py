"""Workers as threads of one process, for tests and small studies. Time limits and order of messages are as between processes."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec, timed_out, unexpected_message
from rayllp.errors import ChannelError
from rayllp.state import State, detach

T = TypeVar("T")
POLL_S = 0.2
"""Seconds between two checks whether another thread has failed."""


class _Queues(dict[tuple[int, int], Any]):
    """Queues by (sender, receiver), each made on first use: of many workers, few pairs talk to each other."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def __missing__(self, pair: tuple[int, int]) -> Any:
        with self._lock:
            return self.setdefault(pair, queue.SimpleQueue())


class _Shared:
    """What the channels of all threads share."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.queues = _Queues()
        self.sums = _Queues()
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size


class LocalChannel(Channel):
    """One thread's channel to the other threads."""

    def __init__(self, shared: _Shared, rank: int) -> None:
        self._shared, self.rank, self.size = shared, rank, shared.size

    @staticmethod
    def group(size: int, timeout_s: float = 30.0) -> list["LocalChannel"]:
        """Return the channels of `size` workers, in order of rank."""
        shared = _Shared(size, timeout_s)
        return [LocalChannel(shared, rank) for rank in range(size)]

    @staticmethod
    def alone() -> "LocalChannel":
        """Return the channel of a single worker."""
        return LocalChannel.group(1)[0]

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self._shared.queues[self.rank, destination].put((tag, detach(state)))

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        try:
            sent, state = self._shared.queues[source, self.rank].get(timeout=self._shared.timeout_s)
        except queue.Empty:
            raise timed_out(tag, source, self.rank, self._shared.timeout_s) from None
        if sent != tag:
            raise unexpected_message(tag, sent, self.rank, source)
        return state

    def arrived(self, spec: StateSpec, source: int) -> bool:
        return not self._shared.queues[source, self.rank].empty()

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> "_LocalReduction":
        given = tensor.clone()
        for other in range(self.size):
            if other != self.rank:
                self._shared.sums[self.rank, other].put((tag, given))
        return _LocalReduction(self._shared, self.rank, tensor, tag)

    def all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> list[State]:
        return self._share(detach(state), tag)

    def all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> list[Tensor]:
        return [theirs[self.rank] for theirs in self._share([part.clone() for part in parts], tag)]

    def _share(self, value: T, tag: MessageTag) -> list[T]:
        """Return the value that each worker brings to this collective, in order of rank."""
        shared = self._shared
        shared.slots[self.rank] = value
        self._barrier(tag)
        found = list(shared.slots)
        self._barrier(tag)
        return found

    def _barrier(self, tag: MessageTag) -> None:
        """Wait until all workers have come to this point of a collective."""
        try:
            self._shared.barrier.wait(self._shared.timeout_s)
        except threading.BrokenBarrierError:
            raise ChannelError(
                f"{tag}: worker {self.rank} waited {self._shared.timeout_s:g} s for all {self.size} workers to meet in a collective"
            ) from None

    def close(self) -> None:
        self._shared.barrier.abort()


class _LocalReduction:
    """An all-reduce that is under way; this worker's share has been handed to the others."""

    def __init__(self, shared: _Shared, rank: int, tensor: Tensor, tag: MessageTag) -> None:
        self._shared, self._rank, self._tensor, self._tag = shared, rank, tensor, tag

    def wait(self) -> Tensor:
        shares = [self._tensor if other == self._rank else self._share(other) for other in range(self._shared.size)]
        return self._tensor.copy_(torch.stack(shares).sum(0))

    def _share(self, other: int) -> Tensor:
        """Wait for another worker's share of the sum."""
        deadline = time.monotonic() + self._shared.timeout_s
        while not self._shared.barrier.broken and time.monotonic() < deadline:
            try:
                sent, share = self._shared.sums[other, self._rank].get(timeout=POLL_S)
            except queue.Empty:
                continue
            if sent != self._tag:
                raise unexpected_message(self._tag, sent, self._rank, other)
            return share
        raise timed_out(self._tag, other, self._rank, self._shared.timeout_s)


def run_workers(size: int, work: Callable[[LocalChannel], T], timeout_s: float = 30.0) -> list[T]:
    """Run `work` in `size` threads, each with its own channel, and return the results in order of rank.

    If threads fail, one of their errors is raised, a ChannelError only if there is no other: when one worker fails, all others get one.
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
