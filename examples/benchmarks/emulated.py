"""Layer-parallel steps over emulated devices: how close to the critical path, beside TorchBraid and 1F1B.

    python examples/benchmarks/emulated.py rows [--steps 10] [--only 0 6] [--channel mpi]
    python examples/benchmarks/emulated.py plans [--steps 10]
    python examples/benchmarks/emulated.py pipeline [--steps 10] [--picture docs/images/pipeline.png]
    python examples/benchmarks/emulated.py overhead

A layer's forward, input gradient and weight gradient take 10 ms each, of which little is arithmetic and the rest is sleep, so that 16
worker processes run at once on two cores, with real messages (64 KiB a state, Gloo). Times are medians over steps, of the slowest worker.

rows: the settings of the table below, beside the schedule's ideal (messages and everything but layers take no time), the ideal with a
barrier between forward and backward, and TorchBraid (29b42ce with MPICH, on such a machine; measured once, not by this script).
plans: predictions against measurements, for other settings than those of the table; a layer's times measured in one process, messages' as
`bench links` finds them.
pipeline: against 1F1B (three steps each) on the same workers, by microbatches, where a microbatch takes as long as the batch, and where it
takes its share.
overhead: processor time of a step outside of layers and messages, one process, N = 32 to 1024.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
import torch

import rayllp
from rayllp.bench.emulated import Emulation, RandomBatches, emulated_stack
from rayllp.bench.step import StepBench, bench_step
from rayllp.channel.local import LocalChannel
from rayllp.channel.timing import Link
from rayllp.cluster.actor_pool import ActorPool
from rayllp.cluster.ray_group import RayGroup
from rayllp.config import TrainConfig
from rayllp.control import Controller
from rayllp.engine import Engine
from rayllp.plan import Costs, predict_step
from rayllp.plan.measure import costs_of
from rayllp.plan.recording import schedules_of
from rayllp.plan.schedule import Clocks
from rayllp.training.inputs import Network

LAYER = Emulation.parse("10ms")
BATCH, TIME, WIDTH = 8, 16, 128


class Row(NamedTuple):
    """Settings; TorchBraid's step in seconds, and the speed-up of coarse chain and final sweeps alone."""

    workers: int
    layers: int
    coarsening: int
    levels: int
    forward: int
    backward: int
    peer_s: float = 0.0
    bound: float = 0.0

    @property
    def text(self) -> str:
        return f"{self.workers} | {self.layers} | {self.coarsening} | {self.levels} | {self.forward}+{self.backward}"


ROWS = (
    Row(2, 64, 4, 2, 1, 1, 1.893, 1.50),
    Row(4, 64, 4, 2, 1, 1, 1.257, 2.40),
    Row(8, 64, 4, 2, 1, 1, 1.019, 3.43),
    Row(8, 64, 8, 2, 1, 1, 0.670, 4.80),
    Row(8, 64, 4, 3, 1, 1, 0.593, 4.80),
    Row(8, 64, 4, 2, 2, 1, 1.357, 2.40),
    Row(16, 64, 4, 2, 1, 1, 1.049, 4.36),
    Row(8, 128, 8, 2, 1, 1, 1.270, 4.80),
    Row(16, 128, 8, 2, 1, 1, 1.111, 6.86),
    Row(16, 128, 4, 3, 1, 1, 0.831, 8.0),
)
OTHERS = (
    Row(2, 32, 2, 2, 1, 1), Row(2, 48, 4, 2, 2, 2), Row(3, 48, 4, 2, 2, 1), Row(4, 64, 2, 3, 1, 1), Row(4, 60, 5, 2, 3, 1),
    Row(5, 64, 8, 2, 2, 2), Row(8, 96, 3, 3, 1, 1), Row(8, 64, 2, 4, 2, 1), Row(12, 96, 4, 2, 1, 1), Row(12, 96, 8, 2, 2, 1),
    Row(16, 128, 4, 2, 1, 1), Row(16, 96, 2, 4, 1, 1),
)  # fmt: skip


