"""The base class of channels between processes (`torch_dist.py`, `mpi.py`).

A state travels as one message with a header (`packing.py`), and its receive may be posted before the state is needed.
"""

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, Pending, StateSpec, receive_failed, timed_out
from rayllp.channel.packing import UncheckedHeaders, check_header, empty_message, header_of, pack, pack_rows, unpack
from rayllp.errors import ChannelError
from rayllp.state import State, tensors

T = TypeVar("T")
MAX_SEQUENCES = 64
"""How many sequences of messages (`Channel.prepost_receives`) a channel remembers."""


class Expected(NamedTuple):
    """A message to receive: its spec, and its sender."""

    spec: StateSpec
    source: int


class Posted(NamedTuple):
    """A receive that has been posted, and the buffer for its message."""

    expected: Expected
    work: Any
    buffer: Tensor


@contextmanager
def failing_as(name: str) -> Iterator[None]:
    """Within this context, turn a RuntimeError into a ChannelError that begins with `name`."""
    try:
        yield
    except RuntimeError as error:
        raise ChannelError(f"{name}: {error}") from error


class ProcessChannel(Channel):
    """Base of the channels between processes. A state of several tensors travels as one message.

    In a sequence of messages that it knows (`Channel.prepost_receives`), the next receive from each worker is posted ahead of time, while
    this worker computes: Gloo sends a message only once its receiver has posted the receive, and MPI then puts the message straight into
    its buffer.

    Args:
        rank: this worker's rank.
        size: number of workers.
        timeout_s: time limit of every wait, in seconds.
        group: torch's process group of the same workers, for libraries that need one.
        on_host: send from and receive into CPU memory; states on a GPU are staged through it.
        preposts: post receives ahead of time.
    """

    def __init__(self, rank: int, size: int, timeout_s: float, *, group: dist.ProcessGroup | None, on_host: bool, preposts: bool) -> None:
        self.rank, self.size, self.timeout_s, self.group = rank, size, timeout_s, group
        self._on_host, self._preposts = on_host, preposts
        self._sequences: dict[Hashable, list[Expected]] = {}
        self._received: list[Expected] | None = None  # in the current sequence; None outside of one
        self._unposted: dict[int, deque[Expected]] = {}  # by sender: receives of the current sequence that are not posted yet
        self._posted: dict[int, Posted] = {}
        self._unchecked = UncheckedHeaders()

    @abstractmethod
    def _isend(self, buffer: Tensor, destination: int) -> None:
        """Send a message of shape (bytes,), and return at once."""

    @abstractmethod
    def _irecv(self, buffer: Tensor, source: int) -> Any:
        """Post a receive of the next message from `source`. Returns a handle for `_wait`."""

    @abstractmethod
    def _wait(self, work: Any) -> None:
        """Wait until a message has arrived.

        Raises:
            RuntimeError: the time limit has passed, or the sender is gone.
        """

    def _ending(self, work: Any, found: T) -> Callable[[], T]:
        """Return a function that waits for `work`, and returns what it has found."""

        def end() -> T:
            self._wait(work)
            return found

        return end

    @abstractmethod
    def _has_arrived(self, posted: Posted) -> bool:
        """Return True if the message of a posted receive has arrived."""

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self._isend(self._message(state, tag), destination)

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        expected = Expected(spec, source)
        posted = self._posted.pop(source, None)
        if posted is not None and posted.expected != expected:
            raise ChannelError(
                f"{tag}: worker {self.rank} expects {spec} from worker {source}, and asked for {posted.expected.spec} before"
            )
        started = time.monotonic()
        try:
            _, work, buffer = posted or self._post(expected)
            self._wait(work)
            self._post_next(source)
        except RuntimeError as error:
            details = f" ({str(error).splitlines()[0]})"
            if time.monotonic() - started >= self.timeout_s:
                raise timed_out(tag, source, self.rank, self.timeout_s, details) from error
            raise receive_failed(tag, source, self.rank, f"the connection was lost{details}") from error
        if self._received is not None:
            self._received.append(expected)
        return self._open(buffer, spec, source, tag)

    def _message(self, state: State, tag: MessageTag) -> Tensor:
        """Return a state's message, in the memory from which it is sent."""
        message = pack(state, tag)
        return message.cpu() if self._on_host else message

    def _open(self, message: Tensor, spec: StateSpec, source: int, tag: MessageTag) -> State:
        """Return the state in a message that has arrived.

        Raises:
            ChannelError: it is not the message that was expected. For messages on a GPU `finish` raises this.
        """
        if self._on_host:
            check_header(header_of(message), spec, tag, self.rank, source)
        else:
            self._unchecked.add(message, spec, tag, self.rank, source)
        return unpack(message.to(spec.device), spec)

    @abstractmethod
    def _begin_all_gather(self, buffer: Tensor) -> Callable[[], Sequence[Tensor]]:
        """Begin to gather every worker's flat buffer. All have the same length.

        Returns: a function that waits for them, and returns them in order of rank.

        Raises:
            RuntimeError: the time limit has passed, or a worker is gone. The returned function raises it, too.
        """

    def begin_all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> Pending[list[State]]:
        if self.size == 1:
            return lambda: [state]
        name = f"{tag}: all-gather over {self.size} workers failed on worker {self.rank}"
        with failing_as(name):
            end = self._begin_all_gather(self._message(state, tag))

        def wait() -> list[State]:
            with failing_as(name):
                found = end()
            return [state if rank == self.rank else self._open(part, spec, rank, tag) for rank, part in enumerate(found)]

        return wait

    @abstractmethod
    def _begin_all_to_all(self, parts: Tensor) -> Callable[[], Tensor]:
        """Begin to send row j to worker j.

        Returns: a function that waits for what the workers have sent to this one, and returns a row for each, in order of rank.

        Raises:
            RuntimeError: the time limit has passed, or a worker is gone. The returned function raises it, too.
        """

    def begin_all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> Pending[list[Tensor]]:
        if self.size == 1:
            return lambda: list(parts)
        name = f"{tag}: all-to-all over {self.size} workers failed on worker {self.rank}"
        spec, whole = StateSpec.of(parts[0]), pack_rows(parts, tag)
        with failing_as(name):
            end = self._begin_all_to_all(whole.cpu() if self._on_host else whole)

        def wait() -> list[Tensor]:
            with failing_as(name):
                found = end()
            return [part for rank, row in enumerate(found) for part in tensors(self._open(row, spec, rank, tag))]

        return wait

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> Pending[Tensor]:
        if self.size == 1:
            return lambda: tensor
        name = f"{tag}: all-reduce over {self.size} workers failed on worker {self.rank}"
        with failing_as(name):
            end = self._begin_all_reduce(tensor)

        def wait() -> Tensor:
            with failing_as(name):
                end()
            return tensor

        return wait

    @abstractmethod
    def _begin_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to sum a tensor over all workers in place. Returns a function that waits for the sum.

        Raises:
            RuntimeError: the time limit has passed, or a worker is gone. The returned function raises it, too.
        """

    def arrived(self, spec: StateSpec, source: int) -> bool:
        if not self._preposts:
            return False
        if source not in self._posted:
            try:
                self._posted[source] = self._post(Expected(spec, source))
            except RuntimeError:  # `receive` will fail in the same way, with an error that names the message
                return True
        return self._has_arrived(self._posted[source])

    def _post(self, expected: Expected) -> Posted:
        """Allocate a buffer for a message, and post its receive."""
        spec, source = expected
        buffer = empty_message(spec, torch.device("cpu") if self._on_host else spec.device)
        return Posted(expected, self._irecv(buffer, source), buffer)

    @contextmanager
    def prepost_receives(self, key: Hashable | None) -> Iterator[None]:
        if key is None:
            yield
            return
        known = self._sequences.get(key, []) if self._preposts else []
        for expected in known:
            self._unposted.setdefault(expected.source, deque()).append(expected)
        self._received = []
        for source in list(self._unposted):
            self._post_next(source)
        yield
        if key not in self._sequences and len(self._sequences) >= MAX_SEQUENCES:
            self._sequences.clear()
        self._sequences[key], self._received = self._received, None
        if self._unposted or self._posted:
            raise ChannelError(f"worker {self.rank}: fewer messages came than the last time, in a step of the same kind")

    def _post_next(self, source: int) -> None:
        """Post the current sequence's next receive from worker `source`, if one is left."""
        unposted = self._unposted.get(source)
        if unposted:
            self._posted[source] = self._post(unposted.popleft())
            if not unposted:
                del self._unposted[source]
