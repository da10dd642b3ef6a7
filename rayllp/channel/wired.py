"""What channels between processes share: a state travels as one message that says what it is, and is asked for before it is needed."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rayllp.channel.base import Coming, Leaving, MessageTag, Reduction, StateSpec, exchange_one_by_one, failure, too_late
from rayllp.channel.packing import Unchecked, beginning, check, pack, pack_rows, room_for, unpack
from rayllp.errors import ChannelError
from rayllp.state import State, tensors

PROGRAMS = 64
"""Programs that are remembered."""


class Expected(NamedTuple):
    """A receive: what, and from whom."""

    spec: StateSpec
    source: int


class Posted(NamedTuple):
    """A receive that was begun, and where its message goes."""

    expected: Expected
    work: Any
    buffer: Tensor


@dataclass(frozen=True)
class WiredReduction:
    """A sum that was begun.

    Attributes:
        name: by which it fails.
        end: waits for it.
    """

    tensor: Tensor
    name: str
    end: Callable[[], None]

    def wait(self) -> Tensor:
        with failing_as(self.name):
            self.end()
        return self.tensor


@contextmanager
def failing_as(name: str) -> Iterator[None]:
    """What fails inside is a channel's error of this name."""
    try:
        yield
    except RuntimeError as error:
        raise ChannelError(f"{name}: {error}") from error


