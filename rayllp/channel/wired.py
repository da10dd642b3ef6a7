"""What channels between processes share: a state travels as one flat buffer, and is asked for before it is needed."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rayllp.channel.base import MessageTag, StateSpec, failure, too_late
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
        self._programs: dict[Hashable, list[Expected]] = {}
        self._heard: list[Expected] | None = None  # in the program in hand
        self._ahead: dict[int, deque[Expected]] = {}  # of that program, by sender: what has not been asked for yet
        self._posted: dict[int, Posted] = {}

    @abstractmethod
    def _begin_send(self, buffer: Tensor, destination: int) -> None:
        """Hand over a flat buffer; returns at once."""

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
        buffer = _flat(state)
        self._begin_send(buffer.cpu() if self._on_host else buffer, destination)

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
        return _unflat(buffer.to(spec.device), spec)

    @abstractmethod
    def _gather(self, buffer: Tensor) -> list[Tensor]:
        """Every worker's flat buffer, all of one length, in order of the ranks.

        Raises:
            RuntimeError: the time limit has passed, or a worker is gone.
        """

    def all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> list[State]:
        if self.size == 1:
            return [state]
        buffer = _flat(state)
        try:
            found = self._gather(buffer.cpu() if self._on_host else buffer)
        except RuntimeError as error:
            raise ChannelError(f"{tag}: all-gather over {self.size} workers failed on worker {self.rank}: {error}") from error
        return [state if rank == self.rank else _unflat(part.to(spec.device), spec) for rank, part in enumerate(found)]

    @abstractmethod
    def _exchange(self, parts: Tensor) -> Tensor:
        """Row j of each worker to worker j: what this one is given, a row a worker.

        Raises:
            RuntimeError: the time limit has passed, or a worker is gone.
        """

    def all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> list[Tensor]:
        if self.size == 1:
            return list(parts)
        whole = torch.stack(list(parts))
        try:
            found = self._exchange(whole.cpu() if self._on_host else whole)
        except RuntimeError as error:
            raise ChannelError(f"{tag}: all-to-all over {self.size} workers failed on worker {self.rank}: {error}") from error
        return list(found.to(parts[0].device).unbind())

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
        dtype = _wire_dtype(spec.dtypes)
        device = torch.device("cpu") if self._on_host else spec.device
        buffer = torch.empty(_wire_length(spec, dtype), dtype=dtype, device=device)
        return Posted(expected, self._begin_receive(buffer, source), buffer)

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


def _wire_dtype(dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
    return dtypes[0] if len(set(dtypes)) == 1 else torch.uint8


def _wire_length(spec: StateSpec, dtype: torch.dtype) -> int:
    if dtype == torch.uint8:
        return sum(shape.numel() * part.itemsize for shape, part in zip(spec.shapes, spec.dtypes, strict=True))
    return sum(shape.numel() for shape in spec.shapes)


def _flat(state: State) -> Tensor:
    """The state as one contiguous one-dimensional tensor; no copy where it is one already."""
    parts = [part.detach().contiguous().view(-1) for part in tensors(state)]
    if len(parts) == 1:
        return parts[0]
    if len({part.dtype for part in parts}) > 1:
        parts = [part.view(torch.uint8) for part in parts]
    return torch.cat(parts)


def _unflat(buffer: Tensor, spec: StateSpec) -> State:
    parts, start = [], 0
    for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
        length = shape.numel() * (dtype.itemsize if buffer.dtype == torch.uint8 and dtype != torch.uint8 else 1)
        parts.append(buffer[start : start + length].view(dtype).view(shape))
        start += length
    return spec.build(parts)
