"""What forms a step's gradients on one worker: layer-parallel by MGRIT, exactly, or by TorchBraid.

Each adds the gradients of scale × summed loss to `.grad` of this worker's parameters; over other workers and replicas they are summed
afterwards (`reduce_gradients.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayllp.channel.base import MessageTag
from rayllp.engine.batch import StepBatch
from rayllp.engine.block import Block
from rayllp.engine.consistency import Consistency, Interval
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.pipeline import Pipeline, PlainAutograd, exact_method, slices
from rayllp.engine.step_solves import StepSolves
from rayllp.engine.torchbraid_solver import TorchBraidSolver
from rayllp.engine.trajectory import AdjointPropagator, ForwardPropagator, Trajectory
from rayllp.mgrit import MGRITResult, Problem
from rayllp.state import State, detach, like, tensors


@dataclass(frozen=True)
class StepGradients:
    """What forming gradients yields besides the gradients themselves.

    Attributes:
        loss: scaled, on the last worker; 0 elsewhere.
        forward, backward: the solves of the last part of the batch; None where nothing was solved iteratively.
        penalty: the consistency penalty, with its value; None where its weight is 0.
    """

    loss: Tensor
    forward: MGRITResult | None = None
    backward: MGRITResult | None = None
    penalty: Consistency | None = None


class Gradients:
    """Forms the gradients of a step in the way that its accuracy asks for.

    Attributes:
        parallel: for steps that are solved in parallel over the layers.
        exact: for serial ones.
    """

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self.exact = ExactGradients(group)
        self.parallel: LayerParallelGradients | TorchBraidGradients
        self.parallel = TorchBraidGradients(group) if group.config.solver == "torchbraid" else LayerParallelGradients(group)

    def __call__(self, batch: StepBatch) -> StepGradients:
        """Gradients of this replica's batch into `.grad`. All workers of the layer group call it."""
        accuracy, block = batch.accuracy, self.group.block
        penalty = make_penalty(block, self.group.solves(accuracy), accuracy.consistency) if accuracy.consistency else None
        return self.exact.form(batch, penalty) if accuracy.serial else self.parallel.form(batch, penalty)

    def forget(self) -> None:
        """Drop the gradients that are there."""
        for parameter in self.group.block.parameters.values():
            parameter.grad = None


class LayerParallelGradients:
    """MGRIT forward and adjoint. With one level each this is exact, layer after layer."""

    def __init__(self, group: LayerGroup) -> None:
        self.group = group

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Gradients of the batch, part by part of gradient accumulation."""
        return _in_parts(self._form_part, batch, penalty, self.group.block)

    def _form_part(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        group, block, step = self.group, self.group.block, batch.step
        solves = group.solves(batch.accuracy)
        block.begin(step, batch.samples, batch.inputs, training=True)
        spec = group.spec(batch.inputs)
        with group.channel.program((solves.accuracy, spec) if solves.has_fixed_messages else None):
            with group.span("enter"):
                entered = block.enter(batch.inputs) if block.first else None
            trajectory = Trajectory(block, solves.c_points, block.config.mgrit.recompute)
            deferred = trajectory.deferred
            # Forward solve: its last sweep records graphs, but for the runs that it defers.
            problem = Problem(solves.forward, ForwardPropagator(trajectory), spec)
            u0 = None if entered is None else detach(entered)
            forward = group.solve(problem, solves.forward_options, MessageTag(step, "forward"), u0, defer_to=deferred)
            with group.span("loss"):
                loss, seed = torch.zeros((), device=group.device), None
                if block.last:
                    loss, seed = loss_and_seed(block, forward.output, batch.targets, batch.scale)
            # Adjoint solve, from λ_N: its last sweep forms parameter gradients. While it waits, it records what was deferred.
            problem = Problem(solves.adjoint, AdjointPropagator(trajectory, penalty), spec)
            backward = group.solve(problem, solves.adjoint_options, MessageTag(step, "adjoint"), seed, while_waiting=deferred)
        add_embedding_gradients(group, entered, backward.output)
        return StepGradients(loss, forward, backward, penalty)


class ExactGradients:
    """Plain autograd on one worker, torch's 1F1B pipeline on several; where neither can be, MGRIT on one level.

    Attributes:
        method: the first two; None before the first step, and where neither can be.
    """

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self.method: PlainAutograd | Pipeline | None = None
        self._fallback = LayerParallelGradients(group)

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Exact gradients of the batch."""
        group = self.group
        self.method = self.method or exact_method(group.block, group.channel, batch.inputs, len(batch.samples))
        if self.method is None:
            return replace(self._fallback.form(batch, penalty), forward=None, backward=None)
        self.method.timeline = group.timeline
        return StepGradients(self.method.step(batch, penalty), penalty=penalty)


