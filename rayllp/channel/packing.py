"""Packs a state into one flat message of bytes, with a header that says what the message is.

A receiver that expects another message raises an error that names both. Without the header, a message of another phase, shape or dtype
that happens to fit into the receive buffer would be taken for the expected one.
"""

import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rayllp.channel.base import MessageTag, StateSpec, unexpected_message
from rayllp.errors import ChannelError
from rayllp.state import State, tensors

HEADER = struct.Struct("<4siiIQ20s20s")
"""Magic number, step, level, checksum of shapes and dtypes, number of bytes that follow, solve, phase. 64 bytes keep the rest aligned."""
MAGIC = b"llp1"
ALIGNED = 16
"""The length of a message is a multiple of this many bytes."""


def pack(state: State, tag: MessageTag) -> Tensor:
    """Return the message of a state: uint8, shape (bytes,), on the state's device."""
    spec = StateSpec.of(state)
    message = empty_message(spec, spec.device)
    _write_header(message, spec, tag)
    _write_state(message, state, spec)
    return message


def pack_rows(parts: Sequence[Tensor], tag: MessageTag) -> Tensor:
    """Return the messages of tensors of one shape and dtype, one per row: uint8, shape (messages, bytes)."""
    spec = StateSpec.of(parts[0])
    messages = empty_message(spec, spec.device, len(parts))
    _write_header(messages, spec, tag)
    for message, part in zip(messages, parts, strict=True):
        _write_state(message, part, spec)
    return messages


def _write_header(messages: Tensor, spec: StateSpec, tag: MessageTag) -> None:
    """Write the header and the padding at the end into one message, or into all rows of several."""
    head = torch.from_numpy(np.frombuffer(bytearray(header(spec, tag)), dtype=np.uint8))
    messages[..., : HEADER.size] = head.to(spec.device, non_blocking=True)
    messages[..., _byte_ranges(spec)[-1].stop :] = 0


def _write_state(message: Tensor, state: State, spec: StateSpec) -> None:
    for view, part in zip(_views(message, spec), tensors(state), strict=True):
        view.copy_(part.detach())


def empty_message(spec: StateSpec, device: torch.device, *messages: int) -> Tensor:
    """Return an uninitialised buffer for a message of this spec, of shape (bytes,).

    Args:
        messages: a number of messages, for a buffer of shape (messages, bytes). Each row is aligned for any dtype.
    """
    size = -(-_byte_ranges(spec)[-1].stop // ALIGNED) * ALIGNED
    return torch.empty(*messages, size, dtype=torch.uint8, device=device)


def unpack(message: Tensor, spec: StateSpec) -> State:
    """Return the state in a message. It shares the message's memory."""
    return spec.build(_views(message, spec))


def header(spec: StateSpec, tag: MessageTag) -> bytes:
    """Return the header of a message with this spec and tag."""
    return HEADER.pack(MAGIC, tag.step, tag.level, *_body(spec), tag.solve.encode()[:20], tag.phase.encode()[:20])


@lru_cache(maxsize=1024)
def _body(spec: StateSpec) -> tuple[int, int]:
    """Return a checksum of shapes and dtypes, and the number of bytes after the header."""
    return zlib.crc32(repr((*map(tuple, spec.shapes), *spec.dtypes)).encode()), _byte_ranges(spec)[-1].stop - HEADER.size


@lru_cache(maxsize=1024)
def _byte_ranges(spec: StateSpec) -> tuple[slice, ...]:
    """Return the range of a message's bytes that holds each tensor. Each begins at a multiple of its dtype's size."""
    found, end = [], HEADER.size
    for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
        start = -(-end // dtype.itemsize) * dtype.itemsize
        end = start + shape.numel() * dtype.itemsize
        found.append(slice(start, end))
    return tuple(found)


def header_of(message: Tensor) -> bytes:
    """Return the header of a message that is in main memory."""
    found: bytes = message[: HEADER.size].numpy().tobytes()
    return found


def check_header(found: bytes, spec: StateSpec, tag: MessageTag, receiver: int, sender: int) -> None:
    """Check that a message is the one that was expected.

    Args:
        found: the header of the message.
        spec: shapes and dtypes that were expected.
        tag: the tag that was expected.

    Raises:
        ChannelError: it is another message.
    """
    if found == header(spec, tag):
        return
    magic, step, level, checksum, size, solve, phase = HEADER.unpack(found)
    waits = f"worker {receiver} waits for {tag} from worker {sender}"
    if magic != MAGIC:
        raise ChannelError(
            f"{waits}, and what came is no message of a state, or was cut short: the versions of rayllp differ, or the schedules"
        )
    sent = MessageTag(step, solve.rstrip(b"\0").decode(errors="replace"), phase.rstrip(b"\0").decode(errors="replace"), level)
    own_checksum, own_size = _body(spec)
    if own_checksum != checksum:
        shapes = ", ".join(f"{tuple(shape)} {dtype}" for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True))
        raise ChannelError(f"{waits}, of {shapes} ({own_size} bytes); what came is {sent}, of another shape or dtype ({size} bytes)")
    raise unexpected_message(tag, sent, receiver, sender)


def _views(message: Tensor, spec: StateSpec) -> list[Tensor]:
    """Return each tensor of a message's state as a view of the message."""
    return [message[span].view(dtype).view(shape) for span, shape, dtype in zip(_byte_ranges(spec), spec.shapes, spec.dtypes, strict=True)]


class UncheckedHeaders:
    """Headers of messages on a GPU that are yet to be checked. They are checked once a step, since each check waits for the GPU."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._expected: list[tuple[StateSpec, MessageTag, int, int]] = []

    def add(self, message: Tensor, spec: StateSpec, tag: MessageTag, receiver: int, sender: int) -> None:
        self._found.append(message[: HEADER.size])
        self._expected.append((spec, tag, receiver, sender))

    def check(self) -> None:
        """Check all headers that were added.

        Raises:
            ChannelError: a message was not the one that was expected.
        """
        if not self._found:
            return
        found, expected = torch.stack(self._found).cpu(), self._expected
        self._found, self._expected = [], []
        for message, wanted in zip(found, expected, strict=True):
            check_header(header_of(message), *wanted)
