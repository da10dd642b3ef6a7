"""The forward and adjoint propagators of one worker, and the graphs that the forward leaves for the adjoint.

The last forward sweep records each layer's graph, and the adjoint solve reads the graphs, so there is no second forward on the fine level.
Runs of that sweep that no other worker waits for are deferred: they are recorded while this worker waits, or once the adjoint asks for one
of their graphs. With recomputation only the states at the beginning of each interval (and of the block) are kept. An interval's graphs are
then recorded when the adjoint arrives there (for deferred runs this is the first time), and only one interval's graphs exist at a time.

Layers are counted as solvers count them, from the first of the solve (`Block.index` converts).
"""

from collections.abc import Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayllp.engine.block import BoundBlock
from rayllp.engine.consistency import Consistency
from rayllp.engine.deferred_gradients import DeferredGradients, Parts, gradients_at
from rayllp.engine.memory import return_freed_memory
from rayllp.engine.vmapped_layers import Stack, stack_states, unstack_states
from rayllp.mgrit import DeferredSweeps, Propagator
from rayllp.state import State, combine, detach, like, tensors


@dataclass
class Graph:
    """The autograd graph of one layer's step, between its inputs and outputs.

    Attributes:
        parts: the layer's modules, if the gradients of its parameters are to be formed after that of its input.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parts: Parts | None = None


def record_graph(bound: BoundBlock, layer: int, state: State, *, splits: bool = False) -> tuple[Graph, State]:
    """Take one layer's step from a state. Returns its graph, and the state after it without a graph.

    Args:
        splits: the gradients of the layer's parameters are to be formed after that of its input.
    """
    inputs = tuple(part.detach().requires_grad_() for part in tensors(state))
    index = bound.block.index(layer)
    recorded = bound.block.recorded_parts(index) if splits else nullcontext()
    with torch.enable_grad(), recorded as parts:
        outputs = tensors(bound.layer(index, like(state, inputs)))
    return Graph(inputs, outputs, parts), like(state, tuple(part.detach() for part in outputs))


def pull_through(graph: Graph, lam: State, leaves: list[nn.Parameter]) -> tuple[State, DeferredGradients]:
    """Return the gradient at a layer's input from that at its output, and what is left to do for the gradients of its parameters."""
    at_inputs, at_parts = gradients_at(graph.outputs, graph.inputs, tensors(lam), graph.parts)
    return like(lam, at_inputs), DeferredGradients(graph.outputs, tensors(lam), leaves, graph.parts, at_parts)


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


class ExactPropagator(Propagator):
    """The forward steps without graphs, for evaluation and generation."""

    def __init__(self, bound: BoundBlock) -> None:
        self.bound = bound

    def step(self, layer: int, state: State) -> State:
        """Take one layer's step without a graph."""
        with torch.no_grad():
            return self.bound.layer(self.bound.block.index(layer), state)

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        """Take one layer's step without a graph: nobody reads graphs of an exact forward."""
        return self.step(layer, state) if known is None else known


class ForwardPropagator(ExactPropagator):
    """The forward steps x_n -> x_{n+1}, whose last sweep leaves a graph of every layer.

    Args:
        bound: this worker's layers, bound to the samples.
        c_points: the layers whose step the last sweep may take again from the same state, so that `step` records their graphs at once.
        splits: the adjoint forms the gradients of a layer's parameters after that of its input.

    Attributes:
        graphs: recorded graphs by layer, except the `batched` ones.
        batched: graphs of several layers in one call, by each of the layers.
        deferred: runs of the last sweep that have not been recorded yet.
    """

    def __init__(self, bound: BoundBlock, c_points: Set[int] = frozenset(), *, splits: bool = False) -> None:
        super().__init__(bound)
        self.c_points, self.splits = c_points, splits
        self.graphs: dict[int, Graph] = {}
        self.batched: dict[int, BatchedGraph] = {}
        self.deferred = DeferredSweeps()
        self._ahead: dict[int, tuple[Graph, State]] = {}  # by C-point: graph and result of its latest step

    def step(self, layer: int, state: State) -> State:
        """Take one layer's step in a relaxation or a coarse solve."""
        if layer not in self.c_points:
            return super().step(layer, state)
        self._ahead[layer] = record_graph(self.bound, layer, state)
        return self._ahead[layer][1]

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        """Take one layer's step, and keep its graph."""
        recorded = self._ahead.pop(layer, None)
        if recorded is None or recorded[1] is not known:
            recorded = record_graph(self.bound, layer, state, splits=self.splits)
        self.graphs[layer], after = recorded
        return after

    def steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Take the step of one layer of each interval, in one call."""
        indices = [self.bound.block.index(layer) for layer in layers]
        weights = self.bound.block.stacks.containing(indices).weights(indices)
        with torch.no_grad():
            return unstack_states(self.bound.layers_together(indices, stack_states(states), weights))

    def last_steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Take the step of one layer of each interval, in one call, and keep the graph of all."""
        indices = [self.bound.block.index(layer) for layer in layers]
        stack = self.bound.block.stacks.containing(indices)
        with torch.no_grad():
            whole = stack_states(states)
        inputs = tuple(part.requires_grad_() for part in tensors(whole))
        with torch.enable_grad():
            outputs = tensors(self.bound.layers_together(indices, like(whole, inputs), stack.weights(indices)))
        self.batched |= dict.fromkeys(layers, BatchedGraph(tuple(layers), stack, inputs, outputs))
        return unstack_states(like(whole, tuple(part.detach() for part in outputs)))

    def graph(self, layer: int) -> Graph:
        """Return the graph of a layer. It is recorded now if its run was deferred."""
        if layer not in self.graphs:
            self.deferred.reach(layer)
        return self.graphs[layer]


