"""Exact gradients in serial mode, over the same blocks of layers.

Several workers run the 1F1B schedule of torch.distributed.pipelining over microbatches, so that no layer moves when training switches from
parallel to serial. One worker runs plain autograd. Where neither is possible, the caller solves exactly by MGRIT on one level.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayllp.channel.base import Channel
from rayllp.channel.process_channel import ProcessChannel
from rayllp.data.base import Inputs
from rayllp.engine.batch import StepBatch
from rayllp.engine.block import Block, BoundBlock
from rayllp.engine.consistency import Consistency, PenaltyHooks
from rayllp.errors import SettingsError
from rayllp.state import State, combine, tensors
from rayllp.timeline import Timeline, span_on


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
        for layers, hooks in self._intervals() if recompute or self.penalty else ((block.middle, None),):
            if recompute:
                state = checkpoint(self._run, bound, state, layers, hooks, use_reentrant=False, preserve_rng_state=False)
            else:
                state = self._run(bound, state, layers, hooks)
        return bound.leave(state) if block.last else state

    def _intervals(self) -> Iterator[tuple[Sequence[int], PenaltyHooks | None]]:
        """Yield the block's middle layers in intervals, with hooks for the penalty if there is one.

        The intervals are the penalty's, or else c_f layers each, from the block's first middle layer on.
        """
        block, middle, c = self.block, self.block.middle, self.block.config.fine_coarsening
        if self.penalty is not None:
            for start, interval in self.penalty.intervals.items():
                yield range(block.index(start), block.index(interval.stop)), self.penalty.hooks(start)
            return
        for start in range(middle[0], middle[-1] + 1, c):
            yield range(start, min(start + c, middle[-1] + 1)), None

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


def slices(batch: int, parts: int) -> Iterator[slice]:
    """Yield the slices that cut a batch into equal parts."""
    size = batch // parts
    yield from (slice(start, start + size) for start in range(0, batch, size))


def exact_method(block: Block, layers: Channel, inputs: Inputs, batch: int) -> "PlainAutograd | Pipeline | None":
    """Return what forms exact gradients on this worker: plain autograd if it holds all layers, else the 1F1B pipeline.

    Args:
        block: this worker's layers.
        layers: the channel of the layer group.
        inputs: inputs of a batch, for their shapes.
        batch: number of samples in a batch.

    Returns: None if the channel has no process group, or if the batch cannot be cut into enough microbatches.
    """
    if layers.size == 1:
        return PlainAutograd(block)
    group = layers.group if isinstance(layers, ProcessChannel) else None
    parts = block.config.accumulate
    microbatches = parts * count_microbatches(batch // parts, layers.size, block.config.microbatches)
    return None if group is None or microbatches < layers.size else Pipeline(block, group, inputs, microbatches)


class PlainAutograd:
    """Exact gradients where the whole network is on one worker."""

    def __init__(self, block: Block) -> None:
        self.block, self.module = block, StageModule(block)
        self.timeline: Timeline | None = None

    def step(self, batch: StepBatch, penalty: Consistency | None) -> Tensor:
        """Add the gradients of scale × summed loss to `.grad`, part by part of gradient accumulation. Returns the scaled loss."""
        block, self.module.penalty = self.block, penalty
        total = torch.zeros((), device=block.device, dtype=block.dtype)
        for rows in slices(len(batch.samples), block.config.accumulate):
            part = batch.part(rows)
            bound = block.bind(part.step, part.samples, part.inputs, training=True)
            with span_on(self.timeline, "forward"):
                outputs = self.module.run(bound, part.inputs)
                assert isinstance(outputs, Tensor)
                loss = block.architecture.training_loss(outputs, part.targets) * part.scale
            with span_on(self.timeline, "adjoint"):
                loss.backward()
            total += loss.detach()
        return total


def count_microbatches(batch: int, workers: int, wanted: int | None, *, fewest: bool = False) -> int:
    """Return the number of microbatches for `batch` sequences: as `wanted`, or else the batch's largest divisor up to 4 a worker.

    One worker has nothing to overlap, and always takes one.

    Args:
        fewest: take the smallest divisor that keeps all workers busy instead, if there is one.
    """
    if workers == 1:
        return 1
    if wanted:
        return wanted
    divisors = [m for m in range(1, 4 * workers + 1) if batch % m == 0]
    return next((m for m in divisors if fewest and m >= workers), divisors[-1])


class Pipeline:
    """One worker's end of the 1F1B schedule. It is built once, and runs every training step in serial mode.

    Args:
        block: this worker's layers.
        group: the process group of the workers.
        inputs: inputs of a batch, for their shapes.
        microbatches: number of microbatches.

    Raises:
        SettingsError: fewer microbatches than workers (the caller then solves exactly without microbatches).
    """

    def __init__(self, block: Block, group: dist.ProcessGroup, inputs: Inputs, microbatches: int) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B  # takes a second, so only where it is needed

        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if microbatches < size:
            raise SettingsError(f"1F1B needs at least {size} microbatches for {size} workers; got {microbatches}")
        self.block, self.microbatches = block, microbatches
        self.module = StageModule(block)
        self.part = tensors(inputs)[0].shape[0] // microbatches
        small = combine(lambda part: part[: self.part], inputs)
        spec = block.architecture.state_spec(small, block.dtype, block.device)
        like = list(zip(spec.shapes, spec.dtypes, strict=True))
        # torch's stages send gradients back only for tensors that have requires_grad here.
        state = tuple(torch.empty(s, dtype=d, device="meta", requires_grad=d.is_floating_point) for s, d in like)
        entering = tuple(part.to("meta") for part in tensors(small))
        outputs: tuple[Tensor, ...] = state
        if block.last:
            with torch.no_grad():
                bound = block.bind(0, range(self.part), small, training=False)
                outputs = (bound.leave(spec.zeros()).to("meta").requires_grad_(),)
        stage = PipelineStage(
            self.module, rank, size, block.device,
            input_args=entering if block.first else state, output_args=outputs,
            input_grads=(None,) * len(entering) if block.first else state, output_grads=None if block.last else outputs,
            group=group,
        )  # fmt: skip
        self.timeline: Timeline | None = None
        for solve, name in (("forward", "forward_one_chunk"), ("adjoint", "backward_one_chunk")):
            setattr(stage, name, self._timed(getattr(stage, name), solve))
        self.schedule = Schedule1F1B(stage, microbatches, loss_fn=self._loss, scale_grads=False)
        self.scale = 1.0

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.block.architecture.training_loss(outputs, targets) * self.scale

    def _timed(self, method: Callable[..., Any], solve: str) -> Callable[..., Any]:
        """Return the stage's forward or backward of one microbatch, recorded as a span if there is a timeline."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if self.timeline is None:
                return method(*arguments, **named)
            self.timeline.begin_solve(solve)("microbatch", 0)
            begin = self.timeline.clock()
            result = method(*arguments, **named)
            self.timeline.add(begin, "compute")
            return result

        return timed

    def step(self, batch: StepBatch, penalty: Consistency | None) -> Tensor:
        """Add the gradients of scale × summed loss to `.grad`. Returns the scaled loss on the last worker, 0 elsewhere."""
        self.scale, self.module.penalty = batch.scale, penalty
        parts = (batch.part(rows) for rows in slices(len(batch.samples), self.microbatches))
        self.module.microbatches = (self.block.bind(part.step, part.samples, part.inputs, training=True) for part in parts)
        losses: list[Tensor] = []
        first, began = (len(self.timeline.spans), self.timeline.clock()) if self.timeline else (0, 0.0)
        self.schedule.step(
            *(tensors(batch.inputs) if self.block.first else ()),
            target=batch.targets if self.block.last else None,
            losses=losses if self.block.last else None,
            return_outputs=False,
        )
        if self.timeline is not None:
            self.timeline.fill(first, began)
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros((), device=self.block.device)
