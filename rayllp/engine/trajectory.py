"""The forward and adjoint propagators of one worker, and the graphs that the forward leaves for the adjoint.

The last forward sweep records each layer's graph, and the adjoint solve reads the graphs, so there is no second forward on the fine level.
Runs of that sweep that no other worker waits for are deferred: they are recorded while this worker waits, or once the adjoint asks for one
of their graphs. With recomputation only the states at the beginning of each interval (and of the block) are kept. An interval's graphs are
then recorded when the adjoint arrives there (for deferred runs this is the first time), and only one interval's graphs exist at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayllp.engine.block import Block, BoundBlock
from rayllp.engine.consistency import Consistency
from rayllp.engine.memory import return_freed_memory
from rayllp.engine.vmapped_layers import Stack, stack_states, unstack_states
from rayllp.mgrit import DeferredSweeps, Propagator
from rayllp.state import State, combine, detach, like, tensors


@dataclass
class Graph:
    """The autograd graph of one layer's step, between its inputs and outputs."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass
class BatchedGraph:
    """The autograd graph of several layers' steps in one call. Dimension 0 of inputs and outputs is the layers, ascending."""

    layers: tuple[int, ...]
    stack: Stack
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def seeds(self, layers: Sequence[int], states: Sequence[State]) -> tuple[Tensor, ...]:
        """Return the adjoints at the outputs: `states` for `layers`, zeros for all other layers."""
        given = dict(zip(layers, states, strict=True))
        everything = [given[layer] if layer in given else combine(torch.zeros_like, states[0]) for layer in self.layers]
        return tensors(stack_states(everything))

    def of(self, layers: Sequence[int], state: State) -> list[State]:
        """Return these layers' parts of a state that holds all layers."""
        found = dict(zip(self.layers, unstack_states(state), strict=True))
        return [found[layer] for layer in layers]


