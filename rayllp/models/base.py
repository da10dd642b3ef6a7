"""What an architecture must say of itself so that its layers can be spread over workers."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from rayllp.channel.base import StateSpec
from rayllp.models.randomness import seeded
from rayllp.state import State


class Architecture(ABC):
    """An embedding, residual layers and a head. A worker builds the pieces that it owns and no other.

    Modules keep the names of the original model: a parameter's full name is the piece's prefix plus its own name, so that a
    checkpoint is the original model's.
    """

    layers: int
    stochastic: bool = False
    tied: tuple[tuple[str, str], ...] = ()
    """(full name in the embedding, full name in the head) of parameters that are one."""

    @abstractmethod
    def embed(self) -> nn.Module:
        """inputs -> first state."""

    @abstractmethod
    def layer(self, index: int) -> nn.Module:
        """state -> state: residual block `index`."""

    @abstractmethod
    def head(self) -> nn.Module:
        """last state -> outputs."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss summed (not averaged) over its `count` terms."""

    @abstractmethod
    def count(self, targets: Tensor) -> int:
        """Terms in the loss of these targets."""

    @abstractmethod
    def state_spec(self, inputs: Tensor, dtype: torch.dtype, device: torch.device) -> StateSpec:
        """Shapes of the state that `embed` makes of these inputs."""

    def embed_prefix(self) -> str:
        """Prefix of the embedding's parameter names."""
        return "embed."

    def layer_prefix(self, index: int) -> str:
        """Prefix of a layer's parameter names."""
        return f"layers.{index}."

    def head_prefix(self) -> str:
        """Prefix of the head's parameter names."""
        return "head."

    # Built under a key of (seed, piece), so that a piece's weights do not depend on who builds it or on what else is built.

    def build_embed(self, seed: int) -> nn.Module:
        with seeded(seed, "initialise", "embed"):
            return self.embed()

    def build_layer(self, seed: int, index: int) -> nn.Module:
        with seeded(seed, "initialise", "layer", index):
            return self.layer(index)

    def build_head(self, seed: int) -> nn.Module:
        with seeded(seed, "initialise", "head"):
            return self.head()


__all__ = ["Architecture", "State"]
