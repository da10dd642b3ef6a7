"""`rayllp bench step`: time a training step by phase and worker, and compare it with its ideal."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from rayllp.bench.emulated import Emulation, RandomBatches, emulated_stack
from rayllp.cluster.actor_pool import ActorPool
from rayllp.cluster.ray_group import RayGroup
from rayllp.config import TrainConfig
from rayllp.control import Controller
from rayllp.data import Batches, load_data
from rayllp.engine import StepStats
from rayllp.models import Architecture
from rayllp.plan import predict
from rayllp.plan.measure import measure_costs
from rayllp.report.progress import tell
from rayllp.timeline import Span, TimedStep, sum_phases
from rayllp.training.inputs import Network

WARM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """Times of a step in seconds; medians over the timed steps.

    Attributes:
        step_s: from beginning to end of a step, on the slowest worker.
        forward_s: until the last worker has the gradient of the loss; None in serial mode, where phases overlap.
        backward_s: the rest of the step; None in serial mode.
        serial_s: an exact step on one worker: all layers' forward and backward, one after the other.
        ideal_s: the schedule's critical path without messages and overhead, of a rolling window for the mean number of sweeps that the
            steps have taken; None in serial mode.
        phases: for each worker, seconds by phase: "forward coarse solve", "adjoint last sweep", …, "wait", "send".
        spans: for each worker, the spans of the step with the median time, in seconds from when the first worker began it, by the nodes'
            clocks.
        steps: number of timed steps.
    """

    step_s: float
    forward_s: float | None
    backward_s: float | None
    serial_s: float
    ideal_s: float | None
    phases: tuple[dict[str, float], ...]
    spans: tuple[tuple[Span, ...], ...]
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """Return all values but the spans, for a JSON file."""
        return {name: value for name, value in asdict(self).items() if name != "spans"}


def bench_step(
    config: TrainConfig,
    *,
    steps: int = 10,
    emulate: Emulation | None = None,
    device: str = "cpu",
    pool: ActorPool | None = None,
    warm: int = WARM_STEPS,
) -> StepBench:
    """Time training steps on the cluster that this process has joined. With `accumulate`, the ideal is that of one part of the batch.

    Args:
        config: the settings.
        steps: number of timed steps.
        emulate: times of emulated layers, which replace the model's.
        device: kind of device of each worker.
        pool: a pool that outlives this call, for several measurements with the same processes.
        warm: number of steps before the timed ones.
    """
    architecture: Architecture | None = None
    batches: Batches
    if emulate is None:
        batches = load_data(config)
        costs = measure_costs(config, batches, message_s=0.0, device=device)
        serial_s = config.model.layers * (costs.record + costs.full_gradient) + costs.enter + costs.enter_gradient + costs.leave
    else:
        architecture, batches = emulated_stack(config, emulate), RandomBatches(config)
        costs, serial_s = emulate.costs(), config.model.layers * emulate.serial
    accuracy = Controller(config).chosen
    group = RayGroup(config, pool or ActorPool(config.world, device))
    try:
        group.start(config, Network(architecture), batches)
        group.call("time_steps", [(step, accuracy) for step in range(warm)])
        done = group.call("time_steps", [(step, accuracy) for step in range(warm, warm + steps)])
    finally:
        group.shutdown()
    timed = [[of_step for _, of_step in worker] for worker in done]
    sweeps = mean_sweeps([stats for stats, _ in done[0]])
    return _summary(config, timed, serial_s, None if accuracy.serial else predict(config, accuracy, costs, sweeps=sweeps).step_s)


def mean_sweeps(steps: Sequence[StepStats]) -> tuple[float, float] | None:
    """Return the mean numbers of sweeps of steps by a rolling window, forward and adjoint; None if there is none."""
    counts = [stats.sweeps for stats in steps if stats.sweeps is not None]
    return (fmean(forward for forward, _ in counts), fmean(adjoint for _, adjoint in counts)) if counts else None


def _summary(config: TrainConfig, timed: Sequence[list[TimedStep]], serial_s: float, ideal_s: float | None) -> StepBench:
    """Combine the timed steps of all workers (`timed`) into medians."""
    times = [max(worker.seconds for worker in step) for step in zip(*timed, strict=True)]
    step_s = median(times)
    forward_s = None
    if ideal_s is not None:
        last = timed[config.layer_workers - 1]
        forward_s = median(max(span.end for span in step.spans if span.solve == "loss") for step in last)
    middle = min(range(len(times)), key=lambda n: abs(times[n] - step_s))
    began = min(worker[middle].started for worker in timed)
    return StepBench(
        step_s=step_s,
        forward_s=forward_s,
        backward_s=None if forward_s is None else step_s - forward_s,
        serial_s=serial_s,
        ideal_s=ideal_s,
        phases=tuple(_phases([step.spans for step in worker]) for worker in timed),
        spans=tuple(tuple(span.shifted(worker[middle].started - began) for span in worker[middle].spans) for worker in timed),
        steps=len(times),
    )


def _phases(steps: Sequence[Sequence[Span]]) -> dict[str, float]:
    """Return median seconds by phase, over steps."""
    sums = [sum_phases(spans) for spans in steps]
    return {name: median(each.get(name, 0.0) for each in sums) for name in dict.fromkeys(name for each in sums for name in each)}


def show_step(config: TrainConfig, bench: StepBench, console: Console) -> None:
    """Print a table of each worker's milliseconds by phase, and a line of totals."""
    names = list(dict.fromkeys(name for phases in bench.phases for name in phases))
    table = Table(title=f"a step's time in ms: {config.layer_workers} workers, median of {bench.steps} steps")
    for name in ("worker", *names):
        table.add_column(name, justify="right")
    for rank, phases in enumerate(bench.phases):
        table.add_row(str(rank), *(f"{1e3 * phases.get(name, 0):.1f}" for name in names))
    console.print(table)
    parts = [f"step {1e3 * bench.step_s:.1f} ms"]
    if bench.forward_s is not None and bench.backward_s is not None:
        parts.append(f"forward {1e3 * bench.forward_s:.1f}, backward {1e3 * bench.backward_s:.1f}")
    parts.append(f"serial on one worker {1e3 * bench.serial_s:.1f}, speed-up {bench.serial_s / bench.step_s:.2f}")
    if bench.ideal_s:
        parts.append(f"ideal {1e3 * bench.ideal_s:.1f}, time over ideal {bench.step_s / bench.ideal_s:.3f}")
    tell(console, "; ".join(parts))
