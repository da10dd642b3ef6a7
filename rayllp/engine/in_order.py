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
from rayllp.engine.consistency import Consistency
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.pipeline import count_microbatches, slices
from rayllp.engine.step_gradients import StepGradients, add_embedding_gradients, in_parts, loss_and_seed
from rayllp.engine.trajectory import Graph, input_gradients, record_graph
from rayllp.mgrit.windows import Placement
from rayllp.state import State, detach, like, tensors
from rayllp.timeline import TimedChannel


@dataclass
class _Microbatch:
    """One microbatch of a step.

    Attributes:
        moment: which the block goes back to when it computes on this microbatch.
        state: what is handed on within this worker: the state after a layer, or the adjoint before it.
        graphs: of this worker's layers; with recomputation their outputs are empty until they are made again.
    """

    batch: StepBatch
    moment: Moment
    spec: StateSpec
    entered: State | None = None
    state: State | None = None
    graphs: dict[int, Graph] = field(default_factory=dict)


class InOrderGradients:
    """Exact gradients on a cyclic placement."""

    def __init__(self, group: LayerGroup) -> None:
        self.group, self.block = group, group.block
        self.placement = Placement.cyclic(group.config.middle_layers, group.config.layer_workers)
        self._layers = self.placement.owned(group.channel.rank)

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Gradients of the batch into `.grad`, part by part of gradient accumulation; the loss, on the last worker."""
        return in_parts(self._form_part, batch, penalty, self.block)

    def _form_part(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        group = self.group
        channel: Channel = group.channel if group.timeline is None else TimedChannel(group.channel, group.timeline)
        samples = len(batch.samples)
        # Every layer of a microbatch is two messages, and 1F1B's many would fill no bubble here.
        count = min(samples, count_microbatches(samples, channel.size, group.config.microbatches, fewest=True))
        if channel.sends_wait and self._sends_back(channel.size):
            count = 1  # else each of two has a microbatch to send to the other before it takes one back
        with group.channel.program(("in order", count, group.spec(batch.inputs))):
            microbatches = [self._begin(batch.part(rows)) for rows in slices(samples, count)]
            self._forward(microbatches, channel, batch.step)
            losses = [self._loss(microbatch) for microbatch in microbatches] if self.block.last else []
            self._adjoint(microbatches, channel, batch.step)
        for microbatch in microbatches:
            self.block.resume(microbatch.moment)
            add_embedding_gradients(group, microbatch.entered, microbatch.state)
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=self.block.device)
        return StepGradients(loss, penalty=penalty)

    def _sends_back(self, workers: int) -> bool:
        """Whether the last worker, which has the head, sends states to the one that it takes the middle's last ones from."""
        return workers == 2 or self.placement.owners[-1] == 0

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
            for microbatch in microbatches:
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
                after = self._record(microbatch, layer, state)
                if target == rank:
                    microbatch.state = after
                else:
                    channel.send(after, target, tag)
        if self.block.last and owners[final] != rank:
            for microbatch in microbatches:
                microbatch.state = channel.receive(microbatch.spec, owners[final], tag)

    def _record(self, microbatch: _Microbatch, layer: int, state: State) -> State:
        """The state after a layer; its graph is kept, or with recomputation its input alone."""
        with self.group.span("forward"):
            graph = record_graph(self.block, self._index(layer), state)
        after = like(state, tuple(part.detach() for part in graph.outputs))
        microbatch.graphs[layer] = Graph(graph.inputs, ()) if self.block.config.mgrit.recompute else graph
        return after

    def _index(self, layer: int) -> int:
        """The layer's place in the whole network."""
        return layer + self.block.config.buffers.open

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

    def _pull(self, microbatch: _Microbatch, layer: int, lam: State, later: "_DeferredParameterGradients | None") -> State:
        """λ before a layer from λ after it; its parameters' gradients are added now, or left to `later`."""
        graph = microbatch.graphs.pop(layer)
        with self.group.span("adjoint"):
            if not graph.outputs:
                graph = record_graph(self.block, self._index(layer), like(lam, graph.inputs))
            leaves = self.block.leaves(self._index(layer))
            if later is None:
                torch.autograd.backward(graph.outputs, tensors(lam), inputs=[*graph.inputs, *leaves])
                return like(lam, input_gradients(graph.inputs))
            found = torch.autograd.grad(graph.outputs, graph.inputs, tensors(lam), retain_graph=True, materialize_grads=True)
            later.add(graph, tensors(lam), leaves)
        return like(lam, found)


class _DeferredParameterGradients:
    """Parameter gradients that nobody waits for, in the order in which they were put off."""

    def __init__(self, block: Block, group: LayerGroup) -> None:
        self._block, self._group = block, group
        self._left: deque[tuple[Graph, tuple[Tensor, ...], list[torch.nn.Parameter]]] = deque()

    def add(self, graph: Graph, lam: tuple[Tensor, ...], leaves: list[torch.nn.Parameter]) -> None:
        """Put off one layer's, for λ at its output."""
        self._left.append((graph, lam, leaves))

    def advance(self) -> bool:
        """Form one layer's; False if none is left."""
        if not self._left:
            return False
        graph, lam, leaves = self._left.popleft()
        if leaves:
            with self._group.span("adjoint"):
                torch.autograd.backward(graph.outputs, lam, inputs=leaves)
        return True