class WiredChannel(ABC):
    """Messages between processes. A state of several tensors travels as one message.

    In a program (see `Channel.program`) that was run before, the next message from each worker is asked for ahead of time, while this
    worker computes: Gloo sends a message only when its receiver has asked for it, and MPI puts one that was asked for where it belongs.

    Args:
        group: the same workers as torch's process group, for libraries that want one.
        on_host: messages leave from and arrive in the CPU's memory; states on a GPU are staged through it.
        asks_ahead: whether receives are begun ahead of time.
    """

    def __init__(self, rank: int, size: int, timeout_s: float, *, group: dist.ProcessGroup | None, on_host: bool, asks_ahead: bool) -> None:
        self.rank, self.size, self.timeout_s, self.group = rank, size, timeout_s, group
        self._on_host, self._asks_ahead = on_host, asks_ahead
        self.sends_wait = False
        self._programs: dict[Hashable, list[Expected]] = {}
        self._heard: list[Expected] | None = None  # in the program in hand
        self._ahead: dict[int, deque[Expected]] = {}  # of that program, by sender: what has not been asked for yet
        self._posted: dict[int, Posted] = {}
        self._unchecked = Unchecked()

    @abstractmethod
    def _begin_send(self, buffer: Tensor, destination: int) -> None:
        """Hand over a message, of shape (bytes,); returns at once."""

    @abstractmethod
    def _begin_receive(self, buffer: Tensor, source: int) -> Any:
        """Ask for the next message from `source`; what `_await` waits for."""

    @abstractmethod
    def _await(self, work: Any) -> None:
        """Wait until a message has arrived.

        Raises:
            RuntimeError: the time limit has passed, or the sender is gone.
        """

    @abstractmethod
    def _is_there(self, posted: Posted) -> bool:
        """Whether its message has arrived."""

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self._begin_send(self._message(state, tag), destination)

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
            self._await(work)
            self._ask_ahead(source)
        except RuntimeError as error:
            details = f" ({str(error).splitlines()[0]})"
            if time.monotonic() - started >= self.timeout_s:
                raise too_late(tag, source, self.rank, self.timeout_s, details) from error
            raise failure(tag, source, self.rank, f"the connection was lost{details}") from error
        if self._heard is not None:
            self._heard.append(expected)
        return self._open(buffer, spec, source, tag)

    def _message(self, state: State, tag: MessageTag) -> Tensor:
        """As it leaves."""
        message = pack(state, tag)
        return message.cpu() if self._on_host else message

    def _open(self, message: Tensor, spec: StateSpec, source: int, tag: MessageTag) -> State:
        """The state in a message that has arrived.

        Raises:
            ChannelError: it is not the one that was waited for; of those on a GPU `finish` says so.
        """
        if self._on_host:
            check(beginning(message), spec, tag, self.rank, source)
        else:
            self._unchecked.add(message, spec, tag, self.rank, source)
        return unpack(message.to(spec.device), spec)

    def exchange(self, leaving: Leaving, coming: Coming, tag: MessageTag) -> list[State]:
        return exchange_one_by_one(self, leaving, coming, tag)

    @abstractmethod
    def _gather(self, buffer: Tensor) -> list[Tensor]:
        """Every worker's flat buffer, all of one length, in order of the ranks.

        Raises:
            RuntimeError: the time limit has passed, or a worker is gone.
        """

    def all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> list[State]:
        if self.size == 1:
            return [state]
        message = self._message(state, tag)
        with failing_as(f"{tag}: all-gather over {self.size} workers failed on worker {self.rank}"):
            found = self._gather(message)
        return [state if rank == self.rank else self._open(part, spec, rank, tag) for rank, part in enumerate(found)]

    @abstractmethod
    def _exchange(self, parts: Tensor) -> Tensor:
        """Row j of each worker to worker j: what this one is given, a row a worker.

        Raises:
            RuntimeError: the time limit has passed, or a worker is gone.
        """

    def all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> list[Tensor]:
        if self.size == 1:
            return list(parts)
        whole = pack_rows(parts, tag)
        with failing_as(f"{tag}: all-to-all over {self.size} workers failed on worker {self.rank}"):
            found = self._exchange(whole.cpu() if self._on_host else whole)
        spec = StateSpec.of(parts[0])
        return [part for rank, row in enumerate(found) for part in tensors(self._open(row, spec, rank, tag))]

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        return self.begin_all_reduce(tensor, tag).wait()

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> Reduction:
        name = f"{tag}: all-reduce over {self.size} workers failed on worker {self.rank}"
        with failing_as(name):
            return WiredReduction(tensor, name, self._begin_sum(tensor) if self.size > 1 else lambda: None)

    @abstractmethod
    def _begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to sum a tensor over all workers, in place; what waits for that.

        Raises:
            RuntimeError: the time limit has passed, or a worker is gone; also where it is waited for.
        """

    @abstractmethod
    def finish(self) -> None:
        """As `Channel.finish`."""

    @abstractmethod
    def close(self) -> None:
        """As `Channel.close`."""

    def arrived(self, spec: StateSpec, source: int) -> bool:
        if not self._asks_ahead:
            return False
        if source not in self._posted:
            try:
                self._posted[source] = self._post(Expected(spec, source))
            except RuntimeError:  # `receive` will meet it too, and says what it was waiting for
                return True
        return self._is_there(self._posted[source])

    def _post(self, expected: Expected) -> Posted:
        spec, source = expected
        room = room_for(spec, torch.device("cpu") if self._on_host else spec.device)
        return Posted(expected, self._begin_receive(room, source), room)

    @contextmanager
    def program(self, key: Hashable | None) -> Iterator[None]:
        if key is None:
            yield
            return
        known = self._programs.get(key, []) if self._asks_ahead else []
        for expected in known:
            self._ahead.setdefault(expected.source, deque()).append(expected)
        self._heard = []
        for source in list(self._ahead):
            self._ask_ahead(source)
        yield
        if key not in self._programs and len(self._programs) >= PROGRAMS:
            self._programs.clear()
        self._programs[key], self._heard = self._heard, None
        if self._ahead or self._posted:
            raise ChannelError(f"worker {self.rank}: fewer messages came than the last time, in a step of the same kind")

    def _ask_ahead(self, source: int) -> None:
        """Begin the next receive from this worker that the program in hand will want."""
        waiting = self._ahead.get(source)
        if waiting:
            self._posted[source] = self._post(waiting.popleft())
            if not waiting:
                del self._ahead[source]
