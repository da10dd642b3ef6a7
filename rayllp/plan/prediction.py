"""Predict the time of a step by running the code that trains on simulated clocks.

There is no formula for the schedule here: `recording.py` runs the solvers to find out, so predictions cannot disagree with the code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.plan.costs import Costs
from rayllp.plan.recording import in_order_schedule, schedules_of
from rayllp.plan.schedule import Clocks
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


def predict_step(
    config: TrainConfig, accuracy: Accuracy, costs: Costs, *, microbatches: int = 1, sweeps: tuple[float, float] | None = None
) -> float:
    """Return the length in seconds of a step's critical path, until the last worker has finished its update.

    Recomputation, gradient accumulation and replicas are not included.

    Args:
        config: the settings.
        accuracy: how the step is solved.
        costs: those of a batch; for an exact step with layers in turn, those of a microbatch.
        microbatches: number of microbatches of an exact step with layers in turn.
        sweeps: of a rolling window, forward and adjoint, as a run has counted them; None: as few as there can be.
    """
    return _step(config, accuracy, costs, microbatches, None, sweeps)


def predict(config: TrainConfig, accuracy: Accuracy, costs: Costs, *, sweeps: tuple[float, float] | None = None) -> Prediction:
    """Predict one step like `predict_step`, of a batch that is not divided into microbatches, and what each worker does in it."""
    spans: list[list[Span]] = [[] for _ in range(config.layer_workers)]
    step_s = _step(config, accuracy, costs, 1, spans, sweeps)
    return Prediction(step_s, tuple(map(tuple, spans)))


def _step(
    config: TrainConfig,
    accuracy: Accuracy,
    costs: Costs,
    microbatches: int,
    spans: Sequence[list[Span]] | None,
    sweeps: tuple[float, float] | None,
) -> float:
    """Return the seconds of a step, and append what each worker does to `spans`, if given."""
    workers, solved = config.layer_workers, config.solved_layers
    seconds, clocks = costs.kinds(workers, solved.start, config.model.layers - solved.stop), Clocks(workers, spans)
    if config.placement == "cyclic" and accuracy.serial:
        in_order_schedule(len(solved), workers, microbatches).replay(seconds, clocks)
    else:
        forward, adjoint = schedules_of(config, accuracy, sweeps)
        clocks.spend(0, seconds["enter"], "enter")
        forward.replay(seconds, clocks)
        clocks.spend(workers - 1, seconds["loss"], "loss")
        adjoint.replay(seconds, clocks, forward.deferred_work())
        microbatches = 1
    clocks.spend(0, microbatches * seconds["enter_gradient"], "enter")
    # The gradient norm is taken over all workers, so no worker updates before all have their gradients.
    clocks.meet("statistics")
    for rank, layers in enumerate(layers_owned(config)):
        clocks.spend(rank, layers * costs.update, "update")
    return max(clocks.now)


def layers_owned(config: TrainConfig) -> list[int]:
    """Return the number of layers of each worker of the layer group, buffer layers included."""
    owned = [len(config.layers_of(rank)) for rank in range(config.layer_workers)]
    owned[0] += config.solved_layers.start
    owned[-1] += config.model.layers - config.solved_layers.stop
    return owned
