"""All-reduce of several tensors in one message."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag


def flatten(parts: Sequence[Tensor]) -> Tensor:
    """Return one flat tensor of all parts, in the widest of their dtypes."""
    dtype = max((part.dtype for part in parts), key=lambda found: found.itemsize)
    return torch.cat([part.reshape(-1).to(dtype) for part in parts])


def sum_together(parts: Sequence[Tensor], channel: Channel, tag: MessageTag) -> list[Tensor]:
    """Return the sums of these tensors over the channel's workers, in the widest of their dtypes, by one all-reduce.

    Raises:
        ChannelError: a worker was lost, or too slow.
    """
    total = channel.all_reduce(flatten(parts), tag)
    return [each.view(part.shape) for each, part in zip(total.split([part.numel() for part in parts]), parts, strict=True)]


class PackedAllReduce:
    """Named float64 tensors of any shape, to be summed together. Every worker adds the same names and shapes in the same order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add this worker's share of the sum `name`."""
        self._parts[name] = value.detach().to(self.device, torch.float64)

    def reduce(self, channel: Channel, tag: MessageTag) -> None:
        """Replace every share by its sum over the channel's workers, in one all-reduce. The sums are on the CPU."""
        total = channel.all_reduce(torch.cat([part.flatten() for part in self._parts.values()]), tag).cpu()
        split = total.split([part.numel() for part in self._parts.values()])
        self._parts = {name: summed.view(part.shape) for (name, part), summed in zip(self._parts.items(), split, strict=True)}

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]
