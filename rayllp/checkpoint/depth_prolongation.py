"""Reads a shallow network's checkpoint as that of a deeper network, in which each middle layer becomes several (arXiv:1912.08974).

This is the piecewise constant prolongation in the depth direction. It works piece by piece, and a worker reads only the layers from which
its own layers are made.

**Weights** are copied: `factor` steps of Δt / factor with the same weights follow the same ODE over the same time.

**AdamW's moments** are scaled. With the layer x + Δt·(block(x) − x) the gradient is proportional to Δt, and the gradients of a layer's
copies add up to about its own. So each copy gets 1 / factor of the first moment and 1 / factor² of the second, which is what averages of
its own gradients would have been. AdamW's update m / √v stays the same, and new gradients keep their weight in it. The step count, by which
AdamW corrects the bias of its averages, is copied. Embedding, buffer layers and head keep their state as it is.

**Muon's and SGD's momentum** is a first moment; Muon's update does not depend on its size. **Adafactor's** factors are second moments. The
**average of the weights** is copied, like the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from rayllp.checkpoint.location import Folder
from rayllp.config import TrainConfig
from rayllp.errors import CheckpointError
from rayllp.hf_config import layer_sources

POWERS = {
    "weight": 0, "step": 0, "ema": 0, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1, "row_var": 2, "col_var": 2,
    "variance": 2,
}  # fmt: skip
"""For each part of a parameter's state, the power of Δt that it is proportional to."""
LAYER = "layer_"
"""Prefix of the names of layers' pieces; the layer's number follows, in five digits."""


@dataclass(frozen=True, kw_only=True)
class Prolongation:
    """The mapping from a network of open + N + close layers to one of open + factor·N + close layers.

    Attributes:
        open, close: numbers of buffer layers, the same in both networks.
        middle: N, the number of middle layers of the shallow network.
        factor: number of layers that each middle layer becomes.
    """

    open: int
    middle: int
    close: int
    factor: int

    @classmethod
    def between(cls, layers: int, config: TrainConfig, folder: Folder) -> "Prolongation | None":
        """Return the prolongation from a checkpoint to the network of `config`; None if they have the same depth.

        Args:
            layers: number of layers in the checkpoint, including buffer layers.
            folder: the checkpoint, for the error message.

        Raises:
            CheckpointError: the number of middle layers is not a multiple of that in the checkpoint.
        """
        if layers == config.model.layers:
            return None
        buffers, wanted = config.buffers, config.middle_layers
        middle = layers - buffers.open - buffers.close
        if middle < 1 or wanted % middle:
            raise CheckpointError(
                f"{folder} has {middle} middle layers (of {layers}), but at its step the settings want {wanted}, which is no multiple: put "
                "back model.layers, buffers and nested of the config.yaml that it was made with"
            )
        return cls(open=buffers.open, middle=middle, close=buffers.close, factor=wanted // middle)

    def is_middle(self, layer: int) -> bool:
        """True if this layer of the deep network is a middle layer."""
        return self.open <= layer < self.open + self.factor * self.middle

    def source(self, layer: int) -> int:
        """Return the layer of the shallow network that this layer of the deep one is made from."""
        ends = self.open + self.close
        return layer_sources(self.factor * self.middle + ends, self.middle + ends, self.open, self.close)[layer]

    def piece(self, name: str, read: Callable[[str], Mapping[str, Tensor]], prefix: Callable[[int], str]) -> dict[str, Tensor]:
        """Return the state of the deep network's piece `name`.

        Args:
            read: returns a piece of the shallow checkpoint: tensors by "part/full name of the parameter".
            prefix: returns the prefix of the names of a layer's parameters.

        Raises:
            CheckpointError: the optimizer's state has a part whose power of Δt is unknown.
        """
        if not name.startswith(LAYER):
            return dict(read(name))
        target = int(name.removeprefix(LAYER))
        source = self.source(target)
        scale = 1 / self.factor if self.is_middle(target) else 1.0
        return prolong_layer(read(f"{LAYER}{source:05d}"), prefix(source), prefix(target), scale)


def prolong_layer(stored: Mapping[str, Tensor], source: str, target: str, scale: float) -> dict[str, Tensor]:
    """Return the state of one of a layer's copies.

    Args:
        stored: the layer's state: tensors by "part/full name of the parameter".
        source, target: prefixes of the parameter names of the layer and of its copy.
        scale: the copy's Δt divided by the layer's.

    Raises:
        CheckpointError: the optimizer's state has a part whose power of Δt is unknown.
    """
    copy = {}
    for key, value in stored.items():
        part, _, name = key.partition("/")
        if part not in POWERS:
            raise CheckpointError(f"{key}: it is not known how the optimizer's {part} follows a change of Δt; add it to POWERS")
        power = POWERS[part]
        copy[f"{part}/{target}{name.removeprefix(source)}"] = value * scale**power if power else value
    return copy
