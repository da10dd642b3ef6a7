"""Exact gradients where neighbouring layers are on different workers: microbatches go round the workers, layer after layer.

Each worker takes its first layer for every microbatch, then its second one, and so on: as many virtual pipeline stages as it has layers.
With as many microbatches as workers all are busy, but for the first and the last few layers.

With fewer (a batch that cannot be split, at the extreme) the states' way through the layers and the adjoint's way back are what takes time.
So an adjoint step then forms the input gradient alone, for which the worker before waits. The parameters' gradients, for which nobody
waits, are formed while this worker waits itself.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.engine.batch import StepBatch
from rayllp.engine.block import Block, Moment
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.pipeline import count_microbatches, slices
from rayllp.engine.step_gradients import StepGradients, add_embedding_gradients, loss_and_seed
from rayllp.mgrit.windows import Placement
from rayllp.state import State, detach, like, tensors
from rayllp.timeline import TimedChannel


@dataclass
class _Step:
    """A layer's recorded step for one microbatch.

    Attributes:
        inputs, outputs: with the graph between them; outputs are empty until it is recorded, where only inputs are kept.
    """

    layer: int
    microbatch: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()


@dataclass
class _Microbatch:
    """One microbatch of a step.

    Attributes:
        moment: which the block goes back to when it computes on this microbatch.
        state: what is handed on within this worker: the state after a layer, or the adjoint before it.
    """

    batch: StepBatch
    moment: Moment
    spec: StateSpec
    entered: State | None = None
    state: State | None = None
    steps: dict[int, _Step] = field(default_factory=dict)


class InOrderGradients:
    """Exact gradients on a cyclic placement."""

    def __init__(self, group: LayerGroup) -> None:
        self.group, self.block = group, group.block
        self.placement = Placement.cyclic(group.config.middle_layers, group.config.layer_workers)
        self._layers = self.placement.owned(group.channel.rank)

    def form(self, batch: StepBatch, penalty: object = None) -> StepGradients:
        """Gradients of the batch into `.grad`, part by part of gradient accumulation; the loss, on the last worker."""
        total = torch.zeros((), device=self.block.device, dtype=self.block.dtype)
        for rows in slices(len(batch.samples), self.block.config.accumulate):
            total += self._form_part(batch.part(rows))
        return StepGradients(total)

    def _form_part(self, batch: StepBatch) -> Tensor:
        group = self.group
        channel: Channel = group.channel if group.timeline is None else TimedChannel(group.channel, group.timeline)
        samples = len(batch.samples)
        count = min(samples, count_microbatches(samples, channel.size, group.config.microbatches))
        with group.channel.program(("in order", count, group.spec(batch.inputs))):
            microbatches = [self._begin(batch.part(rows)) for rows in slices(samples, count)]
            self._forward(microbatches, channel, batch.step)
            losses = [self._loss(microbatch) for microbatch in microbatches] if self.block.last else []
            self._adjoint(microbatches, channel, batch.step)
        for microbatch in microbatches:
            self.block.resume(microbatch.moment)
            add_embedding_gradients(group, microbatch.entered, microbatch.state)
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.block.device)

    def _begin(self, batch: StepBatch) -> _Microbatch:
        moment = self.block.begin(batch.step, batch.samples, batch.inputs, training=True)
        return _Microbatch(batch, moment, self.group.spec(batch.inputs))

    # Forward ------------------------------------------------------------------------------------------------------------------

    def _forward(self, microbatches: Sequence[_Microbatch], channel: Channel, step: int) -> None:
        rank, owners, tag = channel.rank, self.placement.owners, MessageTag(step, "forward", "in order")
        final = len(owners) - 1
        for layer in self._layers:
            source = owners[layer - 1] if layer else 0
            target = owners[layer + 1] if layer < final else channel.size - 1
            for number, microbatch in enumerate(microbatches):
                self.block.resume(microbatch.moment)
                if layer == 0:
                    with self.group.span("enter"):
                        microbatch.entered = self.block.enter(microbatch.batch.inputs)
                    state = detach(microbatch.entered)
                elif source == rank:
                    assert microbatch.state is not None
                    state = microbatch.state
                else:
                    state = channel.receive(microbatch.spec, source, tag)
                after = self._record(microbatch, layer, number, state)
                if target == rank:
                    microbatch.state = after
                else:
                    channel.send(after, target, tag)
        if self.block.last and owners[final] != rank:
            for microbatch in microbatches:
                microbatch.state = channel.receive(microbatch.spec, owners[final], tag)

    def _record(self, microbatch: _Microbatch, layer: int, number: int, state: State) -> State:
        """The state after a layer; its graph is kept, or with recomputation its input alone."""
        step = microbatch.steps[layer] = _Step(layer, number, tuple(part.detach().requires_grad_() for part in tensors(state)))
        with self.group.span("forward"):
            outputs = self._run(step, state)
        if not self.block.config.mgrit.recompute:
            step.outputs = outputs
        return like(state, tuple(part.detach() for part in outputs))

    def _run(self, step: _Step, state: State) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return tensors(self.block.layer(step.layer + self.block.config.buffers.open, like(state, step.inputs)))

    def _loss(self, microbatch: _Microbatch) -> Tensor:
        """Of one microbatch; its adjoint takes the place of its state."""
        self.block.resume(microbatch.moment)
        with self.group.span("loss"):
            batch = microbatch.batch
            loss, microbatch.state = loss_and_seed(self.block, microbatch.state, batch.targets, batch.scale)
        return loss

    # Adjoint ------------------------------------------------------------------------------------------------------------------

    def _adjoint(self, microbatches: Sequence[_Microbatch], channel: Channel, step: int) -> None:
        rank, owners, tag = channel.rank, self.placement.owners, MessageTag(step, "adjoint", "in order")
        final = len(owners) - 1
        if self.block.last and owners[final] != rank:
            for microbatch in microbatches:
                assert microbatch.state is not None
                channel.send(microbatch.state, owners[final], tag)
        later = _DeferredParameterGradients(self.block, self.group)
        waits = len(microbatches) < channel.size
        for layer in reversed(self._layers):
            source = owners[layer + 1] if layer < final else channel.size - 1
            target = owners[layer - 1] if layer else 0
            for microbatch in microbatches:
                if source == rank:
                    assert microbatch.state is not None
                    lam = microbatch.state
                else:
                    while not channel.arrived(microbatch.spec, source) and later.advance():
                        pass
                    lam = channel.receive(microbatch.spec, source, tag)
                self.block.resume(microbatch.moment)
                before = self._pull(microbatch, layer, lam, later if waits else None)
                if target == rank:
                    microbatch.state = before
                else:
                    channel.send(before, target, tag)
        while later.advance():
            pass
        if self.block.first and self.placement.owners[0] != rank:
            raise AssertionError("the first worker owns the first layer")

    def _pull(self, microbatch: _Microbatch, layer: int, lam: State, later: "_DeferredParameterGradients | None") -> State:
        """λ before a layer from λ after it; its parameters' gradients are added now, or left to `later`."""
        step = microbatch.steps.pop(layer)
        with self.group.span("adjoint"):
            if not step.outputs:
                step.outputs = self._run(step, lam)
            leaves = self.block.leaves(layer + self.block.config.buffers.open)
            if later is None:
                torch.autograd.backward(step.outputs, tensors(lam), inputs=[*step.inputs, *leaves])
                return like(lam, tuple(torch.zeros_like(part) if part.grad is None else part.grad for part in step.inputs))
            found = torch.autograd.grad(step.outputs, step.inputs, tensors(lam), retain_graph=True, materialize_grads=True)
            later.add(step, tensors(lam), leaves)
        return like(lam, found)


class _DeferredParameterGradients:
    """Parameter gradients that nobody waits for, in the order in which they were put off."""

    def __init__(self, block: Block, group: LayerGroup) -> None:
        self._block, self._group = block, group
        self._steps: deque[tuple[_Step, tuple[Tensor, ...], list[torch.nn.Parameter]]] = deque()

    def add(self, step: _Step, lam: tuple[Tensor, ...], leaves: list[torch.nn.Parameter]) -> None:
        """Put off one layer's, for λ at its output."""
        self._steps.append((step, lam, leaves))

    def advance(self) -> bool:
        """Form one layer's; False if none is left."""
        if not self._steps:
            return False
        step, lam, leaves = self._steps.popleft()
        if leaves:
            with self._group.span("adjoint"):
                torch.autograd.backward(step.outputs, lam, inputs=leaves)
        return True
