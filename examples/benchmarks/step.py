"""What a step costs beyond its layers.

    python examples/benchmarks/step.py [--rounds 15]

1. One worker in serial mode against a bare PyTorch loop over transformers' GPT-2: time a step (alternating, median of ratios) and peak
   memory (a fresh process each).
2. Two workers, layer-parallel: time a step over its ideal critical path, which is the training cycle itself run on logical clocks with
   the times of this network's own layers, measured in the same processes; and over a bare loop on one of them while the other waits
   (64 layers of width 128, 4 heads, 64 tokens, batch 8, c_f = 8, 1+1 iterations, one thread a worker).
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peak import peak_bytes, reset_peak
from plain import plain_gpt2, plain_step

import rayllp
from rayllp.channel import LocalChannel
from rayllp.channel.torch_dist import TorchChannel
from rayllp.config import TrainConfig
from rayllp.control import Controller
from rayllp.data import load_data
from rayllp.engine import Engine
from rayllp.engine.memory import keep_freed_memory
from rayllp.models import build_architecture
from rayllp.plan import Costs, predict_step
from rayllp.plan.measure import Parts, parts_of_step

torch.set_num_threads(1)


def settings(**changes: object) -> TrainConfig:
    base = {"model": {"layers": 12, "width": 256, "heads": 8}, "buffers": {"open": 0, "close": 0}, "step": {"middle": 1.0}}
    return rayllp.make_config({**base, "mode": "serial", "workers": 1, "sequence_length": 128, "batch_size": 8, **changes})


def make_engine(config: TrainConfig, channel: object, device: str | torch.device = "cpu") -> Engine:
    text = load_data(config)
    architecture = build_architecture(config, text.facts)
    return Engine(architecture, config, text, channel, LocalChannel.alone(), torch.device(device))  # type: ignore[arg-type]


# One worker against a bare loop ---------------------------------------------------------------------------------------------------


def ours(config: TrainConfig) -> Callable[[int], None]:
    engine, controller = make_engine(config, LocalChannel.alone()), Controller(config)
    return lambda step: engine.train_step(step, controller.chosen) and None


def bare(config: TrainConfig) -> Callable[[int], None]:
    text = load_data(config)
    model = plain_gpt2(config, text.tokenizer.vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(n: int) -> None:
        plain_step(model, optimizer, config, n, *text.batch("train", n, config.batch_size))

    return step


def memory_of(kind: str) -> int:
    """Peak resident memory, above that of a process which has only imported everything and read the text, of three steps. Bytes."""
    command = [sys.executable, __file__, "--memory", kind]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def memory_main(kind: str) -> None:
    config = settings()
    load_data(config)
    reset_peak()
    before = peak_bytes()
    step = {"ours": ours, "bare": bare}[kind](config)
    for n in range(3):
        step(n)
    print(json.dumps(peak_bytes() - before))


def one_worker(rounds: int) -> None:
    config = settings()
    a, b = ours(config), bare(config)
    ratios, times = [], []
    for n in range(rounds + 2):
        pair = []
        for step in (a, b) if n % 2 else (b, a):
            started = time.perf_counter()
            step(n)
            pair.append(time.perf_counter() - started)
        mine, theirs = pair if n % 2 else pair[::-1]
        if n >= 2:
            ratios.append(mine / theirs)
            times.append((mine, theirs))
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"one worker, serial, over a bare loop: time {statistics.median(ratios):.3f} (medians {mine:.3f} s and {theirs:.3f} s)")
    ratios = [memory_of("ours") / memory_of("bare") for _ in range(3)]
    print(f"one worker, serial, over a bare loop: memory {statistics.median(ratios):.3f}")


# Two workers against the critical path --------------------------------------------------------------------------------------------


def clocked(works: Sequence[Callable[[], object]], repeats: int = 7) -> list[float]:
    """Median seconds of each work, both workers at the same one at the same time, the works taking turns."""
    times = []
    for _ in range(repeats):
        row = []
        for work in works:
            dist.barrier()
            started = time.perf_counter()
            work()
            row.append(time.perf_counter() - started)
        times.append(row)
    return [statistics.median(column) for column in zip(*times, strict=True)]


def measure_costs(engine: Engine, channel: TorchChannel) -> Costs:
    """Times of this worker's own layers, while the other worker measures too."""
    block = engine.block
    spec = engine.group.spec(engine.step_batch(0).inputs)
    own = clocked(parts_of_step(engine, torch.randn(spec.shapes[0], dtype=block.dtype)))
    everyone = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(everyone)
    once, count = Parts(*everyone.tolist()), len(block.indices) * channel.size
    # Only one worker enters, and one leaves: the sums are theirs.
    return Costs(
        forward=once.forward / count, record=once.record / count, input_gradient=once.input_gradient / count,
        full_gradient=once.full_gradient / count, leave=once.leave, enter=once.enter, enter_gradient=once.enter, update=once.update / count,
    )  # fmt: skip


def two_workers_process(rank: int, folder: str, config: TrainConfig, rounds: int, outcome: "multiprocessing.Queue") -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    channel = TorchChannel()
    engine, accuracy = make_engine(config, channel), Controller(config).chosen
    alone = bare(config) if rank == 0 else None
    ratios, times, ideals, singles = [], [], [], []
    for n in range(rounds + 2):
        if n % 5 == 0:
            costs = measure_costs(engine, channel)
            ideal = predict_step(config, accuracy, costs) if rank == 0 else 0.0
            dist.barrier()
        started = time.perf_counter()
        engine.train_step(n, accuracy)
        taken = time.perf_counter() - started
        dist.barrier()
        if alone is not None:
            started = time.perf_counter()
            alone(n)
            single = time.perf_counter() - started
            if n >= 2:
                ratios.append((taken / ideal, taken / single))
                times.append(taken)
                ideals.append(ideal)
                singles.append(single)
        dist.barrier()
    if rank == 0:
        over_ideal, over_bare = (statistics.median(column) for column in zip(*ratios, strict=True))
        outcome.put((over_ideal, over_bare, *(statistics.median(column) for column in (times, ideals, singles)), costs))
    dist.barrier()
    dist.destroy_process_group()


def two_workers(rounds: int) -> None:
    mgrit = {"coarsening": 8, "iterations": {"forward": 1, "backward": 1}}
    config = settings(
        workers=2,
        mode="parallel",
        solver="mgrit",
        mgrit=mgrit,
        model={"layers": 64, "width": 128, "heads": 4},
        step={"middle": "1/N"},
        sequence_length=64,
    )
    context = multiprocessing.get_context("spawn")
    outcome = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=two_workers_process, args=(r, folder, config, rounds, outcome)) for r in range(2)]
        for process in processes:
            process.start()
        over_ideal, over_bare, taken, ideal, single, costs = outcome.get(timeout=600)
        for process in processes:
            process.join(30)
    shown = ", ".join(f"{name} {1000 * value:.2f}" for name, value in vars(costs).items() if value)
    print(
        f"two workers, parallel (N = 64, c_f = 8, 1+1), over the critical path: {over_ideal:.3f} (medians {taken:.3f} s and {ideal:.3f} s)"
    )
    print(f"  over a bare loop on one of them: {over_bare:.3f} (median {single:.3f} s)")
    print(f"  its layers, ms: {shown}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["one", "two"], help="one worker, or two, alone")
    parser.add_argument("--memory", choices=["ours", "bare"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory_main(arguments.memory)
    else:
        if arguments.only != "two":
            one_worker(arguments.rounds)
        if arguments.only != "one":
            two_workers(arguments.rounds)
