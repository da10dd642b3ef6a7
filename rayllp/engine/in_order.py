"""Exact gradients where neighbouring layers are on different workers: microbatches go round the workers, layer after layer.

Each worker takes its first layer for every microbatch, then its second one, and so on; this is a pipeline with as many virtual stages as
there are layers. With as many microbatches as workers all workers are busy, except during the first and the last few layers.

With fewer microbatches (a batch that cannot be split, at the extreme) a step takes as long as the states' way forward through the layers
plus the adjoint's way back. So an adjoint step then forms only the input gradient, which the previous layer's worker waits for. Nobody
waits for the parameters' gradients, so they are formed while this worker itself waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.engine.batch import StepBatch
from rayllp.engine.block import BoundBlock
from rayllp.engine.consistency import Consistency
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.pipeline import count_microbatches
from rayllp.engine.step_gradients import StepGradients, add_embedding_gradients, loss_and_seed
from rayllp.engine.trajectory import Graph, input_gradients, record_graph
from rayllp.mgrit import Communicator, DeferredRun, DeferredSweeps
from rayllp.mgrit.windows import Placement
from rayllp.state import State, detach, like, tensors
from rayllp.timeline import TimedChannel


@dataclass
class _Microbatch:
    """One microbatch of a step.

    Attributes:
        batch: its samples.
        bound: this worker's layers, bound to these samples.
        spec: shapes and dtypes of its state.
        entered: the state before the first middle layer, with its graph, on the first worker.
        state: what one layer hands to the next on this worker: the state after a layer, or the adjoint at its input.
        graphs: graphs of this worker's layers. With recomputation they have no outputs until they are recorded again.
    """

    batch: StepBatch
    bound: BoundBlock
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
        """Add the gradients of these samples to `.grad`."""
        group = self.group
        channel: Channel = group.channel if group.timeline is None else TimedChannel(group.channel, group.timeline)
        samples = len(batch.samples)
        # As few as keep all workers busy: each layer costs two messages a microbatch, and more of them would shorten no idle time here.
        count = min(samples, count_microbatches(samples, channel.size, group.config.microbatches, fewest=True))
        if channel.synchronous_sends and self._sends_back(channel.size):
            count = 1  # otherwise two workers would each have a microbatch to send to the other before they receive one
        with group.channel.prepost_receives(("in order", count, group.spec(batch.inputs))):
            microbatches = [_Microbatch(part, self.block.bind(part), group.spec(part.inputs)) for part in batch.parts(count)]
            self._forward(microbatches, channel, batch.step)
            losses = [self._loss(microbatch) for microbatch in microbatches] if self.block.last else []
            self._adjoint(microbatches, channel, batch.step)
        for microbatch in microbatches:
            add_embedding_gradients(group, microbatch.entered, microbatch.state)
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=self.block.device)
        return StepGradients(loss, penalty=penalty)

    def _sends_back(self, workers: int) -> bool:
        """Return True if the last worker, which has the head, sends states to the worker that it receives the last middle layer's from."""
        return workers == 2 or self.placement.owners[-1] == 0

    # Forward ------------------------------------------------------------------------------------------------------------------

    def _forward(self, microbatches: Sequence[_Microbatch], channel: Channel, step: int) -> None:
        """Take all microbatches through this worker's layers, one layer after the other, and record the graphs."""
        rank, owners, tag = channel.rank, self.placement.owners, MessageTag(step, "forward", "in order")
        final = len(owners) - 1
        for layer in self._layers:
            source = owners[layer - 1] if layer else 0
            target = owners[layer + 1] if layer < final else channel.size - 1
            for microbatch in microbatches:
                if layer == 0:
                    with self.group.span("enter"):
                        microbatch.entered = microbatch.bound.enter(microbatch.batch.inputs)
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
        """Return the state after a layer, and keep the layer's graph, or with recomputation only its input."""
        with self.group.span("forward"):
            graph = record_graph(microbatch.bound, self._index(layer), state)
        after = like(state, tuple(part.detach() for part in graph.outputs))
        microbatch.graphs[layer] = Graph(graph.inputs, ()) if self.block.config.recompute else graph
        return after

    def _index(self, layer: int) -> int:
        """Return the layer's number in the whole network."""
        return layer + self.block.config.buffers.open

    def _loss(self, microbatch: _Microbatch) -> Tensor:
        """Return the loss of one microbatch. Its gradient at the last middle layer's output takes the place of the microbatch's state."""
        with self.group.span("loss"):
            loss, microbatch.state = loss_and_seed(microbatch.bound, microbatch.state, microbatch.batch)
        return loss

    # Adjoint ------------------------------------------------------------------------------------------------------------------

    def _adjoint(self, microbatches: Sequence[_Microbatch], channel: Channel, step: int) -> None:
        """Take the adjoints of all microbatches back through this worker's layers, and form the gradients of these layers' parameters."""
        rank, owners, final = channel.rank, self.placement.owners, len(self.placement.owners) - 1
        later = DeferredSweeps() if len(microbatches) < channel.size else None
        communicator = Communicator(channel, MessageTag(step, "adjoint"), while_waiting=later)
        if self.block.last and owners[final] != rank:
            for microbatch in microbatches:
                assert microbatch.state is not None
                communicator.send(microbatch.state, owners[final], "in order", 0)
        for layer in reversed(self._layers):
            source = owners[layer + 1] if layer < final else channel.size - 1
            target = owners[layer - 1] if layer else 0
            for microbatch in microbatches:
                if source == rank:
                    assert microbatch.state is not None
                    lam = microbatch.state
                else:
                    lam = communicator.receive(microbatch.spec, source, "in order", 0)
                before = self._pull(microbatch, layer, lam, later)
                if target == rank:
                    microbatch.state = before
                else:
                    communicator.send(before, target, "in order", 0)
        while later is not None and later.advance():
            pass

    def _pull(self, microbatch: _Microbatch, layer: int, lam: State, later: DeferredSweeps | None) -> State:
        """Return λ at a layer's input from λ at its output.

        The gradients of the layer's parameters are formed now, or added to `later` if that is given.
        """
        graph = microbatch.graphs.pop(layer)
        with self.group.span("adjoint"):
            if not graph.outputs:
                graph = record_graph(microbatch.bound, self._index(layer), like(lam, graph.inputs))
            leaves = self.block.leaves(self._index(layer))
            if later is None:
                torch.autograd.backward(graph.outputs, tensors(lam), inputs=[*graph.inputs, *leaves])
                return like(lam, input_gradients(graph.inputs))
            found = torch.autograd.grad(graph.outputs, graph.inputs, tensors(lam), retain_graph=True, materialize_grads=True)

        def form_gradients(_: int) -> None:
            with self.group.span("adjoint"):
                torch.autograd.backward(graph.outputs, tensors(lam), inputs=leaves)

        if leaves:
            later.add(DeferredRun(range(layer, layer + 1), form_gradients))
        return like(lam, found)
