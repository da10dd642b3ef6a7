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

from rayllp.channel.base import MessageTag, StateSpec, schedules_differ
from rayllp.errors import ChannelError
from rayllp.state import State, tensors

HEADER = struct.Struct("<4siiIQ20s20s")
"""A mark, step, level, checksum of shapes and dtypes, bytes that follow, solve, phase. Its 64 bytes leave what follows aligned."""
MARK = b"llp1"
ALIGNED = 16
"""A message's bytes are a multiple of it."""


def pack(state: State, tag: MessageTag) -> Tensor:
    """The message of a state, of shape (bytes,), on the state's device."""
    spec = StateSpec.of(state)
    message = room_for(spec, spec.device)
    _begin(message, spec, tag)
    _fill(message, state, spec)
    return message


def pack_rows(parts: Sequence[Tensor], tag: MessageTag) -> Tensor:
    """A message a row, of tensors of one shape and dtype; shape (messages, bytes)."""
    spec = StateSpec.of(parts[0])
    messages = room_for(spec, spec.device, len(parts))
    _begin(messages, spec, tag)
    for message, part in zip(messages, parts, strict=True):
        _fill(message, part, spec)
    return messages


def _begin(messages: Tensor, spec: StateSpec, tag: MessageTag) -> None:
    """Write what one message, or all of several, has beside its tensors."""
    head = torch.from_numpy(np.frombuffer(bytearray(header(spec, tag)), dtype=np.uint8))
    messages[..., : HEADER.size] = head.to(spec.device, non_blocking=True)
    messages[..., _places(spec)[-1].stop :] = 0


def _fill(message: Tensor, state: State, spec: StateSpec) -> None:
    for room, part in zip(_views(message, spec), tensors(state), strict=True):
        room.copy_(part.detach())


def room_for(spec: StateSpec, device: torch.device, *messages: int) -> Tensor:
    """What such a message is received into; of so many, if they are several, each of which begins where any dtype may."""
    size = -(-_places(spec)[-1].stop // ALIGNED) * ALIGNED
    return torch.empty(*messages, size, dtype=torch.uint8, device=device)


def unpack(message: Tensor, spec: StateSpec) -> State:
    """The state in a message, which shares its memory."""
    return spec.build(_views(message, spec))


def header(spec: StateSpec, tag: MessageTag) -> bytes:
    """What a message of this kind begins with."""
    return HEADER.pack(MARK, tag.step, tag.level, *_kind(spec), tag.solve.encode()[:20], tag.phase.encode()[:20])


@lru_cache(maxsize=1024)
def _kind(spec: StateSpec) -> tuple[int, int]:
    """A checksum of shapes and dtypes, and the bytes after the header."""
    return zlib.crc32(repr((*map(tuple, spec.shapes), *spec.dtypes)).encode()), _places(spec)[-1].stop - HEADER.size


@lru_cache(maxsize=1024)
def _places(spec: StateSpec) -> tuple[slice, ...]:
    """The bytes of a message that hold each tensor, which begin where its dtype may."""
    found, end = [], HEADER.size
    for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
        start = -(-end // dtype.itemsize) * dtype.itemsize
        end = start + shape.numel() * dtype.itemsize
        found.append(slice(start, end))
    return tuple(found)


def beginning(message: Tensor) -> bytes:
    """What a message in main memory begins with."""
    found: bytes = message[: HEADER.size].numpy().tobytes()
    return found


def check(found: bytes, spec: StateSpec, tag: MessageTag, receiver: int, sender: int) -> None:
    """See that a message is the one that was waited for.

    Raises:
        ChannelError: it is another one.
    """
    if found == header(spec, tag):
        return
    mark, step, level, kind, size, solve, phase = HEADER.unpack(found)
    waits = f"worker {receiver} waits for {tag} from worker {sender}"
    if mark != MARK:
        raise ChannelError(
            f"{waits}, and what came is no message of a state, or was cut short: the versions of rayllp differ, or the schedules"
        )
    sent = MessageTag(step, solve.rstrip(b"\0").decode(errors="replace"), phase.rstrip(b"\0").decode(errors="replace"), level)
    own_kind, own_size = _kind(spec)
    if own_kind != kind:
        shapes = ", ".join(f"{tuple(shape)} {dtype}" for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True))
        raise ChannelError(f"{waits}, of {shapes} ({own_size} bytes); that one sent {sent}, of another shape or dtype ({size} bytes)")
    raise schedules_differ(tag, sent, receiver, sender)


def _views(message: Tensor, spec: StateSpec) -> list[Tensor]:
    """Where a message has each tensor of its state."""
    return [message[place].view(dtype).view(shape) for place, shape, dtype in zip(_places(spec), spec.shapes, spec.dtypes, strict=True)]


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
