"""The interface of a network whose layers can be distributed over workers."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from rayllp.channel.base import StateSpec
from rayllp.data.base import Inputs
from rayllp.models.metrics import Metric, NoMetric
from rayllp.models.randomness import seeded
from rayllp.state import State, combine


def decayed_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that weight decay applies to, by name.

    As in transformers' Trainer, these are weight matrices, convolution kernels and embedding tables: no norms, no biases, nothing of fewer
    than two dimensions.
    """
    named = ((path, inner) for path, inner in module.named_modules() if "norm" not in type(inner).__name__.lower())
    parameters = ((f"{path}.{name}" if path else name, p) for path, inner in named for name, p in inner.named_parameters(recurse=False))
    return {name: p for name, p in parameters if p.ndim >= 2 and "bias" not in name}


def hidden_matrices(layer: nn.Module) -> list[nn.Parameter]:
    """Return a layer's weight matrices: its decayed parameters of two dimensions, except embedding tables."""
    tables = {id(p) for module in layer.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return [p for p in decayed_weights(layer).values() if p.ndim == 2 and id(p) not in tables]


class Architecture(ABC):
    """A network of embedding, residual layers and head. A worker builds only the pieces that it owns.

    Modules hold the parameters; `enter`, `advance` and `leave` say how they are called. Modules keep the original model's names: a piece's
    prefix and a parameter's name in the piece make its full name, so that a checkpoint is one of the original model.
    """

    layers: int
    stochastic: bool | None = None
    """True if the pieces draw random numbers in training (dropout, drop-path); None: found out by running them once."""
    tied: tuple[tuple[str, str], ...] = ()
    """Tied parameters: pairs of the full names that one parameter has in the embedding and in the head."""
    metric: Metric = NoMetric()
    """What an evaluation reports besides the loss."""

    @property
    def tied_to(self) -> dict[str, str]:
        """Maps the full name of each tied parameter in the head to its full name in the embedding."""
        return {head: embed for embed, head in self.tied}

    # Pieces -------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self) -> nn.Module:
        """Build the embedding: inputs -> first state."""

    @abstractmethod
    def layer(self, index: int) -> nn.Module:
        """Build residual layer `index`: state -> state."""

    @abstractmethod
    def head(self) -> nn.Module:
        """Build the head: last state -> outputs."""

    def common(self) -> nn.Module | None:
        """Build the parameters that several layers use; None if none are shared.

        An example is an encoder's final norm, which every decoder layer applies. Every worker holds a copy, so they should be few.
        """
        return None

    def kind(self, index: int) -> Hashable:
        """Return a layer's kind. Layers of one kind differ only in their weights, and `mgrit.batched` may evaluate them in one call."""
        return None

    # How they are called ------------------------------------------------------------------------------------------------------

    def context(self, inputs: Inputs, dtype: torch.dtype, past: Any = None) -> Any:
        """Compute what layers need besides the state, such as masks and position tables.

        Every worker computes it from the batch, so it need not be sent.

        Args:
            inputs: the inputs of the batch.
            dtype: the states' dtype.
            past: a cache that `past` made; the layers are then called with just the tokens that it does not hold yet, and add them to it.
        """
        return None

    def past(self) -> Any:
        """Return an empty cache for generation, so that each forward takes new tokens only; None if every forward has to take all."""
        return None

    def enter(self, embed: nn.Module, inputs: Inputs, context: Any) -> State:
        """Return the first state."""
        return embed(inputs)

    def advance(self, index: int, layer: nn.Module, state: State, context: Any, common: nn.Module | None) -> State:
        """Evaluate one residual layer, x -> layer(x), at step size 1.

        With `mgrit.batched`, several layers are evaluated in one call: `index` is the first of them and `layer` a function.
        """
        return layer(state)

    def leave(self, head: nn.Module, state: State, context: Any) -> Tensor:
        """Return the outputs."""
        return head(state)

    def last_position(self, state: State) -> State:
        """Return the state of the last token only, which is enough to choose the next one; dimension 1 is time."""
        return combine(lambda part: part[:, -1:], state)

    def transformers_config(self) -> dict[str, Any] | None:
        """Return the content of transformers' config.json for this network; None if transformers has no such model."""
        return None

    # Loss ---------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss summed (not averaged) over its `count` terms."""

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss that training minimises. It differs from the reported `loss` if there is label smoothing."""
        return self.loss(outputs, targets)

    @abstractmethod
    def count(self, targets: Tensor) -> int:
        """Return the number of terms in the loss of these targets."""

    @abstractmethod
    def state_spec(self, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> StateSpec:
        """Return the shapes and dtypes of the state that `enter` makes from these inputs."""

    def prefix(self, piece: int | str) -> str:
        """Return the prefix of the names of a piece's parameters.

        Args:
            piece: "embed", "common" or "head", or the number of a layer.
        """
        return f"layers.{piece}." if isinstance(piece, int) else f"{piece}."

    @overload
    def build(self, piece: Literal["embed", "head"] | int, seed: int) -> nn.Module: ...
    @overload
    def build(self, piece: Literal["common"], seed: int) -> nn.Module | None: ...
    def build(self, piece: str | int, seed: int) -> nn.Module | None:
        """Build a piece, initialised under the key (seed, piece): its weights depend neither on the worker nor on what else is built.

        Args:
            piece: "embed", "common" or "head", or the number of a layer.
            seed: the run's seed.
        """
        key = ("layer", piece) if isinstance(piece, int) else (piece,)
        with seeded(seed, "initialise", *key):
            return self.layer(piece) if isinstance(piece, int) else getattr(self, piece)()


__all__ = ["Architecture", "State", "decayed_weights", "hidden_matrices"]