def settings(row: Row, **changes: Any) -> TrainConfig:
    mgrit = {
        "coarsening": row.coarsening, "levels": {"forward": row.levels, "backward": row.levels},
        "iterations": {"forward": row.forward, "backward": row.backward},
    }  # fmt: skip
    base = {
        "model": {"layers": row.layers, "width": WIDTH, "heads": 4}, "buffers": {"open": 0, "close": 0}, "workers": row.workers,
        "mode": "parallel", "solver": "mgrit", "mgrit": mgrit, "sequence_length": TIME, "batch_size": BATCH, "step": {"middle": 1.0},
    }  # fmt: skip
    return rayllp.make_config({**base, **changes})


@contextmanager
def processes(most: Row) -> Iterator[ActorPool]:
    """Worker processes for all measurements of a run."""
    ray.init(address="local", num_cpus=most.workers, include_dashboard=False, logging_level="ERROR")
    pool = ActorPool(settings(most).world, "cpu", lasting=True)
    try:
        yield pool
    finally:
        pool.close()
        ray.shutdown()


def with_barrier(config: TrainConfig) -> float:
    """The ideal step if no worker began the backward solve before all had ended the forward one."""
    seconds, clocks = LAYER.costs().kinds(config.layer_workers), Clocks(config.layer_workers)
    forward, adjoint = schedules_of(config, Controller(config).chosen)
    forward.replay(seconds, clocks)
    for rank, deferred in enumerate(forward.deferred_work()):
        while work := deferred.pop():
            clocks.spend(rank, seconds[work.kind], work.solve)
    clocks.meet("forward")
    adjoint.replay(seconds, clocks)
    return max(clocks.now)


def rows(arguments: argparse.Namespace) -> None:
    heads = (
        "workers | N | c_f | levels | iterations | step, s | ideal | over ideal | over the model | with barrier | chains alone | over that"
    )
    most = max(ROWS, key=lambda row: row.workers)
    with processes(most) as pool:
        # The ideal has layers of 10 ms and messages of none; the model has what both take on this machine.
        costs = measured_costs(message_s(pool, most))
        print(shown(costs) + f"\n| {heads} | speed-up | TorchBraid over ours |\n" + "|---" * 14 + "|", flush=True)
        for row in [ROWS[n] for n in arguments.only or range(len(ROWS))]:
            config = settings(row, channel=arguments.channel)
            found = bench_step(config, steps=arguments.steps, emulate=LAYER, pool=pool)
            assert found.ideal_s is not None
            alone = found.serial_s / row.bound
            modelled = found.step_s / predict_step(config, Controller(config).chosen, costs)
            ideal = f"{found.ideal_s:.3f} | {found.step_s / found.ideal_s:.3f} | {modelled:.3f}"
            barrier = f"{with_barrier(config):.3f}"
            bound, speed_up = f"{alone:.3f} | {found.step_s / alone:.3f}", f"{found.serial_s / found.step_s:.2f}"
            peer = f"{row.peer_s / found.step_s:.2f}"
            print(f"| {row.text} | {found.step_s:.3f} | {ideal} | {barrier} | {bound} | {speed_up} | {peer} |", flush=True)


def message_s(pool: ActorPool, most: Row) -> float:
    """A state's way to the neighbour, of the slowest link."""
    config = settings(most)
    group = RayGroup(config, pool)
    group.start(config, Network(emulated_stack(config, Emulation(0, 0, 0))), RandomBatches(config))
    links: list[Link] = [link for mine in group.call("time_messages", [4 * BATCH * TIME * WIDTH]) for link in mine]
    group.shutdown()
    return max(next(iter(link.seconds.values())) for link in links)


def measured_costs(message: float) -> Costs:
    """Of an emulated layer as a worker calls it, with what autograd and Python add to its sleep."""
    torch.set_num_threads(1)
    config, alone = settings(Row(1, 8, 4, 2, 1, 1)), LocalChannel.alone()
    engine = Engine(emulated_stack(config, LAYER), config, RandomBatches(config), alone, alone, torch.device("cpu"))
    return costs_of(engine, message_s=message)


def shown(costs: Costs) -> str:
    return "measured, ms: " + ", ".join(f"{name.replace('_', ' ')} {1e3 * seconds:.2f}" for name, seconds in vars(costs).items() if seconds)


