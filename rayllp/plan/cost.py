"""Predicting a step's time: the very cycle that trains, run on logical clocks.

Nothing here knows a formula for the schedule, so a prediction cannot drift from the code.
"""

from dataclasses import dataclass

import torch

from rayllp.channel.base import MessageTag, StateSpec
from rayllp.channel.local import LocalChannel, run_workers
from rayllp.channel.virtual import Clock, VirtualChannel
from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.mgrit import solve
from rayllp.state import State, detach
from rayllp.timeline import Span, TimedChannel, TimedPropagator, Timeline


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds.

    Attributes:
        forward: a layer's forward without a graph.
        record: a layer's forward with its graph.
        input_gradient: a layer's vector-Jacobian product.
        full_gradient: that, and the gradients of its parameters.
        enter, enter_gradient: embedding (without opening buffers).
        leave: head and loss, forward and gradient (without closing buffers).
        update: gradient norm, clipping and optimizer, a layer.
        message: a state's way to the neighbour.
    """

    forward: float
    record: float
    input_gradient: float
    full_gradient: float
    enter: float = 0.0
    enter_gradient: float = 0.0
    leave: float = 0.0
    update: float = 0.0
    message: float = 0.0


class _Forward:
    """Takes a forward's time and does nothing: at C-points with a graph, which the last sweep then need not make."""

    def __init__(self, clock: Clock, costs: Costs, c_points: frozenset[int]) -> None:
        self.clock, self.costs, self.c_points = clock, costs, c_points

    def step(self, layer: int, state: State) -> State:
        self.clock.spend(self.costs.record if layer in self.c_points else self.costs.forward)
        return detach(state)

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        if known is None:
            self.clock.spend(self.costs.record)
        return detach(state)


class _Adjoint:
    """The same for gradients."""

    def __init__(self, clock: Clock, costs: Costs) -> None:
        self.clock, self.costs = clock, costs

    def step(self, layer: int, state: State) -> State:
        self.clock.spend(self.costs.input_gradient)
        return detach(state)

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        self.clock.spend(self.costs.full_gradient)
        return detach(state)


@dataclass(frozen=True)
class Prediction:
    """Of one step.

    Attributes:
        step_s: seconds on the critical path, until the last worker has finished its update.
        spans: what each worker does when.
    """

    step_s: float
    spans: tuple[tuple[Span, ...], ...]


def predict_step(config: TrainConfig, accuracy: Accuracy, costs: Costs) -> float:
    """Seconds of one layer-parallel step; see `predict`."""
    return predict(config, accuracy, costs).step_s


def predict(config: TrainConfig, accuracy: Accuracy, costs: Costs) -> Prediction:
    """One layer-parallel step on logical clocks. Recomputation, accumulation and replicas are not in it."""
    methods = accuracy.methods(config)
    forward = config.hierarchy(accuracy.levels_forward)
    adjoint = config.hierarchy(accuracy.levels_backward).adjoint()
    c_points = frozenset(range(0, config.middle_layers, config.first_coarsening))
    nothing = torch.zeros(())
    spec = StateSpec.of(nothing)

    def work(inner: LocalChannel) -> tuple[float, tuple[Span, ...]]:
        clock = Clock()
        timeline = Timeline(lambda: clock.now)
        channel = TimedChannel(VirtualChannel(inner, clock, costs.message), timeline)
        first, last = inner.rank == 0, inner.rank == inner.size - 1
        buffers = config.buffers

        def spend(solve: str, seconds: float) -> None:
            with timeline.span("compute", solve):
                clock.spend(seconds)

        if first:
            spend("enter", costs.enter + buffers.open * costs.record)
        solve(
            forward, methods[0], TimedPropagator(_Forward(clock, costs, c_points), timeline), channel,
            initial=nothing if first else None, spec=spec, tag=MessageTag(0, "forward"), reduce=False,
            watch=timeline.begin_solve("forward"),
        )  # fmt: skip
        if last:
            spend("loss", buffers.close * (costs.record + costs.full_gradient) + costs.leave)
        solve(
            adjoint, methods[1], TimedPropagator(_Adjoint(clock, costs), timeline), channel,
            initial=nothing if last else None, spec=spec, tag=MessageTag(0, "adjoint"), reduce=False,
            watch=timeline.begin_solve("adjoint"),
        )  # fmt: skip
        if first:
            spend("enter", buffers.open * costs.full_gradient + costs.enter_gradient)
        # The gradient norm is over all workers: nobody updates before everybody has gradients.
        slowest = inner.shared_queues("ends")
        for other in range(inner.size):
            slowest[inner.rank, other].put(clock.now)
        with timeline.span("wait", "statistics"):
            clock.now = max(slowest[other, inner.rank].get(timeout=5.0) for other in range(inner.size))
        owned = config.blocks[inner.rank] + first * buffers.open + last * buffers.close
        spend("update", owned * costs.update)
        return clock.now, tuple(span for span in timeline.spans if span.seconds)

    ends, spans = zip(*run_workers(config.layer_workers, work), strict=True)
    return Prediction(max(ends), spans)
