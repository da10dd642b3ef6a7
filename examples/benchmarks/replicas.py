"""What replicas cost: memory of a worker with and without a sharded optimizer, and time of a step with and without overlap.

    python examples/benchmarks/replicas.py memory
    sudo python examples/benchmarks/replicas.py overlap

memory: `mesh: {data: 4, layer: 1}`, a process a replica, GPT-2. Bytes of the optimizer's tensors, and the peak of the resident memory above
what the process held before it built the network.

overlap: a replica on each of two hosts, network namespaces with a cable of 100 MB/s (tc's tbf) and 1 ms (netem, where the kernel has it;
the script says if not). 12 layers of 1 M parameters each take 20 ms for forward, input gradient and weight gradient, as on a device. A step
with all gradients summed at its end, and bucket by bucket while the adjoint runs.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peak import peak_bytes, reset_peak

import rayllp
from rayllp.bench.emulated import Emulation, RandomBatches, emulated_stack
from rayllp.channel import LocalChannel
from rayllp.channel.torch_dist import TorchChannel
from rayllp.config import TrainConfig
from rayllp.control import Controller
from rayllp.data import load_data
from rayllp.engine import Engine
from rayllp.engine.replica_sums import ReplicaSums
from rayllp.models import build_architecture

MIB = 2**20
REPLICAS = 4


def settings(optimizer: str, replicas: int, *, sharded: bool = False, batch: int = 2) -> TrainConfig:
    return rayllp.make_config(
        {
            "mode": "serial", "model": {"layers": 16, "width": 256, "heads": 4}, "mesh": {"data": replicas, "layer": 1},
            "sequence_length": 64, "batch_size": batch * replicas, "optimizer": {"name": optimizer, "sharded": sharded},
        }
    )  # fmt: skip


def train(config: TrainConfig, rank: int, store: Any, steps: int, stack: Any = None, batches: Any = None) -> dict[str, Any]:
    """Some steps of one replica; its times, and what it keeps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=config.mesh.data, timeout=timedelta(seconds=300))
    data = batches or load_data(config)
    reset_peak()
    before = peak_bytes()
    architecture = stack or build_architecture(config, data.facts)
    engine = Engine(architecture, config, data, LocalChannel.alone(), TorchChannel(), torch.device("cpu"))
    stats = [engine.train_step(step, Controller(config).chosen) for step in range(steps)]
    parameters = engine.block.parameters.values()
    state = sum(value.nbytes for p in parameters for value in engine.optimizer.state_of(p).values())
    found = {
        "weights": sum(p.nbytes for p in parameters), "state": state, "peak": peak_bytes() - before,
        "step_s": statistics.median(each.time_s for each in stats[1:]),
    }  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()
    return found


def _replica(config: TrainConfig, rank: int, folder: str, results: Any) -> None:
    results.put((rank, train(config, rank, dist.FileStore(str(Path(folder) / "store"), config.mesh.data), steps=4)))


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


# Two hosts ------------------------------------------------------------------------------------------------------------------------


def overlap(rate: int, delay: str, rounds: int) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.hosts import PYTHON, hosts

    with hosts() as pair:
        slowed = [_slow_down(host, rate, delay) for host in pair]
        delayed = all(slowed)
        print(f"{rate} MB/s" + (f", {delay}" if delayed else f"; {delay} cannot be emulated: this kernel has no netem"), flush=True)
        seconds: dict[tuple[bool, bool], list[float]] = {(sharded, late): [] for sharded in (False, True) for late in (True, False)}
        for _ in range(rounds):  # they take turns, since the machine may be busy with other things
            for case, found in seconds.items():
                arguments = [PYTHON, __file__, "host", json.dumps(case), "--address", pair[0].address]
                ranks = [host.start(*arguments, "--rank", str(n), GLOO_SOCKET_IFNAME="cable") for n, host in enumerate(pair)]
                found.append(max(json.loads(rank.communicate(timeout=600)[0].splitlines()[-1])["step_s"] for rank in ranks))
        for (sharded, late), found in seconds.items():
            kind = f"{'sharded' if sharded else 'whole':8} {'at the end' if late else 'overlapped':11}"
            print(f"{kind} step {statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})", flush=True)


def _slow_down(host: Any, rate: int, delay: str) -> bool:
    """Whether packets are delayed, too."""
    cable = ["tc", "qdisc", "add", "dev", "cable"]
    host.run(*cable, "root", "handle", "1:", "tbf", "rate", f"{8 * rate}mbit", "burst", "256kb", "latency", "50ms")
    try:
        host.run(*cable, "parent", "1:1", "netem", "delay", delay)
    except (AssertionError, subprocess.CalledProcessError):
        return False
    return True


def _on_host(sharded: bool, late: bool, rank: int, address: str) -> None:
    if late:
        ReplicaSums._contributed = lambda self, parameter: None  # type: ignore[method-assign]
    config = rayllp.make_config(
        {
            "mode": "serial", "model": {"layers": 12, "width": MIB}, "mesh": {"data": 2, "layer": 1}, "sequence_length": 2, "batch_size": 2,
            "optimizer": {"sharded": sharded},
        }
    )  # fmt: skip
    stack, batches = emulated_stack(config, Emulation.parse("20ms")), RandomBatches(config)
    print(json.dumps(train(config, rank, dist.TCPStore(address, 29500, 2, rank == 0), 8, stack, batches)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "overlap", "host"])
    parser.add_argument("case", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=int, default=100, help="of the cable, MB/s")
    parser.add_argument("--delay", default="1ms", help="of the cable, each way")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.what == "memory":
        memory()
    elif given.what == "overlap":
        overlap(given.rate, given.delay, given.rounds)
    else:
        _on_host(*json.loads(given.case), given.rank, given.address)
