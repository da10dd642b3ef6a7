"""The ways to form a step's gradients on one worker: layer-parallel (MGRIT or windows), exactly, or with TorchBraid.

Each of them adds the gradients of scale × summed loss to `.grad` of this worker's parameters. Sums over other workers and replicas are
formed afterwards (`reduce_gradients.py`, `replica_sums.py`).
"""

from dataclasses import replace

import torch

from rayllp.channel.base import MessageTag
from rayllp.channel.process_channel import ProcessChannel
from rayllp.engine.batch import StepBatch, count_microbatches
from rayllp.engine.block import Block
from rayllp.engine.consistency import Consistency, Interval
from rayllp.engine.in_order import InOrderGradients
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.pipeline import Pipeline, PlainAutograd
from rayllp.engine.propagators import AdjointPropagator, ForwardPropagator, RecomputingPropagator
from rayllp.engine.step_gradients import StepGradients, add_embedding_gradients, loss_and_seed
from rayllp.engine.step_solves import StepSolves
from rayllp.engine.torchbraid_solver import TorchBraidSolver
from rayllp.engine.window_gradients import WindowGradients
from rayllp.mgrit import Problem
from rayllp.state import detach


class Gradients:
    """Forms the gradients of a step in the way that the step's accuracy asks for.

    Attributes:
        parallel: forms them in steps that are solved in parallel over the layers.
        exact: forms them in serial steps.
    """

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self.parallel: MGRITGradients | WindowGradients | TorchBraidGradients
        if group.config.placement == "cyclic":
            self.parallel = WindowGradients(group)
        elif group.config.solver == "torchbraid":
            self.parallel = TorchBraidGradients(group)
        else:
            self.parallel = MGRITGradients(group)
        self.exact = exact_gradients(group)

    def __call__(self, batch: StepBatch) -> StepGradients:
        """Add the gradients of this replica's batch to `.grad`, part by part of gradient accumulation.

        All workers of the layer group call it.

        Returns: the outcome with the sum of all parts' losses, and the last part's residuals.
        """
        accuracy, block = batch.accuracy, self.group.block
        penalty = make_penalty(block, self.group.solves(accuracy), accuracy.consistency) if accuracy.consistency else None
        method = self.exact if accuracy.serial else self.parallel
        # The pipeline runs the microbatches of all parts in one schedule.
        count = 1 if isinstance(method, Pipeline) else block.config.accumulate
        total, found = torch.zeros((), device=block.device, dtype=block.dtype), None
        for part in batch.parts(count):
            found = method.form(part, penalty)
            total += found.loss
        assert found is not None
        return replace(found, loss=total)

    def forget(self) -> None:
        """Drop all gradients in `.grad`."""
        for parameter in self.group.block.parameters.values():
            parameter.grad = None


class MGRITGradients:
    """Gradients by MGRIT, forward and adjoint. With one level in each the result is exact, computed layer after layer."""

    def __init__(self, group: LayerGroup) -> None:
        self.group = group

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Add the gradients of these samples to `.grad`."""
        group, block, step = self.group, self.group.block, batch.step
        solves = group.solves(batch.accuracy)
        bound = block.bind(batch)
        spec = group.spec(batch.inputs)
        with group.channel.prepost_receives((solves.accuracy, spec) if solves.has_fixed_messages else None):
            with group.span("enter"):
                entered = bound.enter(batch.inputs) if block.first else None
            propagator = (RecomputingPropagator if block.config.recompute else ForwardPropagator)(bound, solves.c_points)
            deferred = propagator.deferred
            # Forward solve. Its last sweep records graphs, apart from those of the runs that it defers.
            problem = Problem(solves.forward, propagator, spec)
            u0 = None if entered is None else detach(entered)
            forward = group.solve_by_mgrit(problem, solves.forward_options, MessageTag(step, "forward"), u0, defer_to=deferred)
            with group.span("loss"):
                loss, seed = loss_and_seed(bound, forward.output, batch)
            # Adjoint solve, from λ_N. Its last sweep forms parameter gradients. While it waits for messages, deferred runs are recorded.
            problem = Problem(solves.adjoint, AdjointPropagator(propagator, penalty), spec)
            adjoint = group.solve_by_mgrit(problem, solves.adjoint_options, MessageTag(step, "adjoint"), seed, while_waiting=deferred)
        add_embedding_gradients(group, entered, adjoint.output)
        if batch.accuracy.serial:  # on one level there are no residuals
            return StepGradients(loss, penalty=penalty)
        return StepGradients(loss, forward.residuals, adjoint.residuals, penalty)


class TorchBraidGradients:
    """Gradients by TorchBraid, forward and adjoint. TorchBraid is loaded in the first step."""

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self._solver: TorchBraidSolver | None = None

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Add the gradients of these samples to `.grad`.

        Raises:
            SettingsError: TorchBraid is missing, or cannot solve this network.
        """
        group, block = self.group, self.group.block
        bound = block.bind(batch)
        if self._solver is None:
            self._solver = TorchBraidSolver(block, group.channel, group.config)
        spec = group.spec(batch.inputs)
        entered = bound.enter(batch.inputs) if block.first else None
        empty = torch.empty(spec.shapes[0], dtype=spec.dtypes[0], device=group.device)
        output = self._solver.forward(bound, None if entered is None else detach(entered), empty, batch.accuracy)
        loss, seed = loss_and_seed(bound, output, batch)
        add_embedding_gradients(group, entered, self._solver.adjoint(seed))
        return StepGradients(loss, penalty=penalty)


def exact_gradients(group: LayerGroup) -> PlainAutograd | InOrderGradients | Pipeline | MGRITGradients:
    """Return the object that forms exact gradients on this worker.

    A single worker runs plain autograd. Several workers pass states from layer to layer on a cyclic placement, and run torch's 1F1B
    pipeline on blocks. MGRIT on one level takes the pipeline's place where the channel has no process group, or where a batch has too few
    microbatches to keep all workers busy.
    """
    config, channel = group.config, group.channel
    if channel.size == 1:
        return PlainAutograd(group)
    if config.placement == "cyclic":
        return InOrderGradients(group)
    processes = channel.group if isinstance(channel, ProcessChannel) else None
    microbatches = config.accumulate * count_microbatches(config.replica_batch // config.accumulate, channel.size, config.microbatches)
    if processes is None or microbatches < channel.size:
        return MGRITGradients(group)
    return Pipeline(group, processes, microbatches)


def make_penalty(block: Block, solves: StepSolves, weight: float) -> Consistency:
    """Return the consistency penalty for one computation of gradients, over this worker's coarse intervals.

    Args:
        block: this worker's layers.
        solves: how the step is solved, which says where the intervals are.
        weight: the penalty's weight μ.
    """
    start, stop, c = block.solved[0], block.solved[-1] + 1, solves.interval
    intervals = {n: Interval(n, min(n + c, stop), solves.forward_options.coarse_step_weight) for n in range(start, stop, c)}
    value = torch.zeros((), dtype=torch.float64, device=block.device)
    return Consistency(weight / block.config.batch_size, intervals, value)