def plans(arguments: argparse.Namespace) -> None:
    most = max(OTHERS, key=lambda row: row.workers)
    with processes(most) as pool:
        costs = measured_costs(message_s(pool, most))
        print(shown(costs) + "\n")
        print("| workers | N | c_f | levels | iterations | measured, s | predicted | error, % |\n" + "|---" * 8 + "|")
        for row in OTHERS:
            config = settings(row)
            found = bench_step(config, steps=arguments.steps, emulate=LAYER, pool=pool)
            predicted = predict_step(config, Controller(config).chosen, costs)
            print(f"| {row.text} | {found.step_s:.3f} | {predicted:.3f} | {100 * (predicted / found.step_s - 1):+.1f} |", flush=True)


def pipeline(arguments: argparse.Namespace) -> None:
    counts, measured = (8, 16, 32), {}
    row = Row(8, 64, 8, 2, 1, 1)
    ours = {"c_f 8, 2 levels": row, "c_f 4, 3 levels": Row(8, 64, 4, 3, 1, 1)}
    shape = {"batch_size": 64, "sequence_length": 8}  # states as large, and a batch that divides
    with processes(row) as pool:
        for name, each in ours.items():
            measured[name] = bench_step(settings(each, **shape), steps=arguments.steps, emulate=LAYER, pool=pool)
        for count in counts:
            config = settings(row, **shape, microbatches=count).model_copy(update={"mode": "serial"})
            for name, times in ((f"latency-bound {count}", LAYER), (f"throughput-bound {count}", LAYER.scaled(1 / count))):
                measured[name] = bench_step(config, steps=3, emulate=times, pool=pool, warm=1)
    print("| what | step, s | speed-up over one device |\n|---|---|---|")
    for name, found in measured.items():
        print(f"| {name} | {found.step_s:.3f} | {64 * LAYER.serial / found.step_s:.2f} |")
    if arguments.picture:
        draw(measured, counts, list(ours), arguments.picture)


def draw(measured: dict[str, StepBench], counts: tuple[int, ...], ours: list[str], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, style in (("latency-bound", "o-"), ("throughput-bound", "s-")):
        axis.plot(counts, [measured[f"{kind} {count}"].step_s for count in counts], style, label=f"1F1B, {kind}")
    for name, style in zip(ours, ("--", ":"), strict=True):
        axis.axhline(measured[name].step_s, color="#2ca02c", ls=style, label=f"layer-parallel, {name}, 1+1")
    axis.axhline(64 * LAYER.serial, color="grey", lw=0.8, label="one device")
    axis.set(xscale="log", yscale="log", xlabel="microbatches", ylabel="step, s", title="8 workers, 64 layers of 10 + 10 + 10 ms")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize="small")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


def overhead(arguments: argparse.Namespace) -> None:
    """Layers that do nothing: what is left of a step is the solver and the engine."""
    torch.set_num_threads(1)
    print("| N | outside of layers, ms a step | µs a layer | of 30 ms a layer, % |\n|---|---|---|---|")
    for layers in (32, 64, 128, 256, 512, 1024):
        config = settings(Row(1, layers, 4, 2, 1, 1), sequence_length=2, batch_size=2, model={"layers": layers, "width": 4, "heads": 1})
        alone = LocalChannel.alone()
        engine = Engine(emulated_stack(config, Emulation(0, 0, 0)), config, RandomBatches(config), alone, alone, torch.device("cpu"))
        accuracy, times = Controller(config).chosen, []
        for step in range(arguments.steps + 2):
            began = time.process_time()
            engine.train_step(step, accuracy)
            times.append(time.process_time() - began)
        taken = sorted(times[2:])[len(times[2:]) // 2]
        print(f"| {layers} | {1e3 * taken:.1f} | {1e6 * taken / layers:.0f} | {100 * taken / layers / LAYER.serial:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "plans", "pipeline", "overhead"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--only", type=int, nargs="+", help="of the table's rows, from 0")
    parser.add_argument("--channel", default="auto", help="of rows: auto (Gloo) or mpi")
    arguments = parser.parse_args()
    {"rows": rows, "plans": plans, "pipeline": pipeline, "overhead": overhead}[arguments.what](arguments)


if __name__ == "__main__":
    main()
