"""Predict the time of a step by running the cycle that trains on simulated clocks.

There is no formula for the schedule here: `schedule.py` runs the cycle to find out, so predictions cannot disagree with the code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.plan.costs import Costs
from rayllp.plan.schedule import schedules_of
from rayllp.plan.windows import Clocks, in_order_step, window_step
from rayllp.timeline import Span


@dataclass(frozen=True)
class Prediction:
    """The prediction of one step.

    Attributes:
        step_s: length of the critical path in seconds, until the last worker has finished its update.
        spans: for each worker, what it does and when.
    """

    step_s: float
    spans: tuple[tuple[Span, ...], ...]


def predict_step(config: TrainConfig, accuracy: Accuracy, costs: Costs) -> float:
    """Return the length in seconds of a layer-parallel step's critical path, until the last worker has finished its update."""
    return _step(config, accuracy, costs, None)


def predict(config: TrainConfig, accuracy: Accuracy, costs: Costs) -> Prediction:
    """Predict one layer-parallel step. Recomputation, gradient accumulation and replicas are not included."""
    spans: list[list[Span]] = [[] for _ in range(config.layer_workers)]
    step_s = _step(config, accuracy, costs, spans)
    return Prediction(step_s, tuple(tuple(span for span in own if span.seconds) for own in spans))


def _step(config: TrainConfig, accuracy: Accuracy, costs: Costs, spans: Sequence[list[Span]] | None) -> float:
    """Return the seconds of a step, and append what each worker does to `spans`, if given."""
    if config.placement == "cyclic":
        return _cyclic_step(config, accuracy, costs, spans)
    workers, buffers, blocks = config.layer_workers, config.buffers, config.blocks
    clocks = [0.0] * workers

    def spend(rank: int, solve: str, seconds: float, kind: str = "compute") -> None:
        if spans is not None:
            spans[rank].append(Span(clocks[rank], clocks[rank] + seconds, kind, solve))
        clocks[rank] += seconds

    forward, adjoint = schedules_of(config, accuracy)
    spend(0, "enter", costs.enter + buffers.open * costs.record)
    forward.replay(costs.kinds, costs.message, clocks, spans)
    spend(workers - 1, "loss", buffers.close * (costs.record + costs.full_gradient) + costs.leave)
    adjoint.replay(costs.kinds, costs.message, clocks, spans, forward.deferred_work())
    spend(0, "enter", buffers.open * costs.full_gradient + costs.enter_gradient)
    # The gradient norm is taken over all workers, so no worker updates before all have their gradients.
    together = max(clocks)
    for rank in range(workers):
        spend(rank, "statistics", together - clocks[rank], "wait")
        owned = blocks[rank] + (rank == 0) * buffers.open + (rank == workers - 1) * buffers.close
        spend(rank, "update", owned * costs.update)
    return max(clocks)


def _cyclic_step(config: TrainConfig, accuracy: Accuracy, costs: Costs, spans: Sequence[list[Span]] | None) -> float:
    """Return the seconds of a step on a cyclic placement. An exact step is predicted for a batch that is not divided into microbatches."""
    clocks, workers = Clocks(config.layer_workers, spans), config.layer_workers
    if accuracy.serial:
        in_order_step(config, 1, costs, clocks)
    else:
        window_step(config, accuracy, costs, clocks)
    clocks.meet(0.0, "statistics")
    ends = {0: config.buffers.open}
    ends[workers - 1] = ends.get(workers - 1, 0) + config.buffers.close
    for rank in range(workers):
        clocks.spend(rank, (len(config.layers_of(rank)) + ends.get(rank, 0)) * costs.update, "update")
    return max(clocks.now)
