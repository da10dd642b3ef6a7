"""Measures how long messages between neighbouring workers take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from rayllp.channel.base import Channel, MessageTag, StateSpec

LARGE = 8 * 1024**2
"""Size in bytes of a message that is large enough to measure bandwidth."""


@dataclass(frozen=True)
class Link:
    """Message times between a worker and the next one.

    Attributes:
        worker: rank of the first of the two.
        seconds: half the median time of a round trip, by message size in bytes.
    """

    worker: int
    seconds: dict[int, float]

    @property
    def bandwidth_gb_s(self) -> float:
        """Bandwidth for the largest message, in GB/s."""
        largest = max(self.seconds)
        return largest / self.seconds[largest] / 1e9


def time_messages(channel: Channel, sizes: Sequence[int], device: torch.device, rounds: int = 20) -> list[Link]:
    """Measure the link between this worker and the next one. All workers call this; pairs of neighbours take turns.

    Args:
        sizes: message sizes in bytes.
        device: where the messages' tensors are.
        rounds: number of timed round trips for each size.

    Returns: one link, or none on the last worker.
    """
    found = []
    for left in range(channel.size - 1):
        if channel.rank not in (left, left + 1):
            continue
        times = {size: _round_trips(channel, left, size, device, rounds) for size in sizes}
        if channel.rank == left:
            found.append(Link(left, {size: median(each[2:]) / 2 for size, each in times.items()}))
    return found


def _round_trips(channel: Channel, left: int, size: int, device: torch.device, rounds: int) -> list[float]:
    """Return the seconds of each round trip between worker `left` and the next one; the first two are warm-ups."""
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    spec, times = StateSpec.of(message), []
    for n in range(2 + rounds):
        tag = MessageTag(n, "bench", "links")
        started = time.perf_counter()
        if channel.rank == left:
            channel.send(message, left + 1, tag)
            channel.receive(spec, left + 1, tag)
        else:
            channel.receive(spec, left, tag)
            channel.send(message, left, tag)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    channel.finish()
    return times
