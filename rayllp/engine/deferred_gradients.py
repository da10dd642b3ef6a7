"""A layer's backward pass in two parts: the gradient of its input, which other workers wait for, and later those of its parameters.

The second part needs the gradient at the output of each module that has parameters (a Linear, a LayerNorm), which the first part passes
anyway. `autograd.grad` for the input and these outputs keeps them, and the second part is then one product for each module. Without that
the second part would begin at the layer's output again, and take as long as a whole backward pass. (Zero-bubble pipelines split it in the
same way, arXiv:2401.10241.)

Where modules do not tell which parameters they use (a parameter that two modules share or that a layer uses by itself, a module that is
called twice or compiled, an output that is no tensor or is changed in place), the second part is a whole backward pass. So it is if the two
ways differ, which is tried out the first time for each layer.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

Gradients = tuple[Tensor | None, ...]
AGREEMENT = 1e-3
"""Largest relative difference of a layer's gradients formed in the two ways that counts as rounding."""


@dataclass
class Parts:
    """The modules of one call of a layer that have trainable parameters of their own.

    Attributes:
        edges: where the output of each module is in the graph.
        parameters: of each module, in the same order.
        missed: trainable parameters of which no module told that it uses them.
    """

    edges: list[GradientEdge] = field(default_factory=list)
    parameters: list[list[nn.Parameter]] = field(default_factory=list)
    missed: list[nn.Parameter] = field(default_factory=list)


class LayerModules:
    """The modules of a layer from whose outputs the gradients of its parameters can be formed.

    Args:
        layer: the layer.
        leaves: the trainable parameters that it uses, some of which may not be its own.
    """

    def __init__(self, layer: nn.Module, leaves: Sequence[nn.Parameter]) -> None:
        owned = {module: [p for p in module.parameters(recurse=False) if p.requires_grad] for module in layer.modules()}
        users = Counter(p for parameters in owned.values() for p in parameters)
        self._owned = {module: own for module, own in owned.items() if own and all(users[p] == 1 for p in own)}
        self._leaves = leaves

    @contextmanager
    def recorded(self) -> Iterator[Parts]:
        """Within this context, in which the layer is called once, record its parts."""
        parts, calls, outputs = Parts(), Counter[nn.Module](), dict[nn.Module, Any]()

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            calls[module] += 1
            outputs[module] = get_gradient_edge(output) if isinstance(output, Tensor) and output.requires_grad else None

        handles = [module.register_forward_hook(keep) for module in self._owned]
        try:
            yield parts
        finally:
            for handle in handles:
                handle.remove()
        told = {module: own for module, own in self._owned.items() if calls[module] == 1 and outputs[module] is not None}
        parts.edges, parts.parameters = [outputs[module] for module in told], list(told.values())
        found = {p for own in told.values() for p in own}
        parts.missed = [p for p in self._leaves if p not in found]


@dataclass
class DeferredGradients:
    """The parameter gradients of one layer, to be formed from the gradient at its output.

    Attributes:
        outputs: the layer's outputs, with their graph.
        lam: the gradient there.
        leaves: the trainable parameters that the layer uses.
        parts: the layer's modules, if they are to be used.
        at_parts: gradient at the output of each of them.
    """

    outputs: tuple[Tensor, ...]
    lam: tuple[Tensor, ...]
    leaves: list[nn.Parameter]
    parts: Parts | None
    at_parts: Gradients

    def form(self, *, known_right: bool) -> bool | None:
        """Add them to `.grad`.

        Args:
            known_right: whether forming the gradients by parts is known to be right for this layer. If not, it is tried out.

        Returns: False if they turned out to differ from those of a whole backward pass, which are then taken; None if they agree, but
            some are zero, as those behind a branch that is initialised with zeros, and so say nothing about their way.
        """
        if not self.leaves:
            return True
        if self.parts is None:
            torch.autograd.backward(self.outputs, self.lam, inputs=self.leaves)
            return True
        if known_right:
            self._form_by_parts(self.parts)
            return True
        whole = torch.autograd.grad(self.outputs, self.leaves, self.lam, retain_graph=True, materialize_grads=True)
        before = [None if p.grad is None else p.grad.clone() for p in self.leaves]
        self._form_by_parts(self.parts)
        agrees = True
        for parameter, right, earlier in zip(self.leaves, whole, before, strict=True):
            formed = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            off = formed - right if earlier is None else formed - earlier - right
            agrees = agrees and bool(off.norm() <= AGREEMENT * right.norm())
        if not agrees:
            for parameter, right, earlier in zip(self.leaves, whole, before, strict=True):
                parameter.grad = right.clone() if earlier is None else earlier + right
            return False
        return True if all(bool(right.any()) for right in whole) else None

    def _form_by_parts(self, parts: Parts) -> None:
        # Graphs are kept: a module's own parameter may lie before its submodules.
        if parts.missed:
            torch.autograd.backward(self.outputs, self.lam, inputs=parts.missed, retain_graph=True)
        for edge, gradient, parameters in zip(parts.edges, self.at_parts, parts.parameters, strict=True):
            if gradient is not None:
                torch.autograd.backward([edge], [gradient], inputs=parameters, retain_graph=True)

    @property
    def is_finite(self) -> bool:
        """True if the gradients at the layer's outputs are finite. If not, trying out tells nothing."""
        return all(bool(part.isfinite().all()) for part in self.lam)


def gradients_at(
    outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], lam: tuple[Tensor, ...], parts: Parts | None = None
) -> tuple[tuple[Tensor, ...], Gradients]:
    """Return the gradients of a layer's inputs, and those at its parts, from the gradient `lam` at its outputs. The graph is kept."""
    edges = [] if parts is None else parts.edges
    wanted: Any = [*inputs, *edges]  # torch's types know either of the two, its code takes both
    found = torch.autograd.grad(outputs, wanted, lam, retain_graph=True, allow_unused=True)
    at_inputs = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=False))
    return at_inputs, found[len(inputs) :]
