"""A step by TorchBraid and by ours, taking turns, each in processes of its own. TorchBraid must be installed (docs/torchbraid.md).

    python examples/benchmarks/beside_torchbraid.py [real] [--rounds 15]
    python examples/benchmarks/beside_torchbraid.py rows [--rounds 10] [--only 0 3 4]

real: two workers, 64 layers of GPT-2 (width 128, 4 heads, 64 tokens, batch 8, c_f = 8, 1+1), one thread each, and a bare loop over the same
layers in one process. rows: the table of emulated.py (layers that take 10 ms for each of forward, input gradient and
weight gradient), TorchBraid measured here rather than quoted.

Whole steps: embedding, both solves, loss, gradients, optimizer. TorchBraid is driven by the same engine (`solver: torchbraid`); it shares
layers out its own way, one more on the first worker and one fewer on the last. Ours goes over Gloo and over MPI.
"""

import argparse
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

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
from rayllp.engine.memory import keep_freed_memory
from rayllp.models import LayerStack

Step = Callable[[int], Any]
WARM_STEPS = 4
PATIENCE_S = 300
QUIET = {"adaptive": {"probe_every": 0, "consistency": 0}}


class Case(NamedTuple):
    """What is measured: the settings of ours and of TorchBraid, and whether a bare loop is one of the contenders."""

    text: str
    ours: TrainConfig
    theirs: TrainConfig
    with_bare: bool


def real() -> Case:
    mgrit = {"coarsening": 8, "iterations": {"forward": 1, "backward": 1}}
    base = {
        "workers": 2, "mode": "parallel", "solver": "mgrit", "mgrit": mgrit,
        "model": {"layers": 64, "width": 128, "heads": 4}, "step": {"middle": "1/N"},
        "sequence_length": 64, **QUIET,
    }  # fmt: skip
    return Case("real", real_settings(**base), real_settings(**base, channel="mpi", solver="torchbraid"), True)


def emulated(row: Row) -> Case:
    return Case(row.text, emulated_settings(row, **QUIET), emulated_settings(row, **QUIET, channel="mpi", solver="torchbraid"), False)


def engine_of(config: TrainConfig, channel: Channel, emulate: bool) -> Engine:
    if not emulate:
        return make_engine(config, channel)
    stack: LayerStack = emulated_stack(config, LAYER)
    return Engine(stack, config, RandomBatches(config), channel, LocalChannel.alone(), torch.device("cpu"))


class Turns(NamedTuple):
    """What a process has of its contender: the pipe on which steps are asked for, and where its fellows meet."""

    orders: Connection
    rank: int
    folder: str
    meeting: Rendezvous


def process(turns: Turns, name: str, case: Case) -> None:
    """Take a step whenever told to, and tell its seconds."""
    torch.set_num_threads(1)
    gc.freeze()
    keep_freed_memory()  # both as workers do
    orders, rank, folder, meeting = turns
    if name == "bare loop":
        step: Step = bare(case.ours)
    else:
        config = case.theirs if name == "torchbraid" else case.ours
        size = config.layer_workers
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(Path(folder) / "store"), size), rank=rank, world_size=size, timeout=timedelta(seconds=120)
        )
        channel: Channel = TorchChannel(timeout_s=60) if name == "gloo" else MPIWorld.join(meeting, rank, 60).channel(0, 60)
        engine, accuracy = engine_of(config, channel, not case.with_bare), Controller(config).chosen
        step = lambda n: engine.train_step(n, accuracy)  # noqa: E731
    while (n := orders.recv()) is not None:
        if name != "bare loop":
            dist.barrier()
        started = time.perf_counter()
        step(n)
        orders.send(time.perf_counter() - started)


@contextmanager
def contender(name: str, case: Case) -> Iterator[Step]:
    """Its processes; a step of theirs, which returns the seconds of the slowest."""
    context, size = multiprocessing.get_context("spawn"), 1 if name == "bare loop" else case.ours.layer_workers
    manager = ProcessManager("127.0.0.1", ["here"] * size)
    pipes = [context.Pipe() for _ in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        turns = [Turns(pipe[1], rank, folder, manager.rendezvous) for rank, pipe in enumerate(pipes)]
        processes = [context.Process(target=process, args=(each, name, case)) for each in turns]
        for each in processes:
            each.start()

        def step(n: int) -> float:
            for pipe, _ in pipes:
                pipe.send(n)
            if not all(pipe.poll(PATIENCE_S) for pipe, _ in pipes):
                raise TimeoutError(f"{name}: step {n} took more than {PATIENCE_S} s")
            return max(pipe.recv() for pipe, _ in pipes)

        try:
            yield step
            for pipe, _ in pipes:
                pipe.send(None)
        finally:
            deadline = time.monotonic() + 20
            for each in processes:
                each.join(max(0.0, deadline - time.monotonic()))
                each.kill()
            manager.close()


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender's steps. Those that compute take turns; those that sleep go one after the other, as there are many."""
    names = ["torchbraid", "gloo", "mpi", *(["bare loop"] if case.with_bare else [])]
    times: dict[str, list[float]] = {name: [] for name in names}
    for together in [names] if case.with_bare else [[name] for name in names]:
        with ExitStack() as stack:
            steps = {name: stack.enter_context(contender(name, case)) for name in together}
            for n in range(rounds + WARM_STEPS):
                for name in together[n % len(together) :] + together[: n % len(together)]:
                    seconds = steps[name](n)
                    if n >= WARM_STEPS:
                        times[name].append(seconds)
    return times


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
        print(f"{case.text} | {shown} | {bares} | {over('gloo', 'torchbraid')} {over('mpi', 'torchbraid')}", flush=True)


if __name__ == "__main__":
    main()
