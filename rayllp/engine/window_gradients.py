"""Gradients by windows, where neighbouring layers are on different workers and are solved together, by windows of fixed lengths
(`rayllp/mgrit/windows.py`) or a rolling one (`rayllp/mgrit/rolling.py`).
"""

from rayllp.channel.base import MessageTag
from rayllp.engine.batch import StepBatch
from rayllp.engine.consistency import Consistency
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.propagators import AdjointPropagator, ForwardPropagator, RecomputingPropagator
from rayllp.engine.step_gradients import StepGradients, add_embedding_gradients, loss_and_seed
from rayllp.mgrit import Propagator, Solution
from rayllp.mgrit.rolling import ADJOINT_TOLERANCE, RollingOptions, RollingProblem
from rayllp.mgrit.windows import WindowOptions, WindowProblem
from rayllp.state import State, detach


class WindowGradients:
    """Gradients by Picard sweeps over the layers of a window, forward and adjoint."""

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self.placement = group.config.cyclic_placement

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Add the gradients of these samples to `.grad`."""
        group, block, accuracy = self.group, self.group.block, batch.accuracy
        bound, last, rolls = block.bind(batch), group.channel.size - 1, accuracy.tolerance is not None
        # The messages of a rolling window are not known beforehand.
        with group.channel.prepost_receives(None if rolls else (accuracy.windows, group.spec(batch.inputs))):
            with group.span("enter"):
                entered = bound.enter(batch.inputs) if block.first else None
            if block.config.recompute:
                propagator: ForwardPropagator = RecomputingPropagator(bound, checkpoints={*block.solved}, splits=rolls)
            else:
                propagator = ForwardPropagator(bound, splits=rolls)
            # Forward solve. Its last sweep records graphs.
            u0 = None if entered is None else detach(entered)
            forward = self._solve(batch, "forward", propagator, u0, source=0)
            with group.span("loss"):
                loss, seed = loss_and_seed(bound, forward.output, batch)
            # Adjoint solve, from λ_N, which forms parameter gradients, too.
            adjoint = self._solve(batch, "adjoint", AdjointPropagator(propagator), seed, source=last)
        add_embedding_gradients(group, entered, adjoint.output)
        return StepGradients(loss, forward.residuals, adjoint.residuals, penalty)

    def _solve(self, batch: StepBatch, solve: str, propagator: Propagator, initial: State | None, *, source: int) -> Solution:
        """Solve forward, or the adjoint, as accurately as the batch's accuracy says."""
        group, accuracy, adjoint = self.group, batch.accuracy, solve == "adjoint"
        spec, tag, rounding = group.spec(batch.inputs), MessageTag(batch.step, solve), group.config.rounding
        if accuracy.tolerance is not None:
            tolerance = accuracy.tolerance * (ADJOINT_TOLERANCE if adjoint else 1)
            rolling = RollingProblem(self.placement, group.config.longest_window, propagator, spec, adjoint)
            options = RollingOptions(tolerance=tolerance, rounding=rounding)
            return group.solve_by_rolling(rolling, options, tag, initial, source=source)
        assert accuracy.windows is not None
        sweeps = accuracy.windows.backward if adjoint else accuracy.windows.forward
        fixed = WindowProblem(self.placement, accuracy.windows.lengths, propagator, spec, adjoint)
        return group.solve_by_windows(fixed, WindowOptions(sweeps=sweeps, rounding=rounding), tag, initial, source=source)
