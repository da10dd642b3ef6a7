"""A step by TorchBraid and by ours, in the same processes, taking turns. TorchBraid must be installed (docs/torchbraid.md).

    python examples/benchmarks/beside_torchbraid.py [real] [--rounds 15]
    python examples/benchmarks/beside_torchbraid.py rows [--rounds 10] [--only 0 3 4]

real: two workers, 64 layers of GPT-2 (width 128, 4 heads, 64 tokens, batch 8, c_f = 8, 1+1), one thread each, and a bare loop over the same
layers on one of them while the other waits. rows: the table of emulated.py (layers that take 10 ms for each of forward, input gradient and
weight gradient), TorchBraid measured here rather than quoted.

Whole steps: embedding, both solves, loss, gradients, optimizer. TorchBraid is driven by the same engine (`solver: torchbraid`); it shares
layers out its own way, one more on the first worker and one fewer on the last. Ours goes over Gloo and over MPI.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from emulated import LAYER, ROWS, Row
from emulated import settings as emulated_settings
from step import bare, make_engine
from step import settings as real_settings

from rayllp.bench.emulated import RandomBatches, emulated_stack
from rayllp.channel import LocalChannel
from rayllp.channel.base import Channel
from rayllp.channel.mpi import MPIWorld
from rayllp.channel.pmi import ProcessManager, Rendezvous
from rayllp.channel.torch_dist import TorchChannel
from rayllp.config import TrainConfig
from rayllp.control import Controller
from rayllp.engine import Engine
from rayllp.models import LayerStack

Step = Callable[[int], Any]
QUIET = {"adaptive": {"probe_every": 0, "consistency": 0}}


def real() -> tuple[str, TrainConfig, TrainConfig, bool]:
    mgrit = {"coarsening": 8, "iterations": {"forward": 1, "backward": 1}}
    base = {
        "workers": 2, "mode": "parallel", "mgrit": mgrit, "model": {"layers": 64, "width": 128, "heads": 4}, "step": {"middle": "1/N"},
        "sequence_length": 64, **QUIET,
    }  # fmt: skip
    return "real", real_settings(**base), real_settings(**base, channel="mpi", solver="torchbraid"), True


def emulated(row: Row) -> tuple[str, TrainConfig, TrainConfig, bool]:
    return row.text, emulated_settings(row, **QUIET), emulated_settings(row, **QUIET, channel="mpi", solver="torchbraid"), False


def engine_of(config: TrainConfig, channel: Channel, emulate: bool) -> Engine:
    if not emulate:
        return make_engine(config, channel)
    stack: LayerStack = emulated_stack(config, LAYER)
    return Engine(stack, config, RandomBatches(config), channel, LocalChannel.alone(), torch.device("cpu"))


def process(
    rank: int, folder: str, meeting: Rendezvous, case: tuple[str, TrainConfig, TrainConfig, bool], rounds: int, outcome: Any
) -> None:
    torch.set_num_threads(1)
    _, ours, theirs, with_bare = case
    size = ours.layer_workers
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(Path(folder) / "store"), size), rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    world = MPIWorld.join(meeting, rank, 60)
    steps: dict[str, Step] = {}
    for name, config, channel in (
        ("torchbraid", theirs, world.channel(0, 60)), ("gloo", ours, TorchChannel(timeout_s=60)), ("mpi", ours, world.channel(0, 60)),
    ):  # fmt: skip
        engine, accuracy = engine_of(config, channel, not with_bare), Controller(config).accuracy
        steps[name] = lambda n, engine=engine, accuracy=accuracy: engine.train_step(n, accuracy).loss
    if with_bare:
        alone = bare(ours) if rank == 0 else None
        steps["bare loop"] = lambda n: alone(n) if alone is not None else None
    names, times = list(steps), {name: [] for name in steps}
    for n in range(rounds + 2):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            dist.barrier()
            started = time.perf_counter()
            steps[name](n)
            taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if n >= 2:
                times[name].append(float(taken))
    if rank == 0:
        outcome.put(times)
    dist.barrier()


def measure(case: tuple[str, TrainConfig, TrainConfig, bool], rounds: int) -> dict[str, list[float]]:
    context, size = multiprocessing.get_context("spawn"), case[1].layer_workers
    outcome, manager = context.Queue(), ProcessManager("127.0.0.1", ["here"] * size)
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=process, args=(r, folder, manager.rendezvous, case, rounds, outcome)) for r in range(size)]
        for each in processes:
            each.start()
        try:
            return outcome.get(timeout=900)
        finally:
            for each in processes:
                each.join(20)
                each.kill()
            manager.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["real", "rows"], default="real")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", type=int, nargs="+", help="of the table's rows, from 0")
    arguments = parser.parse_args()
    cases = [real()] if arguments.what == "real" else [emulated(ROWS[n]) for n in arguments.only or range(len(ROWS))]
    print("case | torchbraid, s | ours over Gloo | over MPI | of a bare loop's: torchbraid, Gloo, MPI | over torchbraid: Gloo, MPI")
    for case in cases:
        times = measure(case, arguments.rounds)
        median = {name: statistics.median(each) for name, each in times.items()}

        def over(one: str, other: str, times: dict[str, list[float]] = times) -> str:
            if other not in times:
                return "–"
            return f"{statistics.median(a / b for a, b in zip(times[one], times[other], strict=True)):.3f}"

        shown = " | ".join(f"{median[name]:.3f}" for name in ("torchbraid", "gloo", "mpi"))
        bares = " ".join(over(name, "bare loop") for name in ("torchbraid", "gloo", "mpi"))
        print(f"{case[0]} | {shown} | {bares} | {over('gloo', 'torchbraid')} {over('mpi', 'torchbraid')}", flush=True)


if __name__ == "__main__":
    main()
