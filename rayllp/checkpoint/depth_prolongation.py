"""A shallow network's checkpoint read as a deeper network's: each middle layer becomes several (arXiv:1912.08974, piecewise constant).

Pure, and piece by piece: a worker makes the state of its own layers of those that they come from, and of nothing else.

**Weights** are copied: `factor` steps of Δt / factor with the same weights follow the same ODE over the same time.

**AdamW's moments**: with x + Δt·(block(x) − x) a layer's gradient is proportional to Δt, and the gradients of a layer's copies add up to
about its own. So each copy gets 1 / factor of the first moment and 1 / factor² of the second, which is what averages of its own gradients
would have been. AdamW's step m / √v stays as it was, and so does what the next gradients weigh in it. The count of steps, which corrects
the averages' bias, is copied. Embedding, buffers and head keep all of theirs.

**Muon's and SGD's momentum** is a first moment; Muon's update does not depend on the momentum's size. **Adafactor's** factors are second
moments. The **average of the weights** is copied like these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from rayllp.checkpoint.location import Folder
from rayllp.config import TrainConfig
from rayllp.errors import CheckpointError

POWERS = {
    "weight": 0, "step": 0, "ema": 0, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1, "row_var": 2, "col_var": 2,
    "variance": 2,
}  # fmt: skip
"""The power of Δt that each part of a parameter's state is proportional to."""
LAYER = "layer_"
"""What names of the layers' pieces begin with; the number of the layer follows, five digits."""


@dataclass(frozen=True, kw_only=True)
class Prolongation:
    """From a network of open + N + close layers to one of open + factor·N + close.

    Attributes:
        open, close: buffer layers, the same in both.
        middle: N, of the shallow network.
        factor: layers that a middle layer becomes.
    """

    open: int
    middle: int
    close: int
    factor: int

    @classmethod
    def between(cls, layers: int, config: TrainConfig, folder: Folder) -> "Prolongation | None":
        """From a checkpoint with so many layers, buffers included, to the network of `config`; None where it has those.

        Raises:
            CheckpointError: the middle layers that are wanted are no multiple of those in the checkpoint, which `folder` is.
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
        """Whether layer `layer` of the deep network is no buffer."""
        return self.open <= layer < self.open + self.factor * self.middle

    def source(self, layer: int) -> int:
        """The shallow network's layer that layer `layer` of the deep one is made of."""
        if self.is_middle(layer):
            return self.open + (layer - self.open) // self.factor
        return layer if layer < self.open else layer - (self.factor - 1) * self.middle

    def piece(self, name: str, read: Callable[[str], Mapping[str, Tensor]], prefix: Callable[[int], str]) -> dict[str, Tensor]:
        """State of the deep network's piece `name`.

        Args:
            read: a piece of the shallow checkpoint: tensors by "part/full name of the parameter".
            prefix: of the names of a layer's parameters.

        Raises:
            CheckpointError: a part of the optimizer's state that is not known here.
        """
        if not name.startswith(LAYER):
            return dict(read(name))
        target = int(name.removeprefix(LAYER))
        source = self.source(target)
        scale = 1 / self.factor if self.is_middle(target) else 1.0
        return prolong_layer(read(f"{LAYER}{source:05d}"), prefix(source), prefix(target), scale)


def prolong_layer(stored: Mapping[str, Tensor], source: str, target: str, scale: float) -> dict[str, Tensor]:
    """State of one copy of a layer.

    Args:
        stored: the layer's state, by "part/full name of the parameter".
        source, target: prefixes of the layer's and of the copy's names.
        scale: the copy's Δt over the layer's.

    Raises:
        CheckpointError: a part that is not known here.
    """
    copy = {}
    for key, value in stored.items():
        part, _, name = key.partition("/")
        if part not in POWERS:
            raise CheckpointError(f"{key}: it is not known how the optimizer's {part} follows a change of Δt; add it to POWERS")
        power = POWERS[part]
        copy[f"{part}/{target}{name.removeprefix(source)}"] = value * scale**power if power else value
    return copy
