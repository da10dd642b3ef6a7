"""What replicas cost: memory of a worker with and without a sharded optimizer, and the time of a step with and without overlap.

    python examples/benchmarks/replicas.py memory
    sudo python examples/benchmarks/replicas.py overlap --rate 100 --delay 1ms

memory: `mesh: {data: 4, layer: 1}`, a process a replica over Gloo. Bytes of the optimizer's tensors, and the peak of the resident memory
above what the process held before it built the network. An update makes no copies on a CPU, but the gradients' sum does.
"""

import argparse
import multiprocessing
import statistics
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

MIB = 2**20
REPLICAS = 4


def settings(optimizer: str, replicas: int, *, sharded: bool = False, layers: int = 16, width: int = 256) -> TrainConfig:
    return rayllp.make_config(
        {
            "mode": "serial", "model": {"layers": layers, "width": width, "heads": 4}, "mesh": {"data": replicas, "layer": 1},
            "sequence_length": 64, "batch_size": 2 * replicas, "optimizer": {"name": optimizer, "sharded": sharded},
        }
    )  # fmt: skip


def train(config: TrainConfig, rank: int, size: int, store: Any, steps: int) -> dict[str, Any]:
    """Some steps of one replica; its times, and what it keeps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    text = load_data(config)
    reset_peak()
    before = peak_bytes()
    architecture = build_architecture(config, text.facts)
    engine = Engine(architecture, config, text, LocalChannel.alone(), TorchChannel(), torch.device("cpu"))
    stats = [engine.train_step(step, Controller(config).chosen) for step in range(steps)]
    parameters = engine.block.parameters.values()
    state = sum(value.nbytes for p in parameters for value in engine.optimizer.state_of(p).values())
    found = {
        "weights": sum(p.nbytes for p in parameters), "state": state, "peak": peak_bytes() - before, "loss": stats[-1].loss,
        "step_s": statistics.median(each.time_s for each in stats[1:]),
    }  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()
    return found


def _replica(config: TrainConfig, rank: int, folder: str, results: Any) -> None:
    size = config.mesh.data
    results.put((rank, train(config, rank, size, dist.FileStore(str(Path(folder) / "store"), size), steps=4)))


def on_this_machine(config: TrainConfig) -> list[dict[str, Any]]:
    """All replicas as fresh processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_replica, args=(config, rank, folder, results)) for rank in range(config.mesh.data)]
        for process in processes:
            process.start()
        found = dict(results.get() for _ in processes)
        for process in processes:
            process.join()
    return [found[rank] for rank in sorted(found)]


def memory() -> None:
    for optimizer in ("adamw", "muon"):
        for sharded in (False, True):
            found = on_this_machine(settings(optimizer, REPLICAS, sharded=sharded))
            weights, state, peak = (max(each[part] for each in found) / MIB for part in ("weights", "state", "peak"))
            kind = "sharded" if sharded else "whole"
            print(
                f"{optimizer:6} {kind:8} weights {weights:6.1f} MiB, optimizer's state {state:6.1f} MiB, peak {peak:6.0f} MiB", flush=True
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory"])
    memory()
