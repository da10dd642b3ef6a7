"""Exact gradients where neighbouring layers are on different workers: microbatches go round the workers, layer after layer.

Each worker takes its first layer for every microbatch, then its second one, and so on; this is a pipeline with as many virtual stages as
there are layers. With as many microbatches as workers all workers are busy, except during the first and the last few layers.

With fewer microbatches (a batch that cannot be split, at the extreme) a step takes as long as the states' way forward through the layers
plus the adjoint's way back. So an adjoint step then forms only the input gradient, which the previous layer's worker waits for. Nobody
waits for the parameters' gradients, so they are formed while this worker itself waits.

`InOrderStep` holds the order of all this and knows no layers, so the planner can run it without any (`plan/recording.py`).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.engine.batch import StepBatch, count_microbatches
from rayllp.engine.block import BoundBlock
from rayllp.engine.consistency import Consistency
from rayllp.engine.deferred_gradients import DeferredGradients
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.propagators import Graph, input_gradients, pull_through, record_graph
from rayllp.engine.step_gradients import StepGradients, add_embedding_gradients, loss_and_seed
from rayllp.mgrit import Communicator
from rayllp.mgrit.placement import Placement
from rayllp.state import State, detach, like, tensors
from rayllp.timeline import TimedChannel

TakeLayer = Callable[[int, int, State | None], State]
"""Takes a microbatch's number, a layer and its state or λ (None: the network begins there); returns the state or λ after the layer."""


class InOrderWork(Protocol):
    """What a worker does with its layers in an exact step. Microbatches are counted from 0, layers from the first of the solve."""

    def enter(self, number: int) -> State:
        """Return microbatch `number`'s state before the first layer of the solve; on the first worker."""
        ...

    def record(self, number: int, layer: int, state: State) -> State:
        """Return the state after a layer, and keep the layer's graph."""
        ...

    def loss(self, number: int, state: State) -> State:
        """Return λ at the output of the last layer of the solve, from the state there; on the last worker."""
        ...

    def pull(self, number: int, layer: int, lam: State, *, defer: bool) -> State:
        """Return λ at a layer's input from λ at its output. Forms the gradients of the layer's parameters too, or defers that."""
        ...

    def advance(self) -> bool:
        """Form the deferred parameter gradients of one layer. Returns False if none is left."""
        ...


@dataclass
class InOrderStep:
    """One worker's part in an exact step on a cyclic placement. Every worker of the channel takes its part at the same time.

    Attributes:
        work: what this worker does with its layers.
        placement: which worker owns which layer; the first worker owns the first one.
        channel: the channel to the other workers.
        spec: shapes and dtypes of a microbatch's state.
        step: number of the training step, named in errors.
        microbatches: number of microbatches.
        states: by microbatch, the latest state or λ that stays on this worker, between two layers or at an end of the network.
    """

    work: InOrderWork
    placement: Placement
    channel: Channel
    spec: StateSpec
    step: int
    microbatches: int
    states: dict[int, State] = field(default_factory=dict)

    def take(self) -> None:
        """Take the step. On the first worker, `states` are each microbatch's λ before the first layer of the solve afterwards."""
        first, last, layers = 0, self.channel.size - 1, range(len(self.placement.owners))
        forward = Communicator(self.channel, MessageTag(self.step, "forward"))
        self._pass(layers, first, last, self._record, forward)
        if self.channel.rank == last:
            for number in range(self.microbatches):
                self.states[number] = self.work.loss(number, self.states[number])
        adjoint = Communicator(self.channel, MessageTag(self.step, "adjoint"), while_waiting=self.work)
        self._pass(layers[::-1], last, first, self._pull, adjoint)
        while self.work.advance():
            pass

    def _record(self, number: int, layer: int, state: State | None) -> State:
        return self.work.record(number, layer, self.work.enter(number) if state is None else state)

    def _pull(self, number: int, layer: int, lam: State | None) -> State:
        assert lam is not None
        # With as many microbatches as workers, no worker waits in the middle of a step.
        return self.work.pull(number, layer, lam, defer=self.microbatches < self.channel.size)

    def _pass(self, layers: range, begin: int, end: int, take: TakeLayer, communicator: Communicator) -> None:
        """Pass all microbatches from worker `begin` through all layers to worker `end`, and take those layers that this worker owns."""

        def receive(source: int) -> State:
            return communicator.receive(self.spec, source, "in order", 0)

        rank, numbers = self.channel.rank, range(self.microbatches)
        route = [begin, *(self.placement.owners[layer] for layer in layers), end]
        if rank == begin != route[1]:
            for number in numbers:
                communicator.send(self.states[number], route[1], "in order", 0)
        for layer, behind, here, ahead in zip(layers, route, route[1:], route[2:], strict=False):
            for number in numbers if here == rank else ():
                after = take(number, layer, self.states.get(number) if behind == rank else receive(behind))
                if ahead == rank:
                    self.states[number] = after
                else:
                    communicator.send(after, ahead, "in order", 0)
        if rank == end != route[-2]:
            for number in numbers:
                self.states[number] = receive(route[-2])


