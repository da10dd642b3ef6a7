"""Predicting a step's time: the very cycle that trains, on logical clocks.

Nothing here knows a formula for the schedule (`schedule.py` runs the cycle to learn it), so a prediction cannot drift from the code.
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
    """Of one step.

    Attributes:
        step_s: seconds on the critical path, until the last worker has finished its update.
        spans: what each worker does when.
    """

    step_s: float
    spans: tuple[tuple[Span, ...], ...]


def predict_step(config: TrainConfig, accuracy: Accuracy, costs: Costs) -> float:
    """Seconds of one layer-parallel step, on the critical path, until the last worker has finished its update; see `predict`."""
    return _step(config, accuracy, costs, None)


def predict(config: TrainConfig, accuracy: Accuracy, costs: Costs) -> Prediction:
    """One layer-parallel step. Recomputation, accumulation and replicas are not in it."""
    spans: list[list[Span]] = [[] for _ in range(config.layer_workers)]
    step_s = _step(config, accuracy, costs, spans)
    return Prediction(step_s, tuple(tuple(span for span in mine if span.seconds) for mine in spans))


def _step(config: TrainConfig, accuracy: Accuracy, costs: Costs, spans: Sequence[list[Span]] | None) -> float:
    """Seconds; what each worker does is appended to `spans`, if there are any."""
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
    # The gradient norm is over all workers: nobody updates before everybody has gradients.
    together = max(clocks)
    for rank in range(workers):
        spend(rank, "statistics", together - clocks[rank], "wait")
        owned = blocks[rank] + (rank == 0) * buffers.open + (rank == workers - 1) * buffers.close
        spend(rank, "update", owned * costs.update)
    return max(clocks)


def _cyclic_step(config: TrainConfig, accuracy: Accuracy, costs: Costs, spans: Sequence[list[Span]] | None) -> float:
    """The same where neighbouring layers are on different workers. An exact step is predicted as one of a batch that is not split."""
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
