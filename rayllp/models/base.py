"""What an architecture must say of itself so that its layers can be spread over workers."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from rayllp.channel.base import StateSpec
from rayllp.data.base import Inputs
from rayllp.models.metrics import Metric, NoMetric
from rayllp.models.randomness import seeded
from rayllp.state import State, combine


def decayed_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters that weight decay is for, as transformers' Trainer has it: weight matrices, convolutions' kernels and tables
    of embeddings; no norms, no biases, nothing of less than two dimensions.
    """
    named = ((path, inner) for path, inner in module.named_modules() if "norm" not in type(inner).__name__.lower())
    found = ((f"{path}.{name}" if path else name, p) for path, inner in named for name, p in inner.named_parameters(recurse=False))
    return {name: p for name, p in found if p.ndim >= 2 and "bias" not in name}


def hidden_matrices(layer: nn.Module) -> list[nn.Parameter]:
    """The weights of a layer that map vectors to vectors: those of two dimensions, tables of embeddings excepted."""
    tables = {id(p) for module in layer.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return [p for p in decayed_weights(layer).values() if p.ndim == 2 and id(p) not in tables]


class Architecture(ABC):
    """An embedding, residual layers and a head. A worker builds the pieces that it owns and no other.

    Modules hold the parameters; `enter`, `advance` and `leave` say how they are called. Modules keep the names of the original model:
    a parameter's full name is the piece's prefix plus its own name, so that a checkpoint is the original model's.
    """

    layers: int
    stochastic: bool | None = None
    """Whether the pieces draw random numbers in training (dropout, drop-path); None: found by running them once."""
    tied: tuple[tuple[str, str], ...] = ()
    """(full name in the embedding, full name in the head) of parameters that are one."""
    metric: Metric = NoMetric()
    """What an evaluation reports beside the loss."""

    @property
    def tied_to(self) -> dict[str, str]:
        """Full name in the embedding of each tied parameter, by its full name in the head."""
        return {head: embed for embed, head in self.tied}

    # Pieces -------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self) -> nn.Module:
        """inputs -> first state."""

    @abstractmethod
    def layer(self, index: int) -> nn.Module:
        """state -> state: residual block `index`."""

    @abstractmethod
    def head(self) -> nn.Module:
        """last state -> outputs."""

    def common(self) -> nn.Module | None:
        """Parameters that several layers use (an encoder's final norm, which every decoder layer reads); on every worker, so small."""
        return None

    def kind(self, index: int) -> Hashable:
        """Layers of one kind differ in their weights alone, so that `mgrit.batched` may take them in one call."""
        return None

    # How they are called ------------------------------------------------------------------------------------------------------

    def context(self, inputs: Inputs, dtype: torch.dtype, past: Any = None) -> Any:
        """What layers need beside the state: masks, position tables. Every worker makes it from the batch; nothing is sent.

        Args:
            past: one that `past` made; the layers are then called with the tokens that it does not know yet, and remember them in it.
        """
        return None

    def past(self) -> Any:
        """What remembers the tokens that layers have been through in generation; None where every forward has to take all of them."""
        return None

    def enter(self, embed: nn.Module, inputs: Inputs, context: Any) -> State:
        """The first state."""
        return embed(inputs)

    def advance(self, index: int, layer: nn.Module, state: State, context: Any, common: nn.Module | None) -> State:
        """The residual block as it is: x -> block(x).

        With `mgrit.batched` several layers are one call: `index` is the first one's, and `layer` a function.
        """
        return layer(state)

    def leave(self, head: nn.Module, state: State, context: Any) -> Tensor:
        """The outputs."""
        return head(state)

    def last_position(self, state: State) -> State:
        """The state of the last token alone, which is all that choosing the next one needs: dimension 1 is time."""
        return combine(lambda part: part[:, -1:], state)

    def transformers_config(self) -> dict[str, Any] | None:
        """What transformers would read this network's sizes from; None for one that it does not know."""
        return None

    # Loss ---------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss summed (not averaged) over its `count` terms."""

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss that is minimised, where it differs from the one that is reported (label smoothing)."""
        return self.loss(outputs, targets)

    @abstractmethod
    def count(self, targets: Tensor) -> int:
        """Terms in the loss of these targets."""

    @abstractmethod
    def state_spec(self, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> StateSpec:
        """Shapes of the state that `enter` makes of these inputs."""

    # Names --------------------------------------------------------------------------------------------------------------------

    def embed_prefix(self) -> str:
        """Prefix of the embedding's parameter names."""
        return "embed."

    def layer_prefix(self, index: int) -> str:
        """Prefix of a layer's parameter names."""
        return f"layers.{index}."

    def head_prefix(self) -> str:
        """Prefix of the head's parameter names."""
        return "head."

    def common_prefix(self) -> str:
        """Prefix of the common parameters' names."""
        return "common."

    # Built under a key of (seed, piece), so that a piece's weights do not depend on who builds it or on what else is built.

    def build_embed(self, seed: int) -> nn.Module:
        """The embedding, initialised by its key."""
        with seeded(seed, "initialise", "embed"):
            return self.embed()

    def build_layer(self, seed: int, index: int) -> nn.Module:
        """A layer, initialised by the key of (seed, index): the same on any worker."""
        with seeded(seed, "initialise", "layer", index):
            return self.layer(index)

    def build_head(self, seed: int) -> nn.Module:
        """The head, initialised by its key."""
        with seeded(seed, "initialise", "head"):
            return self.head()

    def build_common(self, seed: int) -> nn.Module | None:
        """What several layers read, initialised by its key; None where there is nothing."""
        with seeded(seed, "initialise", "common"):
            return self.common()


__all__ = ["Architecture", "State", "decayed_weights", "hidden_matrices"]
