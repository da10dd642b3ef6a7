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
from rayllp.state import State


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


class _Spending:
    """A propagator that takes time and does nothing."""

    def __init__(self, clock: Clock, step_s: float, last_s: float) -> None:
        self.clock, self.step_s, self.last_s = clock, step_s, last_s

    def step(self, layer: int, state: State) -> State:
        self.clock.spend(self.step_s)
        return state

    def last_step(self, layer: int, state: State) -> State:
        self.clock.spend(self.last_s)
        return state


def predict_step(config: TrainConfig, accuracy: Accuracy, costs: Costs) -> float:
    """Seconds of one layer-parallel step on the critical path: when the last worker has finished its update.

    Recomputation, accumulation and replicas are not in it.
    """
    methods = accuracy.methods(config)
    forward = config.hierarchy(accuracy.levels_forward)
    adjoint = config.hierarchy(accuracy.levels_backward).adjoint()
    nothing = torch.zeros(())
    spec = StateSpec.of(nothing)

    def work(inner: LocalChannel) -> float:
        clock = Clock()
        channel = VirtualChannel(inner, clock, costs.message)
        first, last = inner.rank == 0, inner.rank == inner.size - 1
        owned = config.blocks[inner.rank]
        if first:
            owned += config.buffers.open
            clock.spend(costs.enter + config.buffers.open * costs.record)
        solve(
            forward, methods[0], _Spending(clock, costs.forward, costs.record), channel,
            initial=nothing if first else None, spec=spec, tag=MessageTag(0, "forward"), reduce=False,
        )  # fmt: skip
        if last:
            owned += config.buffers.close
            clock.spend(config.buffers.close * (costs.record + costs.full_gradient) + costs.leave)
        solve(
            adjoint, methods[1], _Spending(clock, costs.input_gradient, costs.full_gradient), channel,
            initial=nothing if last else None, spec=spec, tag=MessageTag(0, "adjoint"), reduce=False,
        )  # fmt: skip
        if first:
            clock.spend(config.buffers.open * costs.full_gradient + costs.enter_gradient)
        # The gradient norm is over all workers: nobody updates before everybody has gradients.
        slowest = inner.shared_queues("ends")
        for other in range(inner.size):
            slowest[inner.rank, other].put(clock.now)
        everybody = max(slowest[other, inner.rank].get(timeout=5.0) for other in range(inner.size))
        return float(everybody + owned * costs.update)

    return max(run_workers(config.layer_workers, work))
