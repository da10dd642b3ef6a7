"""All-reduce of several small tensors in one message."""

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag


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
