"""Gradients by windows, where neighbouring layers are on different workers and are solved together (`rayllp/mgrit/windows.py`)."""

import torch

from rayllp.channel.base import MessageTag
from rayllp.engine.batch import StepBatch
from rayllp.engine.consistency import Consistency
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.step_gradients import StepGradients, add_embedding_gradients, in_parts, loss_and_seed
from rayllp.engine.trajectory import AdjointPropagator, ForwardPropagator, Trajectory
from rayllp.mgrit.windows import Placement
from rayllp.state import detach


class WindowGradients:
    """Gradients by Picard sweeps over one window after the other, forward and adjoint."""

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self.placement = Placement.cyclic(group.config.middle_layers, group.config.layer_workers)

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Form the gradients of the batch, in as many parts as gradient accumulation asks for."""
        return in_parts(self._form_part, batch, penalty, self.group.block)

    def _form_part(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        group, block, accuracy = self.group, self.group.block, batch.accuracy
        block.begin(batch.step, batch.samples, batch.inputs, training=True)
        spec, last = group.spec(batch.inputs), group.channel.size - 1
        messages = "windows", accuracy.window, accuracy.iterations_forward, accuracy.iterations_backward
        with group.channel.program((messages, spec)):
            with group.span("enter"):
                entered = block.enter(batch.inputs) if block.first else None
            recompute = block.config.mgrit.recompute
            trajectory = Trajectory(block, frozenset(self.placement.owned(group.channel.rank)) if recompute else frozenset(), recompute)
            tag = MessageTag(batch.step, "forward")
            u0 = None if entered is None else detach(entered)
            solver = group.window_solver(
                self.placement, ForwardPropagator(trajectory), accuracy.window, accuracy.iterations_forward, spec, tag
            )
            forward = solver.solve(u0, source=0)
            with group.span("loss"):
                loss, seed = torch.zeros((), device=group.device), None
                if block.last:
                    loss, seed = loss_and_seed(block, forward.output, batch.targets, batch.scale)
            tag = MessageTag(batch.step, "adjoint")
            solver = group.window_solver(
                self.placement, AdjointPropagator(trajectory), accuracy.window, accuracy.iterations_backward, spec, tag, adjoint=True
            )
            backward = solver.solve(seed, source=last)
        add_embedding_gradients(group, entered, backward.output)
        return StepGradients(loss, forward, backward, penalty)