@dataclass
class Trajectory:
    """What the last forward sweep leaves on one worker. Layers are counted from the first middle layer.

    Args:
        bound: this worker's layers, bound to the samples.
        c_points: layers that begin coarse intervals, from which recomputation starts.
        recompute: keep only the states at C-points.
        graphs: recorded graphs by layer.
        batched: graphs of several layers in one call, by each of the layers.
        ahead: by layer, the state and graph of a step that the last sweep may take again.
        checkpoints: by layer, states from which graphs can be recomputed.
        deferred: runs of the last sweep that have not been recorded yet.
    """

    bound: BoundBlock
    c_points: frozenset[int]
    recompute: bool
    graphs: dict[int, Graph] = field(default_factory=dict)
    batched: dict[int, BatchedGraph] = field(default_factory=dict)
    ahead: dict[int, tuple[State, Graph]] = field(default_factory=dict)
    checkpoints: dict[int, State] = field(default_factory=dict)
    deferred: DeferredSweeps = field(default_factory=DeferredSweeps)

    @property
    def block(self) -> Block:
        """This worker's layers."""
        return self.bound.block

    def run(self, layer: int, state: State) -> State:
        """Return the state after one middle layer."""
        return self.bound.layer(self.index(layer), state)

    def index(self, layer: int) -> int:
        """Return the layer's number in the whole network."""
        return layer + self.block.config.buffers.open

    def run_together(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Return the states after several middle layers, in one call that records no graph."""
        indices = [self.index(layer) for layer in layers]
        weights = self.block.stacks.containing(indices).weights(indices)
        with torch.no_grad():
            return unstack_states(self.bound.layers_together(indices, stack_states(states), weights))

    def record_together(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Return the states after several middle layers in the last forward sweep, in one call, and keep its graph."""
        indices = [self.index(layer) for layer in layers]
        stack = self.block.stacks.containing(indices)
        with torch.no_grad():
            whole = stack_states(states)
        inputs = tuple(part.requires_grad_() for part in tensors(whole))
        with torch.enable_grad():
            outputs = tensors(self.bound.layers_together(indices, like(whole, inputs), stack.weights(indices)))
        graph = BatchedGraph(tuple(layers), stack, inputs, outputs)
        after = unstack_states(like(whole, tuple(part.detach() for part in outputs)))
        for layer, before, state in zip(layers, states, after, strict=True):
            self.batched[layer] = graph
            self.graphs[layer] = Graph(tensors(before), tensors(state))  # only values; the autograd graph is in `batched`
        return after

    def run_ahead(self, layer: int, state: State) -> State:
        """Take a step before the last sweep, which may take it again from the same state. At a C-point the graph is kept for that."""
        if self.recompute or layer not in self.c_points:
            with torch.no_grad():
                return self.run(layer, state)
        graph = self._graph(layer, state)
        self.ahead[layer] = state, graph
        return like(state, tuple(part.detach() for part in graph.outputs))

    def record(self, layer: int, state: State, known: State | None) -> State:
        """Take a step of the last forward sweep, and keep its graph.

        With recomputation no graph is kept, only the state at the beginning of each interval and of the block.
        """
        before, graph = self.ahead.pop(layer, (None, None))
        if not self.recompute:
            if graph is None or before is not state:
                graph = self._graph(layer, state)
            self.graphs[layer] = graph
            return like(state, tuple(part.detach() for part in graph.outputs))
        if layer in self.c_points or layer == self.block_start:
            self.checkpoints[layer] = detach(state)
        if known is not None:
            return known
        with torch.no_grad():
            return self.run(layer, state)

    def defer(self, layer: int, state: State) -> bool:
        """Take note that a run of the last sweep, which begins at this layer, is deferred.

        Returns: False with recomputation, where only the run's first state is needed: the adjoint recomputes the run from it anyway.
        """
        if self.recompute:
            self.checkpoints[layer] = detach(state)
        return not self.recompute

    @property
    def block_start(self) -> int:
        """The first owned middle layer, counted from the first middle layer of the network."""
        return self.block.middle[0] - self.block.config.buffers.open

    def graph(self, layer: int) -> Graph:
        """Return the graph of a layer. It is recorded now if its run was deferred, and again if only checkpoints are kept."""
        if layer not in self.graphs:
            self.deferred.reach(layer)
        if layer not in self.graphs:
            self.graphs.clear()
            if layer in self.checkpoints:  # perhaps for a coarse step, which needs this layer only
                self.graphs[layer] = self._graph(layer, self.checkpoints[layer])
            else:
                self._recompute_interval(layer)
        return self.graphs[layer]

    def _recompute_interval(self, layer: int) -> None:
        """Record the graphs of the layers from the last checkpoint at or before `layer` up to it."""
        if self.block.device.type == "cpu":
            return_freed_memory()
        start = max(n for n in self.checkpoints if n <= layer)
        state = self.checkpoints[start]
        for n in range(start, layer + 1):
            graph = self.graphs[n] = self._graph(n, state)
            state = like(state, tuple(part.detach() for part in graph.outputs))

    def _graph(self, layer: int, state: State) -> Graph:
        return record_graph(self.bound, self.index(layer), state)


def record_graph(bound: BoundBlock, index: int, state: State) -> Graph:
    """Take one layer's step from a state, and return its graph.

    Args:
        index: the layer's number in the whole network.
    """
    inputs = tuple(part.detach().requires_grad_() for part in tensors(state))
    with torch.enable_grad():
        return Graph(inputs, tensors(bound.layer(index, like(state, inputs))))


class ForwardPropagator(Propagator):
    """The forward steps x_n -> x_{n+1}, whose last sweep leaves graphs."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory

    def step(self, layer: int, state: State) -> State:
        """Take one layer's step in a relaxation or a coarse solve."""
        return self.trajectory.run_ahead(layer, state)

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        """Take one layer's step, and keep its graph."""
        return self.trajectory.record(layer, state, known)

    def defer(self, layer: int, state: State) -> bool:
        """Take note that a run is deferred. Returns False with recomputation, which records all graphs later in any case."""
        return self.trajectory.defer(layer, state)

    def steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Take the step of one layer of each interval, in one call."""
        return self.trajectory.run_together(layers, states)

    def last_steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Take the step of one layer of each interval, in one call, and keep the graph of all."""
        return self.trajectory.record_together(layers, states)


class ExactPropagator(Propagator):
    """The forward steps without graphs, for evaluation and generation."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory

    def step(self, layer: int, state: State) -> State:
        """Take one layer's step without a graph."""
        with torch.no_grad():
            return self.trajectory.run(layer, state)

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        """Take one layer's step without a graph: nobody reads graphs of an exact forward."""
        return self.step(layer, state) if known is None else known


class AdjointPropagator(Propagator):
    """λ_{n+1} -> λ_n = (∂Φ_n/∂x)ᵀ λ_{n+1}; in the last sweep also g_n = (∂Φ_n/∂θ_n)ᵀ λ_{n+1} (arXiv:2601.09026, section 3.1)."""

    def __init__(self, trajectory: Trajectory, penalty: Consistency | None = None) -> None:
        self.trajectory, self.penalty = trajectory, penalty

    def step(self, layer: int, state: State) -> State:
        """Return the input gradient of one layer, through its recorded graph."""
        if layer in self.trajectory.batched:  # the sweep takes none of the other layers in this graph
            return self.steps((layer,), (state,))[0]
        graph = self.trajectory.graph(layer)
        gradients = torch.autograd.grad(graph.outputs, graph.inputs, tensors(state), retain_graph=True, materialize_grads=True)
        return like(state, gradients)

    def steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Return the input gradients of one layer of each interval, through the graph that they share."""
        graph = self.trajectory.batched.get(layers[0])
        if graph is None:  # the forward was exact, so its layers were recorded one by one
            return super().steps(layers, states)
        gradients = torch.autograd.grad(graph.outputs, graph.inputs, graph.seeds(layers, states), retain_graph=True, materialize_grads=True)
        return graph.of(layers, like(states[0], gradients))

    def last_steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Return the input gradients of one layer of each interval, and form the gradients of their parameters."""
        graph, penalty = self.trajectory.batched.get(layers[0]), self.penalty
        if graph is None:
            return super().last_steps(layers, states)
        if penalty is not None:
            states = [self._with_end_seed(penalty, layer, state) for layer, state in zip(layers, states, strict=True)]
        torch.autograd.backward(
            graph.outputs, graph.seeds(layers, states), inputs=[*graph.inputs, *graph.stack.trained, *self.trajectory.block.common_leaves]
        )
        graph.stack.hand_out()
        for layer in graph.layers:
            del self.trajectory.batched[layer], self.trajectory.graphs[layer]
        return graph.of(layers, like(states[0], input_gradients(graph.inputs)))

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        """Return the input gradient of one layer, and form the gradients of its parameters."""
        graph, penalty = self.trajectory.graph(layer), self.penalty
        if penalty is not None:
            state = penalty.into(layer, self._with_end_seed(penalty, layer, state))
        leaves = self.trajectory.block.leaves(self.trajectory.index(layer))
        torch.autograd.backward(graph.outputs, tensors(state), inputs=[*graph.inputs, *leaves])
        del self.trajectory.graphs[layer]
        state = like(state, input_gradients(graph.inputs))
        return state if penalty is None else penalty.out_of(layer, state)

    def _with_end_seed(self, penalty: Consistency, layer: int, lam: State) -> State:
        """Return λ with the penalty's seed added, if this layer is the last one of a coarse interval."""
        interval = penalty.ends_with(layer)
        if interval is None:
            return lam
        first, last = self.trajectory.graphs[interval.start], self.trajectory.graphs[layer]
        seed = penalty.seed(interval, first.inputs, first.outputs, last.outputs)
        penalty.keep(interval, seed)
        return combine(torch.add, lam, like(lam, tensors(seed)))


def input_gradients(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradients that a backward pass has left at these inputs, zeros where there is none."""
    return tuple(torch.zeros_like(part) if part.grad is None else part.grad for part in inputs)