class TorchBraidGradients:
    """The forward and the adjoint by TorchBraid, which is loaded at the first step."""

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self._solver: TorchBraidSolver | None = None

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Gradients of the batch, part by part of gradient accumulation.

        Raises:
            SettingsError: TorchBraid is missing, or cannot do this.
        """
        return _in_parts(self._form_part, batch, penalty, self.group.block)

    def _form_part(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        group, block = self.group, self.group.block
        block.begin(batch.step, batch.samples, batch.inputs, training=True)
        if self._solver is None:
            self._solver = TorchBraidSolver(block, group.channel, group.config)
        spec = group.spec(batch.inputs)
        entered = block.enter(batch.inputs) if block.first else None
        empty = torch.empty(spec.shapes[0], dtype=spec.dtypes[0], device=group.device)
        output = self._solver.forward(None if entered is None else detach(entered), empty, batch.accuracy)
        loss, seed = torch.zeros((), device=group.device), None
        if block.last:
            loss, seed = loss_and_seed(block, output, batch.targets, batch.scale)
        add_embedding_gradients(group, entered, self._solver.adjoint(seed))
        return StepGradients(loss, penalty=penalty)


def _in_parts(
    form: Callable[[StepBatch, Consistency | None], StepGradients], batch: StepBatch, penalty: Consistency | None, block: Block
) -> StepGradients:
    """Form gradients part by part of gradient accumulation; the losses' sum, and the last part's solves."""
    total, found = torch.zeros((), device=block.device, dtype=block.dtype), None
    for rows in slices(len(batch.samples), block.config.accumulate):
        found = form(batch.part(rows), penalty)
        total += found.loss
    assert found is not None
    return replace(found, loss=total)


def make_penalty(block: Block, solves: StepSolves, weight: float) -> Consistency:
    """The consistency penalty of one gradient computation, over this worker's coarse intervals."""
    start = block.middle.start - block.config.buffers.open
    stop, c = start + len(block.middle), solves.interval
    intervals = {n: Interval(n, min(n + c, stop), solves.forward_options.coarse_step_weight) for n in range(start, stop, c)}
    value = torch.zeros((), dtype=torch.float64, device=block.device)
    return Consistency(weight / block.config.batch_size, intervals, value)


def loss_and_seed(block: Block, output: State | None, targets: Tensor, scale: float) -> tuple[Tensor, State]:
    """The loss times `scale`, and its gradient λ_N at the last middle layer's output; adds gradients of closing buffers and head.

    Args:
        output: the state after the last middle layer, on the last worker.
    """
    assert output is not None
    leaves = tuple(part.detach().requires_grad_() for part in tensors(output))
    loss = block.architecture.training_loss(block.leave(like(output, leaves)), targets) * scale
    loss.backward()
    seed = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    return loss.detach(), like(output, seed)


def add_embedding_gradients(group: LayerGroup, entered: State | None, adjoint: State | None) -> None:
    """Add gradients of embedding and opening buffers, on the first worker.

    Args:
        entered: the state before the first middle layer, with its graph.
        adjoint: λ_0, the loss's gradient there.
    """
    if entered is None or adjoint is None:
        return
    # An embedding without parameters has no graph.
    seeds = [(state, lam) for state, lam in zip(tensors(entered), tensors(adjoint), strict=True) if state.requires_grad]
    if seeds:
        with group.span("enter"):
            torch.autograd.backward([state for state, _ in seeds], [lam for _, lam in seeds])
