"""Calls of several layers of one shape at once (by vmap), each with a state and weights of its own.

On a GPU a small layer takes as long as the launches of its kernels, so several layers in one call take hardly longer than one. A worker's
coarse intervals depend on each other only through the coarse solve, so its sweeps may take the first layer of each interval in one call,
then the second of each, and so on.

Each weight of such layers is stacked in one tensor with one more dimension. The modules' own parameters are views of its rows, so
optimizer, checkpoints and calls of a single layer need not know about it.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from rayllp.errors import SettingsError
from rayllp.state import State, combine, tensors

PLACES = ("layer_idx",)
"""Attributes of modules that only say where in the network a layer is."""


@dataclass(frozen=True)
class Stack:
    """Stacked weights of several layers.

    Attributes:
        layers: their indices in the network, ascending.
        modules: the layers themselves.
        parameters, buffers: stacked tensors by name in the module; dimension 0 is the layers.
    """

    layers: tuple[int, ...]
    modules: tuple[nn.Module, ...]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

    @staticmethod
    def of(modules: Mapping[int, nn.Module]) -> "Stack":
        """Return the stack of these layers. Their parameters become views of it.

        Raises:
            SettingsError: the layers differ in more than their weights.
        """
        layers, members = tuple(modules), tuple(modules.values())
        kinds = [kind(module) for module in members]
        if other := next((n for n, this in zip(layers, kinds, strict=True) if this != kinds[0]), None):
            raise SettingsError(
                f"mgrit.batched=true, but layers {layers[0]} and {other} differ in more than their weights (module, shapes, or what is "
                "trained): set mgrit.batched=false"
            )
        parameters: dict[str, Tensor] = {}
        for name, first in members[0].named_parameters():
            rows = [module.get_parameter(name) for module in members]
            whole = torch.stack([row.detach() for row in rows])
            for row, place in zip(rows, whole, strict=True):
                row.data = place
            parameters[name] = whole.requires_grad_(first.requires_grad)
        buffers = {name: torch.stack([module.get_buffer(name) for module in members]) for name, _ in members[0].named_buffers()}
        return Stack(layers, members, parameters, buffers)

    @property
    def trained(self) -> list[Tensor]:
        """The stacked parameters that are trained."""
        return [whole for whole in self.parameters.values() if whole.requires_grad]

    def holds(self) -> bool:
        """Return True if the modules' parameters still are views of the stack, because nobody has given them other tensors since."""
        return all(
            module.get_parameter(name).data_ptr() == place.data_ptr()
            for name, whole in self.parameters.items()
            for module, place in zip((self.modules[0], self.modules[-1]), (whole[0], whole[-1]), strict=True)
        )

    def weights(self, layers: Sequence[int]) -> dict[str, Tensor]:
        """Return parameters and buffers of some of the layers, stacked in the given order."""
        everything = {**self.parameters, **self.buffers}
        places = [self.layers.index(n) for n in layers]
        if places == list(range(len(self.layers))):
            return everything
        if places == list(range(places[0], places[-1] + 1)):
            return {name: whole[places[0] : places[-1] + 1] for name, whole in everything.items()}
        return {name: whole[places] for name, whole in everything.items()}

    def hand_out(self) -> None:
        """Move the gradients of the stacked parameters to the layers' own parameters."""
        for name, whole in self.parameters.items():
            gradients, whole.grad = whole.grad, None
            if gradients is None:
                continue
            for module, gradient in zip(self.modules, gradients.unbind(), strict=True):
                parameter = module.get_parameter(name)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class Stacks:
    """The stacks of a block, made when they are first asked for."""

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        self.modules = modules
        self._of: dict[int, Stack] = {}

    def containing(self, layers: Sequence[int]) -> Stack:
        """Return a stack that holds all of these layers."""
        found = self._of.get(layers[0])
        if found is None or not set(layers) <= set(found.layers) or not found.holds():
            # Stack them with all layers that they shared a stack with: two overlapping sets would replace each other at every step.
            wanted = set(layers).union(*(self._of[n].layers for n in layers if n in self._of))
            found = Stack.of({n: self.modules[n] for n in sorted(wanted)})
            self._of.update(dict.fromkeys(found.layers, found))
        return found


def advance_together(
    advance: Callable[[int, nn.Module, State, Any, nn.Module | None], State],
    index: int,
    module: nn.Module,
    weights: dict[str, Tensor],
    state: State,
    context: Any,
    common: nn.Module | None,
) -> State:
    """Return what `advance` returns for several layers, in one call of `module`. Dimension 0 of weights and state is the layers."""

    def one(weights: dict[str, Tensor], state: State) -> State:
        def layer(*args: Any, **kwargs: Any) -> Any:
            return functional_call(module, weights, args, kwargs)

        return advance(index, cast(nn.Module, layer), state, context, common)

    # Of the fused attentions only flash attention on the GPU works under vmap. The CPU's would be called layer by layer, and the
    # backward pass of the memory-efficient one refuses the results of its forward pass.
    on_gpu = tensors(state)[0].device.type == "cuda"
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if on_gpu else [SDPBackend.MATH]):
        return vmap(one)(weights, state)


def stack_states(states: Sequence[State]) -> State:
    """Return several states as one, stacked along a new dimension 0."""
    return combine(lambda *parts: torch.stack(parts), *states)


def unstack_states(state: State) -> list[State]:
    """Return the states that are stacked along dimension 0, as views: the inverse of `stack_states`."""
    rows = zip(*(part.unbind() for part in tensors(state)), strict=True)
    return [row[0] if isinstance(state, Tensor) else row for row in rows]


def kind(module: nn.Module) -> Hashable:
    """Return a key that is equal for layers which differ only in their weights, and so may be evaluated in one call."""
    parameters = [(name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()]
    plain = [
        (path, name, value)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | None) and name not in PLACES
    ]
    return type(module), str(module), tuple(parameters), tuple((name, b.shape) for name, b in module.named_buffers()), tuple(plain)
