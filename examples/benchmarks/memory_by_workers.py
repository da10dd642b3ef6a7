"""Peak memory of each worker as 64 layers are spread over 1, 2 and 4 of them.

    python examples/benchmarks/memory_by_workers.py [--layers 64]

Layer-parallel, c_f = 4, 2+1 iterations; workers are processes over Gloo; each figure is the worker's peak above what it held before it
built its block. The whole network is in no process.
"""

import argparse
import multiprocessing
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peak import peak_bytes, reset_peak

import rayllp
from rayllp.channel import LocalChannel
from rayllp.channel.torch_dist import TorchChannel
from rayllp.config import TrainConfig
from rayllp.control import Controller
from rayllp.data import load_data
from rayllp.engine import Engine
from rayllp.models import build_architecture


def settings(workers: int, layers: int) -> TrainConfig:
    return rayllp.make_config(
        {
            "workers": workers, "mode": "parallel", "model": {"layers": layers, "width": 128, "heads": 4},
            "buffers": {"open": 0, "close": 0}, "solver": "mgrit", "mgrit": {"coarsening": 4}, "sequence_length": 128, "batch_size": 8,
        }
    )  # fmt: skip


def worker(rank: int, config: TrainConfig, folder: str, outcomes: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), config.world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=config.world, timeout=timedelta(seconds=300))
    data = load_data(config)
    reset_peak()
    before = peak_bytes()
    engine = Engine(
        build_architecture(config, data.facts), config, data, TorchChannel(timeout_s=300), LocalChannel.alone(), torch.device("cpu")
    )
    for step in range(3):
        engine.train_step(step, Controller(config).chosen)
    outcomes.put((rank, peak_bytes() - before))
    dist.barrier()
    dist.destroy_process_group()


def measure(workers: int, layers: int) -> list[int]:
    context = multiprocessing.get_context("spawn")
    outcomes = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (settings(workers, layers), folder, outcomes)
        processes = [context.Process(target=worker, args=(rank, *arguments)) for rank in range(workers)]
        for process in processes:
            process.start()
        found = dict(outcomes.get(timeout=600) for _ in processes)
        for process in processes:
            process.join(60)
    return [found[rank] for rank in range(workers)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64)
    layers = parser.parse_args().layers
    print("| workers | peak of each worker, MiB | largest, of one worker's |\n|---|---|---|")
    alone = 0
    for workers in (1, 2, 4):
        peaks = measure(workers, layers)
        alone = alone or max(peaks)
        print(f"| {workers} | {', '.join(f'{peak / 2**20:.0f}' for peak in peaks)} | {max(peaks) / alone:.2f} |")
