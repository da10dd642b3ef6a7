"""A user's own residual network: `LayerStack(embed, layers, head, loss)`."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rayllp.channel.base import StateSpec
from rayllp.data.base import Inputs
from rayllp.errors import SettingsError
from rayllp.models.base import Architecture
from rayllp.models.metrics import Metric, NoMetric
from rayllp.models.randomness import seeded
from rayllp.state import combine, tensors

ModuleOrBuilder = nn.Module | Callable[[], nn.Module]


class LayerStack(Architecture):
    """A network of an embedding, residual layers x -> layer(x) of equal shapes, and a head.

    Args:
        embed: inputs -> state. A module, or a function that builds one.
        layers: state -> state, all of one shape. Modules, or functions that build them: with functions, a worker builds only its own
            layers, under a key of (seed, layer), and no process ever holds the whole network.
        head: state -> outputs. A module, or a function that builds one.
        loss: (outputs, targets) -> loss, summed over the targets' terms.
        count: number of terms in the loss of some targets; by default the number of their elements.
        metric: what an evaluation reports besides the loss, such as `rayllp.models.metrics.Accuracy()`.
        stochastic: whether the modules draw random numbers in training (dropout, drop-path). None: found out by running them once.

    Raises:
        SettingsError: there are no layers.
    """

    def __init__(
        self,
        *,
        embed: ModuleOrBuilder,
        layers: Sequence[ModuleOrBuilder],
        head: ModuleOrBuilder,
        loss: Callable[[Tensor, Tensor], Tensor],
        count: Callable[[Tensor], int] = Tensor.numel,
        metric: Metric | None = None,
        stochastic: bool | None = None,
    ) -> None:
        if not layers:
            raise SettingsError("LayerStack has no layers: give at least one residual block")
        self._embed, self._layers, self._head = embed, list(layers), head
        self._loss, self._count, self.layers = loss, count, len(layers)
        self.metric = metric or NoMetric()
        self.stochastic = stochastic

    def thinned(self, open: int, close: int, divisor: int) -> "LayerStack":
        """Return a shallower network for nested iteration, with every `divisor`-th layer between the first `open` and the last `close`."""
        shallow, end = copy.copy(self), self.layers - close
        shallow._layers = [*self._layers[:open], *self._layers[open:end:divisor], *self._layers[end:]]
        shallow.layers = len(shallow._layers)
        return shallow

    def embed(self) -> nn.Module:
        """Return a new embedding: a copy of the module, or what the function builds."""
        return _build(self._embed)

    def layer(self, index: int) -> nn.Module:
        """Return a new layer: a copy of the module, or what the function builds."""
        return _build(self._layers[index])

    def head(self) -> nn.Module:
        """Return a new head: a copy of the module, or what the function builds."""
        return _build(self._head)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by the function that was given."""
        return self._loss(outputs, targets)

    def count(self, targets: Tensor) -> int:
        """Return the number of the loss's terms by the function that was given."""
        return self._count(targets)

    def state_spec(self, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> StateSpec:
        """Return the shapes that the embedding makes of one sample, extended to the batch's size."""
        # Only the embedding knows the shapes, so whichever worker asks runs it on one sample.
        with seeded("state spec"), torch.no_grad():
            state = _build(self._embed).to(dtype).eval()(combine(lambda part: part[:1].cpu(), inputs))
        parts, size = tensors(state), tensors(inputs)[0].shape[0]
        shapes = tuple(torch.Size((size, *part.shape[1:])) for part in parts)
        return StateSpec(shapes, tuple(part.dtype for part in parts), device, isinstance(state, Tensor))


def _build(piece: ModuleOrBuilder) -> nn.Module:
    return copy.deepcopy(piece) if isinstance(piece, nn.Module) else piece()