class InOrderGradients:
    """Exact gradients on a cyclic placement."""

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self.placement = group.config.cyclic_placement

    def form(self, batch: StepBatch, penalty: Consistency | None) -> StepGradients:
        """Add the gradients of these samples to `.grad`."""
        group = self.group
        channel: Channel = group.channel if group.timeline is None else TimedChannel(group.channel, group.timeline)
        samples = len(batch.samples)
        # As few as keep all workers busy: each layer costs two messages per microbatch, and more microbatches shorten no idle time here.
        count = count_microbatches(samples, channel.size, group.config.microbatches, fewest=True)
        if channel.synchronous_sends and self._sends_back(channel.size):
            count = 1  # otherwise two workers would each have a microbatch to send to the other before they receive one
        with group.channel.prepost_receives(("in order", count, group.spec(batch.inputs))):
            work = _Layers(group, list(batch.parts(count)), splits=count < channel.size)
            step = InOrderStep(work, self.placement, channel, work.spec, batch.step, count)
            step.take()
        for number, entered in work.entered.items():
            add_embedding_gradients(group, entered, step.states[number])
        loss = torch.stack(work.losses).sum() if work.losses else torch.zeros((), device=group.device)
        return StepGradients(loss, penalty=penalty)

    def _sends_back(self, workers: int) -> bool:
        """Return True if the worker that sends the solve's output to the last worker also receives states from that one."""
        return workers == 2 or self.placement.owners[-1] == 0


class _Layers(InOrderWork):
    """This worker's layers at work on the microbatches of one step.

    Args:
        group: this worker's end of the layer group.
        batches: the microbatches, all of the same size.
        splits: parameter gradients are deferred.

    Attributes:
        spec: shapes and dtypes of a microbatch's state.
        entered: on the first worker, each microbatch's state before the first layer of the solve, with its graph.
        losses: on the last worker, each microbatch's loss.
    """

    def __init__(self, group: LayerGroup, batches: Sequence[StepBatch], *, splits: bool) -> None:
        self._group, self._batches, self._splits = group, batches, splits
        self._bound: list[BoundBlock] = [group.block.bind(batch) for batch in batches]
        self.spec = group.spec(batches[0].inputs)
        self.entered: dict[int, State] = {}
        self.losses: list[Tensor] = []
        # By microbatch and layer. With recomputation graphs have no outputs until they are recorded again.
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._deferred: deque[tuple[int, DeferredGradients]] = deque()  # by index of the layer

    def enter(self, number: int) -> State:
        """Take embedding and opening buffer layers, and keep their graph."""
        with self._group.span("enter"):
            self.entered[number] = entered = self._bound[number].enter(self._batches[number].inputs)
        return detach(entered)

    def record(self, number: int, layer: int, state: State) -> State:
        """Take a layer's step, and keep its graph, or with recomputation only its input."""
        with self._group.span("forward"):
            graph, after = record_graph(self._bound[number], layer, state, splits=self._splits and not self._group.config.recompute)
        self._graphs[number, layer] = Graph(graph.inputs, ()) if self._group.config.recompute else graph
        return after

    def loss(self, number: int, state: State) -> State:
        """Compute a microbatch's loss, and the gradients of closing buffer layers and head."""
        with self._group.span("loss"):
            loss, seed = loss_and_seed(self._bound[number], state, self._batches[number])
        assert seed is not None
        self.losses.append(loss)
        return seed

    def pull(self, number: int, layer: int, lam: State, *, defer: bool) -> State:
        """Read a layer's graph and drop it."""
        graph = self._graphs.pop((number, layer))
        with self._group.span("adjoint"):
            if not graph.outputs:
                graph, _ = record_graph(self._bound[number], layer, like(lam, graph.inputs), splits=defer)
            index = self._group.block.index(layer)
            leaves = self._group.block.leaves(index)
            if not defer:
                torch.autograd.backward(graph.outputs, tensors(lam), inputs=[*graph.inputs, *leaves])
                return like(lam, input_gradients(graph.inputs))
            found, gradients = pull_through(graph, lam, leaves)
            self._deferred.append((index, gradients))
        return found

    def advance(self) -> bool:
        """Form parameter gradients in the order in which they were deferred."""
        if not self._deferred:
            return False
        with self._group.span("adjoint"):
            self._group.block.form(*self._deferred.popleft())
        return True
