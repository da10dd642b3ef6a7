"""A state as one flat message of bytes, which begins with what it is: a receiver that expects another one says so, with both names.

Without that a message of another phase, shape or dtype that fits into the room made for it would be taken for numbers.
"""

import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rayllp.channel.base import MessageTag, StateSpec
from rayllp.errors import ChannelError
from rayllp.state import State, tensors

HEADER = struct.Struct("<4siiIQ20s20s")
"""A mark, step, level, checksum of shapes and dtypes, bytes that follow, solve, phase. Its 64 bytes leave what follows aligned."""
MARK = b"llp1"


def pack(state: State, tag: MessageTag) -> Tensor:
    """The message of a state, of shape (bytes,), on the state's device."""
    parts = [part.detach() for part in tensors(state)]
    spec = StateSpec.of(state)
    message = room_for(spec, spec.device)
    message[: HEADER.size] = _as_tensor(header(spec, tag), spec.device)
    for room, part in zip(_views(message, spec), parts, strict=True):
        room.copy_(part)
    return message


def room_for(spec: StateSpec, device: torch.device) -> Tensor:
    """What such a message is received into."""
    return torch.empty(HEADER.size + _nbytes(spec), dtype=torch.uint8, device=device)


def unpack(message: Tensor, spec: StateSpec) -> State:
    """The state in a message, which shares its memory."""
    return spec.build(_views(message, spec))


def header(spec: StateSpec, tag: MessageTag) -> bytes:
    """What a message of this kind begins with."""
    return HEADER.pack(MARK, tag.step, tag.level, *_kind(spec), tag.solve.encode()[:20], tag.phase.encode()[:20])


@lru_cache(maxsize=1024)
def _kind(spec: StateSpec) -> tuple[int, int]:
    """A checksum of shapes and dtypes, and the bytes after the header."""
    return zlib.crc32(repr((*map(tuple, spec.shapes), *spec.dtypes)).encode()), _nbytes(spec)


def beginning(message: Tensor) -> bytes:
    """What a message in main memory begins with."""
    found: bytes = message[: HEADER.size].numpy().tobytes()
    return found


def check(found: bytes, spec: StateSpec, tag: MessageTag, receiver: int, sender: int) -> None:
    """See that a message is the one that was waited for.

    Raises:
        ChannelError: it is another one.
    """
    expected = header(spec, tag)
    if found == expected:
        return
    mark, step, level, kind, size, solve, phase = HEADER.unpack(found)
    waits = f"worker {receiver} waits for {tag} from worker {sender}"
    if mark != MARK:
        raise ChannelError(
            f"{waits}, and what came is no message of a state, or was cut short: the versions of rayllp differ, or the schedules"
        )
    sent = str(MessageTag(step, solve.rstrip(b"\0").decode(errors="replace"), phase.rstrip(b"\0").decode(errors="replace"), level))
    if HEADER.unpack(expected)[3] != kind:
        shapes = ", ".join(f"{tuple(shape)} {dtype}" for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True))
        raise ChannelError(f"{waits}, of {shapes} ({_nbytes(spec)} bytes); that one sent {sent}, of another shape or dtype ({size} bytes)")
    raise ChannelError(f"{waits}, which sent {sent}: the schedules differ")


def _views(message: Tensor, spec: StateSpec) -> list[Tensor]:
    """Where a message has each tensor of its state."""
    found, start = [], HEADER.size
    for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
        start = -(-start // dtype.itemsize) * dtype.itemsize
        end = start + shape.numel() * dtype.itemsize
        found.append(message[start:end].view(dtype).view(shape))
        start = end
    return found


def _nbytes(spec: StateSpec) -> int:
    """After the header, with what aligns tensors of several dtypes."""
    end = HEADER.size
    for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
        end = -(-end // dtype.itemsize) * dtype.itemsize + shape.numel() * dtype.itemsize
    return end - HEADER.size


def _as_tensor(raw: bytes, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(raw), dtype=np.uint8)).to(device, non_blocking=True)


class Unchecked:
    """Beginnings of messages on a GPU, which are looked at once a step: to look at each would wait for it."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._expected: list[tuple[StateSpec, MessageTag, int, int]] = []

    def add(self, message: Tensor, spec: StateSpec, tag: MessageTag, receiver: int, sender: int) -> None:
        self._found.append(message[: HEADER.size])
        self._expected.append((spec, tag, receiver, sender))

    def check(self) -> None:
        """Look at all of them.

        Raises:
            ChannelError: one was not the message that was waited for.
        """
        if not self._found:
            return
        found, expected = torch.stack(self._found).cpu(), self._expected
        self._found, self._expected = [], []
        for message, wanted in zip(found, expected, strict=True):
            check(beginning(message), *wanted)


def rows(parts: Sequence[Tensor], tag: MessageTag) -> Tensor:
    """A message a row, of tensors of one shape and dtype."""
    return torch.stack([pack(part, tag) for part in parts])
