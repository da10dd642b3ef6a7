"""Finds the first place in the network where a training step yields NaN or infinity."""

import torch

from rayllp.channel.base import MessageTag
from rayllp.engine.batch import StepBatch
from rayllp.engine.block import BoundBlock
from rayllp.engine.exact_forward import ExactForward
from rayllp.engine.propagators import ExactPropagator
from rayllp.state import State, tensors


class _Checking(ExactPropagator):
    """Takes the steps of the exact forward, and keeps the number of the first layer whose output is not finite."""

    def __init__(self, bound: BoundBlock) -> None:
        super().__init__(bound)
        self.fault: int | None = None

    def step(self, layer: int, state: State) -> State:
        after = super().step(layer, state)
        if self.fault is None and not is_finite(after):
            self.fault = layer
        return after


def diagnose(forward: ExactForward, batch: StepBatch) -> tuple[int, int, str] | None:
    """Find the first place on this worker where the step's exact forward, or else its gradients, are no longer finite.

    All workers of the layer group call this together.

    Returns: (stage, order, text), of which the smallest over all workers is the place sought; None if all is finite here. The stage is 0
    for the forward and 1 for gradients; the order is the one in which the step comes to the place.
    """
    fault = _fault_of_forward(forward, batch)
    if fault is not None:
        return fault
    block = forward.group.block
    for piece, name, parameter in reversed(list(block.owned())):
        if parameter.grad is not None and not is_finite(parameter.grad):
            return 1, -block.places[piece], f"{name}: its gradient is not finite, the forward is"
    return None


def _fault_of_forward(forward: ExactForward, batch: StepBatch) -> tuple[int, int, str] | None:
    block, config = forward.group.block, forward.group.config
    with torch.no_grad():
        bound = block.bind(batch)
        entered = bound.enter(batch.inputs) if block.first else None
        checking = _Checking(bound)
        # All workers take part in the solve, whatever they find, since others wait for their messages.
        output = forward.propagate(checking, entered, forward.group.spec(batch.inputs), MessageTag(batch.step, "diagnosis"))
        if entered is not None and not is_finite(entered):
            return 0, -1, "embedding or opening buffers: their output is not finite"
        if checking.fault is not None:
            layer = block.index(checking.fault)
            return 0, layer, f"layer {layer}: its output is not finite"
        if output is not None:
            outputs = bound.leave(output)
            if not is_finite(outputs):
                return 0, config.model.layers, "head or closing buffers: their output is not finite"
            if not is_finite(block.architecture.loss(outputs, batch.targets)):
                return 0, config.model.layers + 1, "the loss is not finite, all layers' outputs are"
    return None


def is_finite(state: State) -> bool:
    """Return True if every number of a state is finite."""
    return all(bool(torch.isfinite(part).all()) for part in tensors(state))
