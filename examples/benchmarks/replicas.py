"""What replicas cost: memory of a worker with and without a sharded optimizer, and time of a step with and without overlap.

    python examples/benchmarks/replicas.py memory
    sudo python examples/benchmarks/replicas.py overlap

memory: `mesh: {data: 4, layer: 1}`, a process a replica, GPT-2. Bytes of the optimizer's tensors, and the peak of the resident memory above
what the process held before it built the network.

overlap: a replica on each of two hosts, network namespaces with a cable of 100 MB/s (tc's tbf) and 1 ms (netem, where the kernel has it;
the script says if not). 12 layers of 1 M parameters each take 20 ms forward and 40 ms for their gradients, as on a device, asleep. A step
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peak import peak_bytes, reset_peak
from torch import nn

import rayllp
from rayllp.bench.emulated import RandomBatches, Wait
from rayllp.channel import LocalChannel
from rayllp.channel.torch_dist import TorchChannel
from rayllp.config import TrainConfig
from rayllp.control import Controller
from rayllp.data import load_data
from rayllp.engine import Engine
from rayllp.engine.replica_sums import ReplicaSums
from rayllp.models import LayerStack, build_architecture

MIB = 2**20
REPLICAS = 4
LAYER_S = 0.02
CASES = [(sharded, late) for sharded in (False, True) for late in (True, False)]
"""Whether the optimizer's state is shared out, and whether gradients are summed at the end."""


def settings(optimizer: str, replicas: int, *, sharded: bool = False, batch: int = 2) -> TrainConfig:
    return rayllp.make_config(
        {
            "mode": "serial", "model": {"layers": 16, "width": 256, "heads": 4}, "mesh": {"data": replicas, "layer": 1},
            "sequence_length": 64, "batch_size": batch * replicas, "optimizer": {"name": optimizer, "sharded": sharded},
        }
    )  # fmt: skip


def connect(rank: int, replicas: int, store: Any) -> None:
    """Make this process a replica."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=replicas, timeout=timedelta(seconds=300))


def train(config: TrainConfig, steps: int, stack: Any = None, batches: Any = None) -> dict[str, Any]:
    """Some steps of one replica; its times, and what it keeps."""
    data = batches or load_data(config)
    reset_peak()
    before = peak_bytes()
    architecture = stack or build_architecture(config, data.facts)
    engine = Engine(architecture, config, data, LocalChannel.alone(), TorchChannel(), torch.device("cpu"))
    stats = [engine.train_step(step, Controller(config).chosen) for step in range(steps)]
    parameters = engine.block.parameters.values()
    state = sum(value.nbytes for p in parameters for value in engine.optimizer.state_of(p).values())
    times = [each.time_s for each in stats[1:]]
    return {"weights": sum(p.nbytes for p in parameters), "state": state, "peak": peak_bytes() - before, "times": times}


def _replica(config: TrainConfig, rank: int, folder: str, results: Any) -> None:
    connect(rank, config.mesh.data, dist.FileStore(str(Path(folder) / "store"), config.mesh.data))
    results.put((rank, train(config, steps=4)))
    dist.barrier()
    dist.destroy_process_group()


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
        command = [PYTHON, __file__, "host", "--rounds", str(rounds), "--address", pair[0].address]
        ranks = [host.start(*command, "--rank", str(n), GLOO_SOCKET_IFNAME="cable") for n, host in enumerate(pair)]
        found = [json.loads(rank.communicate(timeout=3600)[0].splitlines()[-1]) for rank in ranks]
        for number, (sharded, late) in enumerate(CASES):
            times = [max(pair) for pair in zip(*(each[number] for each in found), strict=True)]
            kind = f"{'sharded' if sharded else 'whole':8} {'at the end' if late else 'overlapped':11}"
            low, middle, high = statistics.quantiles(times, n=4)
            print(f"{kind} step {middle:.3f} s (quartiles {low:.3f} to {high:.3f})", flush=True)


def _slow_down(host: Any, rate: int, delay: str) -> bool:
    """Whether packets are delayed, too."""
    host.slow_down(rate)
    try:
        host.run("tc", "qdisc", "add", "dev", "cable", "parent", "1:1", "netem", "delay", delay)
    except (AssertionError, subprocess.CalledProcessError):
        return False
    return True


class _Slowly(torch.autograd.Function):
    """Takes its time, as on a device: forward, and twice as long for the gradients of state and weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        wait = Wait(LAYER_S)
        ctx.save_for_backward(weights)
        y = x + weights[: x.shape[-1]]
        wait()
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        wait = Wait(2 * LAYER_S)
        found = torch.full_like(ctx.saved_tensors[0], float(gradient.sum()))
        wait()
        return gradient, found


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(MIB))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Slowly.apply(x, self.weights)  # type: ignore[no-any-return, no-untyped-call]


def _on_host(rank: int, address: str, rounds: int) -> None:
    connect(rank, 2, dist.TCPStore(address, 29500, 2, rank == 0))
    contributed, found = ReplicaSums._contributed, [[] for _ in CASES]
    for _ in range(rounds):  # they take turns, since the machine may be busy with other things
        for times, (sharded, late) in zip(found, CASES, strict=True):
            ReplicaSums._contributed = (lambda self, parameter: None) if late else contributed  # type: ignore[method-assign]
            config = rayllp.make_config(
                {
                    "mode": "serial", "model": {"layers": 12}, "mesh": {"data": 2, "layer": 1}, "batch_size": 2,
                    "optimizer": {"sharded": sharded},
                }
            )  # fmt: skip
            loss = partial(nn.functional.mse_loss, reduction="sum")
            stack = LayerStack(embed=nn.Identity(), layers=[_Layer] * 12, head=nn.Identity(), loss=loss, stochastic=False)
            batches = RandomBatches(config)
            times += train(config, 8, stack, batches)["times"]
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "overlap", "host"])
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
        _on_host(given.rank, given.address, given.rounds)
