"""Point-to-point messages of torch.distributed: Gloo between CPUs, NCCL between GPUs."""

import time
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rayllp.channel.base import MessageTag, StateSpec, failure
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
    work: dist.Work | None
    buffer: Tensor


class TorchChannel:
    """Messages within `group` (the default group if None). A state of several tensors travels as one message.

    Gloo moves CPU memory: states on a GPU are staged through the host. NCCL moves them directly.

    Gloo sends a message once its receiver has asked for it. In a program (see `Channel.program`) that was run before, the next message from
    each worker is therefore asked for ahead of time, while this worker computes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_s: float = 300.0) -> None:
        self.group: dist.ProcessGroup = group if group is not None else dist.group.WORLD  # type: ignore[assignment]
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.timeout_s = timeout_s
        self._host = dist.get_backend(self.group) != "nccl"
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._programs: dict[Hashable, list[Expected]] = {}
        self._heard: list[Expected] | None = None  # in the program in hand
        self._ahead: dict[int, deque[Expected]] = {}  # of that program, by sender: what has not been asked for yet
        self._posted: dict[int, Posted] = {}

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self._sent = [(work, buffer) for work, buffer in self._sent if not work.is_completed()]
        buffer = _flat(state).cpu() if self._host else _flat(state)
        # On the host what dist.isend does, without its checks, which take longer than the message.
        work = self.group.send([buffer], destination, 0) if self._host else dist.isend(buffer, group=self.group, group_dst=destination)
        if work is not None:
            self._sent.append((work, buffer))

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
            if work is not None:
                # NCCL orders the stream and returns at once; its watchdog holds the group's own time limit.
                work.wait(timedelta(seconds=self.timeout_s)) if self._host else work.wait()
            self._ask_ahead(source)
        except RuntimeError as error:
            waited = time.monotonic() - started
            limit = f"time limit of {self.timeout_s:g} s passed" if waited >= self.timeout_s else "the connection was lost"
            raise failure(tag, source, self.rank, f"{limit} ({str(error).splitlines()[0]})") from error
        if self._heard is not None:
            self._heard.append(expected)
        return _unflat(buffer.to(spec.device), spec)

    def _post(self, expected: Expected) -> Posted:
        spec, source = expected
        dtype = _wire_dtype(spec.dtypes)
        device = torch.device("cpu") if self._host else spec.device
        buffer = torch.empty(_wire_length(spec, dtype), dtype=dtype, device=device)
        work = self.group.recv([buffer], source, 0) if self._host else dist.irecv(buffer, group=self.group, group_src=source)
        return Posted(expected, work, buffer)

    @contextmanager
    def program(self, key: Hashable | None) -> Iterator[None]:
        if key is None:
            yield
            return
        known = self._programs.get(key, []) if self._host else []  # NCCL's receives would wait in the stream of what is computed
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

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        if self.size == 1:
            return tensor
        buffer = tensor if not self._host else tensor.cpu()
        try:
            dist.all_reduce(buffer, group=self.group)
        except RuntimeError as error:
            raise ChannelError(f"{tag}: all-reduce over {self.size} workers failed on worker {self.rank}: {error}") from error
        return tensor if buffer is tensor else tensor.copy_(buffer)

    def finish(self) -> None:
        for work, _ in self._sent:
            try:
                work.wait()
            except RuntimeError as error:
                raise ChannelError(f"worker {self.rank}: a message was not taken by its receiver: {error}") from error
        self._sent.clear()

    def close(self) -> None:
        self._sent.clear()
        self._posted.clear()


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
