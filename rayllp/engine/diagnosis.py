"""Where a step stopped being finite."""

from typing import TYPE_CHECKING

import torch

from rayllp.channel.base import MessageTag
from rayllp.engine.trajectory import ExactPropagator, Trajectory
from rayllp.mgrit import Communicator, MGRITSolver, Problem
from rayllp.state import State, tensors

if TYPE_CHECKING:
    from rayllp.engine.engine import Engine


class _Checking(ExactPropagator):
    """The exact forward, and the first layer whose output is not finite."""

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__(trajectory)
        self.fault: int | None = None

    def step(self, layer: int, state: State) -> State:
        after = super().step(layer, state)
        if self.fault is None and not is_finite(after):
            self.fault = layer
        return after


def diagnose(engine: "Engine", step: int) -> tuple[int, int, str] | None:
    """The first place on this worker where the step's exact forward, then its gradients, stop being finite: (stage, order, text)."""
    fault = _fault_of_forward(engine, step)
    if fault is not None:
        return fault
    for order, (name, parameter) in enumerate(reversed(engine.block.parameters.items())):
        if parameter.grad is not None and not is_finite(parameter.grad):
            order += 10_000_000 * (engine.layers.size - engine.layers.rank)
            return 1, order, f"{name}: its gradient is not finite, the forward is"
    return None


def _fault_of_forward(engine: "Engine", step: int) -> tuple[int, int, str] | None:
    inputs, targets, samples, _ = engine.my_batch("train", step)
    block, config = engine.block, engine.config
    with torch.no_grad():
        block.begin(step, samples, inputs, training=True)
        entered = block.enter(inputs) if block.first else None
        checking = _Checking(Trajectory(block, frozenset((0,)), True))
        # All workers take part in the solve, whatever they have found.
        problem = Problem(engine.hierarchies(1)[0], checking, engine.spec(inputs))
        solver = MGRITSolver(problem, config.method(1), Communicator(engine.layers, MessageTag(step, "diagnosis")))
        result = solver.solve(entered, reduce_residuals=False)
        if entered is not None and not is_finite(entered):
            return 0, -1, "embedding or opening buffers: their output is not finite"
        if checking.fault is not None:
            layer = checking.fault + config.buffers.open
            return 0, layer, f"layer {layer}: its output is not finite"
        if result.output is not None:
            outputs = block.leave(result.output)
            if not is_finite(outputs):
                return 0, config.model.layers, "head or closing buffers: their output is not finite"
            if not is_finite(block.architecture.loss(outputs, targets)):
                return 0, config.model.layers + 1, "the loss is not finite, all layers' outputs are"
    return None


def is_finite(state: State) -> bool:
    """Whether every number of a state is."""
    return all(bool(torch.isfinite(part).all()) for part in tensors(state))
