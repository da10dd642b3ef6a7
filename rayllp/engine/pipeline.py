"""Exact gradients in serial mode, over the blocks of layers that parallel solves have, too.

Several workers run the 1F1B schedule of torch.distributed.pipelining over microbatches, so that no layer moves when training switches from
parallel to serial. One worker runs plain autograd.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayllp.data.base import Inputs
from rayllp.engine.batch import StepBatch
from rayllp.engine.block import Block, BoundBlock
from rayllp.engine.consistency import Consistency, PenaltyHooks
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.step_gradients import StepGradients
from rayllp.state import State, combine, tensors


class StageModule(nn.Module):
    """A worker's block as one pipeline stage: takes inputs or a state, returns a state or outputs.

    Attributes:
        microbatches: the block, bound to the samples of each microbatch in the order in which their forwards begin.
        penalty: the consistency penalty; None if its weight is 0.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.pieces = nn.ModuleList(module for _, _, module in block.pieces())
        self.microbatches: Iterator[BoundBlock] = iter(())
        self.penalty: Consistency | None = None

    def forward(self, *parts: Tensor) -> State:
        """Run the next microbatch through this worker's block."""
        return self.run(next(self.microbatches), parts[0] if len(parts) == 1 else parts)

    def run(self, bound: BoundBlock, state: State | Inputs) -> State:
        """Run a microbatch through this worker's block, with embedding and head if it owns them."""
        block = self.block
        if block.first:
            state = bound.enter(state)
        recompute = block.config.recompute and torch.is_grad_enabled()
        for layers, hooks in self._intervals() if recompute or self.penalty else ((block.indices, None),):
            if recompute:
                state = checkpoint(self._run, bound, state, layers, hooks, use_reentrant=False, preserve_rng_state=False)
            else:
                state = self._run(bound, state, layers, hooks)
        return bound.leave(state) if block.last else state

    def _intervals(self) -> Iterator[tuple[Sequence[int], PenaltyHooks | None]]:
        """Yield the block's layers of the solve in intervals, with hooks for the penalty if there is one.

        The intervals are the penalty's, or else c_f layers each, from the block's first of these layers on.
        """
        block, indices, c = self.block, self.block.indices, self.block.config.fine_coarsening
        if self.penalty is not None:
            for start, interval in self.penalty.intervals.items():
                yield range(block.index(start), block.index(interval.stop)), self.penalty.hooks(start)
            return
        for start in range(indices[0], indices[-1] + 1, c):
            yield range(start, min(start + c, indices[-1] + 1)), None

    @staticmethod
    def _run(bound: BoundBlock, state: State, layers: Sequence[int], hooks: PenaltyHooks | None) -> State:
        if hooks is None:
            for n in layers:
                state = bound.layer(n, state)
            return state
        state = hooks.first(bound.layer(layers[0], hooks.begin(state)))
        for n in layers[1:]:
            state = bound.layer(n, state)
        return hooks.end(state)


class PlainAutograd:
    """Exact gradients where the whole network is on one worker."""

    def __init__(self, group: LayerGroup) -> None:
        self.group, self.module = group, StageModule(group.block)

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Add the gradients of these samples to `.grad`."""
        block, self.module.penalty = self.group.block, penalty
        bound = block.bind(batch)
        with self.group.span("forward"):
            outputs = self.module.run(bound, batch.inputs)
            assert isinstance(outputs, Tensor)
            loss = block.architecture.training_loss(outputs, batch.targets) * batch.scale
        with self.group.span("adjoint"):
            loss.backward()
        return StepGradients(loss.detach(), penalty=penalty)


class Pipeline:
    """One worker's end of torch's 1F1B schedule, over the microbatches of a whole batch.

    The schedule is built for the first batch. All others have its shapes.

    Args:
        group: this worker's end of the layer group.
        processes: the process group of the workers.
        microbatches: number of microbatches, at least as many as workers.
    """

    def __init__(self, group: LayerGroup, processes: dist.ProcessGroup, microbatches: int) -> None:
        self.group, self.module, self.microbatches = group, StageModule(group.block), microbatches
        self._processes = processes
        self._schedule: Any = None
        self._scale = 1.0

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Add the gradients of the batch to `.grad`."""
        block, timeline = self.group.block, self.group.timeline
        if self._schedule is None:
            self._schedule = self._build(batch.inputs)
        self._scale, self.module.penalty = batch.scale, penalty
        self.module.microbatches = map(block.bind, batch.parts(self.microbatches))
        losses: list[Tensor] = []
        first, began = (len(timeline.spans), timeline.clock()) if timeline is not None else (0, 0.0)
        self._schedule.step(
            *(tensors(batch.inputs) if block.first else ()),
            target=batch.targets if block.last else None,
            losses=losses if block.last else None,
            return_outputs=False,
        )
        if timeline is not None:
            timeline.fill(first, began)
        loss = torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros((), device=block.device)
        return StepGradients(loss, penalty=penalty)

    def _build(self, inputs: Inputs) -> Any:
        """Return the schedule for batches with inputs of these shapes."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B  # takes a second, so only where it is needed

        block, rank, size = self.group.block, dist.get_rank(self._processes), dist.get_world_size(self._processes)
        samples = tensors(inputs)[0].shape[0] // self.microbatches
        small = combine(lambda part: part[:samples], inputs)
        spec = self.group.spec(small)
        like = list(zip(spec.shapes, spec.dtypes, strict=True))
        # torch's stages send gradients back only for tensors that have requires_grad here.
        state = tuple(torch.empty(s, dtype=d, device="meta", requires_grad=d.is_floating_point) for s, d in like)
        entering = tuple(part.to("meta") for part in tensors(small))
        outputs: tuple[Tensor, ...] = state
        if block.last:
            with torch.no_grad():
                outputs = (block.bind_for_evaluation(small).leave(spec.zeros()).to("meta").requires_grad_(),)
        stage = PipelineStage(
            self.module, rank, size, block.device,
            input_args=entering if block.first else state, output_args=outputs,
            input_grads=(None,) * len(entering) if block.first else state, output_grads=None if block.last else outputs,
            group=self._processes,
        )  # fmt: skip
        for solve, name in (("forward", "forward_one_chunk"), ("adjoint", "backward_one_chunk")):
            setattr(stage, name, self._timed(getattr(stage, name), solve))
        return Schedule1F1B(stage, self.microbatches, loss_fn=self._loss, scale_grads=False)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.group.block.architecture.training_loss(outputs, targets) * self._scale

    def _timed(self, method: Callable[..., Any], solve: str) -> Callable[..., Any]:
        """Return the stage's forward or backward of one microbatch, recorded as a span if there is a timeline."""

        def timed(*arguments: Any, **named: Any) -> Any:
            timeline = self.group.timeline
            if timeline is None:
                return method(*arguments, **named)
            timeline.begin_solve(solve)("microbatch", 0)
            begin = timeline.clock()
            result = method(*arguments, **named)
            timeline.add(begin, "compute")
            return result

        return timed
