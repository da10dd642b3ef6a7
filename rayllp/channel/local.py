"""Workers as threads of one process, for tests and small studies. Time limits and order of messages are as between processes."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, Pending, StateSpec, timed_out, unexpected_message
from rayllp.errors import ChannelError
from rayllp.state import State, detach

T = TypeVar("T")
POLL_S = 0.2
"""Seconds between two checks whether another thread has failed."""


class _Queues(dict[tuple[int, ...], Any]):
    """Queues by sender and receiver, each made on first use: of many workers, few pairs talk to each other."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def __missing__(self, key: tuple[int, ...]) -> Any:
        with self._lock:
            return self.setdefault(key, queue.SimpleQueue())


class _Shared:
    """What the channels of all threads share.

    Attributes:
        size: number of workers.
        timeout_s: time limit of every wait, in seconds.
        queues: messages by sender and receiver.
        collectives: what workers bring to collectives, by the collective's number, sender and receiver.
        closed: set once a worker takes part in no collective any more.
    """

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.queues, self.collectives = _Queues(), _Queues()
        self.closed = threading.Event()

    def collected(self, number: int, source: int, destination: int, tag: MessageTag) -> Any:
        """Wait for what a worker brings to a collective."""
        key, deadline = (number, source, destination), time.monotonic() + self.timeout_s
        while not self.closed.is_set() and time.monotonic() < deadline:
            try:
                sent, value = self.collectives[key].get(timeout=POLL_S)
            except queue.Empty:
                continue
            del self.collectives[key]
            if sent != tag:
                raise unexpected_message(tag, sent, destination, source)
            return value
        raise timed_out(tag, source, destination, self.timeout_s)


class LocalChannel(Channel):
    """One thread's channel to the other threads."""

    def __init__(self, shared: _Shared, rank: int) -> None:
        self._shared, self.rank, self.size = shared, rank, shared.size
        self._begun = 0  # number of collectives

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

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> Pending[Tensor]:
        end = self._begin_sharing(tensor.clone(), tag)
        return lambda: tensor.copy_(torch.stack(end()).sum(0))

    def begin_all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> Pending[list[State]]:
        return self._begin_sharing(detach(state), tag)

    def begin_all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> Pending[list[Tensor]]:
        end = self._begin_sharing([part.clone() for part in parts], tag)
        return lambda: [theirs[self.rank] for theirs in end()]

    def _begin_sharing(self, value: T, tag: MessageTag) -> Pending[list[T]]:
        """Give all workers a value. Returns a function that waits for theirs, and returns them in order of rank."""
        shared, rank, size, number = self._shared, self.rank, self.size, self._begun
        self._begun += 1
        for other in range(size):
            if other != rank:
                shared.collectives[number, rank, other].put((tag, value))
        return lambda: [value if other == rank else shared.collected(number, other, rank, tag) for other in range(size)]

    def close(self) -> None:
        self._shared.closed.set()


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