class RecomputingPropagator(ForwardPropagator):
    """The forward steps, whose last sweep keeps a few states, from which graphs are recorded when the adjoint asks for them.

    Args:
        bound: this worker's layers, bound to the samples.
        checkpoints: the layers whose input the last sweep keeps. That of the block's first layer is kept in any case.
        splits: see `ForwardPropagator`.
    """

    def __init__(self, bound: BoundBlock, checkpoints: Set[int], *, splits: bool = False) -> None:
        super().__init__(bound, splits=splits)
        self.checkpoints = checkpoints | {bound.block.solved[0]}
        self._kept: dict[int, State] = {}

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        """Take one layer's step without a graph, and keep the state before it if the layer is a checkpoint."""
        if layer in self.checkpoints:
            self._kept[layer] = detach(state)
        return self.step(layer, state) if known is None else known

    def defer(self, layer: int, state: State) -> bool:
        """Keep the first state of a deferred run. Returns False: the adjoint recomputes the run from this state anyway."""
        self._kept[layer] = detach(state)
        return False

    def graph(self, layer: int) -> Graph:
        """Return the graph of a layer. If missing, record all graphs from the last kept state to this layer, in place of the others."""
        if layer not in self.graphs:
            if not self.splits:  # else `settle` drops each of them
                self.graphs.clear()
            start = max(n for n in self._kept if n <= layer)
            if start < layer and self.bound.block.device.type == "cpu":  # more than the one layer that a coarse step needs
                return_freed_memory()
            state = self._kept[start]
            for n in range(start, layer + 1):
                self.graphs[n], state = record_graph(self.bound, n, state, splits=self.splits)
        return self.graphs[layer]


class AdjointPropagator(Propagator):
    """λ_{n+1} -> λ_n = (∂Φ_n/∂x)ᵀ λ_{n+1}; in the last sweep also g_n = (∂Φ_n/∂θ_n)ᵀ λ_{n+1} (arXiv:2601.09026, section 3.1).

    Args:
        forward: the propagator of the forward solve, which has the graphs.
        penalty: the consistency penalty; None if its weight is 0.
    """

    def __init__(self, forward: ForwardPropagator, penalty: Consistency | None = None) -> None:
        self.forward, self.block, self.penalty = forward, forward.bound.block, penalty
        self._left: dict[int, DeferredGradients] = {}  # by layer: what its latest tentative step has left to do

    def step(self, layer: int, state: State) -> State:
        """Return the input gradient of one layer, through its recorded graph."""
        if layer in self.forward.batched:  # the sweep takes none of the other layers in this graph
            return self.steps((layer,), (state,))[0]
        graph = self.forward.graph(layer)
        return like(state, gradients_at(graph.outputs, graph.inputs, tensors(state))[0])

    def steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Return the input gradients of one layer of each interval, through the graph that they share."""
        graph = self.forward.batched.get(layers[0])
        if graph is None:  # the forward was exact, so its layers were recorded one by one
            return super().steps(layers, states)
        gradients = torch.autograd.grad(graph.outputs, graph.inputs, graph.seeds(layers, states), retain_graph=True, materialize_grads=True)
        return graph.of(layers, like(states[0], gradients))

    def last_steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Return the input gradients of one layer of each interval, and form the gradients of their parameters."""
        graph = self.forward.batched.get(layers[0])
        if graph is None:
            return super().last_steps(layers, states)
        ends = graph.of(layers, like(states[0], graph.outputs))
        states = [self._with_end_seed(*each) for each in zip(layers, states, ends, strict=True)]
        inputs = [*graph.inputs, *graph.stack.trained, *self.block.common_leaves]
        torch.autograd.backward(graph.outputs, graph.seeds(layers, states), inputs=inputs)
        graph.stack.hand_out()
        for layer in graph.layers:
            del self.forward.batched[layer]
        return graph.of(layers, like(states[0], input_gradients(graph.inputs)))

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        """Return the input gradient of one layer, and form the gradients of its parameters."""
        graph, penalty = self.forward.graph(layer), self.penalty
        if penalty is not None:
            state = penalty.into(layer, self._with_end_seed(layer, state, like(state, graph.outputs)))
        leaves = self.block.leaves(self.block.index(layer))
        torch.autograd.backward(graph.outputs, tensors(state), inputs=[*graph.inputs, *leaves])
        del self.forward.graphs[layer]
        state = like(state, input_gradients(graph.inputs))
        return state if penalty is None else penalty.out_of(layer, state)

    def tentative_step(self, layer: int, state: State) -> State:
        """Return the input gradient of one layer, and keep what it takes to form the gradients of its parameters."""
        leaves = self.block.leaves(self.block.index(layer))
        found, self._left[layer] = pull_through(self.forward.graph(layer), state, leaves)
        return found

    def settle(self, layer: int) -> None:
        """Form the gradients of a layer's parameters, from its latest tentative step."""
        self.block.form(self.block.index(layer), self._left.pop(layer))
        self.forward.graphs.pop(layer, None)

    def _with_end_seed(self, layer: int, lam: State, end: State) -> State:
        """Return λ with the penalty's seed added, if there is a penalty and this layer, with output `end`, is the last of an interval."""
        interval = None if self.penalty is None else self.penalty.ends_with(layer)
        if self.penalty is None or interval is None:
            return lam
        first = self.forward.graphs[interval.start]
        seed = self.penalty.seed(interval, first.inputs, first.outputs, end)
        self.penalty.keep(interval, seed)
        return combine(torch.add, lam, seed)


def input_gradients(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradients that a backward pass has left at these inputs, zeros where there is none."""
    return tuple(torch.zeros_like(part) if part.grad is None else part.grad for part in inputs)
