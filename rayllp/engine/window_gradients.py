"""Gradients by windows, where neighbouring layers are on different workers and are solved together (`rayllp/mgrit/windows.py`)."""

from dataclasses import replace

from torch import Tensor

from rayllp.channel.base import MessageTag
from rayllp.engine.batch import StepBatch
from rayllp.engine.consistency import Consistency
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.propagators import AdjointPropagator, ForwardPropagator, RecomputingPropagator
from rayllp.engine.step_gradients import StepGradients, add_embedding_gradients, loss_and_seed
from rayllp.mgrit import Communicator
from rayllp.mgrit.couplings import CouplingTable, solve_a_layer_early
from rayllp.mgrit.windows import WindowOptions, WindowProblem
from rayllp.state import detach


class WindowGradients:
    """Gradients by Picard sweeps over one window after the other, forward and adjoint."""

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self.placement = group.config.cyclic_placement

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Add the gradients of these samples to `.grad`."""
        group, block, windows = self.group, self.group.block, batch.accuracy.windows
        assert windows is not None
        bound = block.bind(batch)
        spec, last = group.spec(batch.inputs), group.channel.size - 1
        with group.channel.prepost_receives((windows, spec)):
            with group.span("enter"):
                entered = bound.enter(batch.inputs) if block.first else None
            recompute = block.config.recompute
            propagator = RecomputingPropagator(bound, checkpoints={*block.solved}) if recompute else ForwardPropagator(bound)
            # Forward solve. Its last sweep records graphs.
            problem = WindowProblem(self.placement, windows.lengths, propagator, spec)
            options = WindowOptions(sweeps=windows.forward, rounding=group.config.rounding)
            u0 = None if entered is None else detach(entered)
            forward = group.solve_by_windows(problem, options, MessageTag(batch.step, "forward"), u0, source=0)
            with group.span("loss"):
                loss, seed = loss_and_seed(bound, forward.output, batch)
            # Adjoint solve, from λ_N. Its last sweep forms parameter gradients.
            problem = WindowProblem(self.placement, windows.lengths, AdjointPropagator(propagator), spec, adjoint=True)
            options = replace(options, sweeps=windows.backward)
            adjoint = group.solve_by_windows(problem, options, MessageTag(batch.step, "adjoint"), seed, source=last)
        add_embedding_gradients(group, entered, adjoint.output)
        return StepGradients(loss, forward.residuals, adjoint.residuals, penalty)

    def couplings(self, batch: StepBatch) -> Tensor:
        """Measure the couplings of the layers (see `mgrit/couplings.py`), in the forward and in the adjoint solve.

        May leave meaningless gradients in `.grad`.

        Returns: see `CouplingTable.squared`.
        """
        group, block = self.group, self.group.block
        bound = block.bind(batch)
        spec, last = group.spec(batch.inputs), group.channel.size - 1
        propagator = ForwardPropagator(bound)
        u0 = detach(bound.enter(batch.inputs)) if block.first else None
        owners, table = self.placement.owners, CouplingTable(len(self.placement.owners), group.device)
        communicator = Communicator(group.channel, MessageTag(batch.step, "forward"))
        output = solve_a_layer_early(owners, propagator, communicator, u0, spec, table.visit_forward, source=0, destination=last)
        _, seed = loss_and_seed(bound, output, batch)
        communicator = Communicator(group.channel, MessageTag(batch.step, "adjoint"))
        solve_a_layer_early(
            owners, AdjointPropagator(propagator), communicator, seed, spec, table.visit_adjoint, source=last, destination=0, adjoint=True
        )
        group.channel.finish()
        return table.squared
