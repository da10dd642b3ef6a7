"""Messages between two neighbours: Gloo, MPI, and ray.util.collective, in the same processes; and what a step makes of it.

    python examples/benchmarks/links.py [--rounds 100] [--steps 30]

Two Ray actors. Half a round trip of 32 KiB, 512 KiB and 8 MiB (medians; the channels take turns), then layer-parallel steps of 32 layers of
1 ms each for forward, input gradient and weight gradient on two workers over Gloo and over MPI, taking turns.

ray.util.collective is here alone: its receives have no time limit and cannot be begun ahead of time, and its sends wait for their receiver
(a thread sends them here), so that it does not pass the tests that every channel of rayllp passes (tests/test_channel.py).
"""

import argparse
import os
import queue
import statistics
import threading
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
import torch
import torch.distributed as dist

import rayllp
from rayllp.bench.emulated import Emulation
from rayllp.bench.step import bench_step
from rayllp.channel.mpi import MPIWorld
from rayllp.channel.pmi import ProcessManager, Rendezvous
from rayllp.channel.process_channel import Posted, ProcessChannel
from rayllp.channel.timing import time_messages
from rayllp.channel.torch_dist import TorchChannel

SIZES = {"32 KiB": 32 * 1024, "512 KiB": 512 * 1024, "8 MiB": 8 * 1024**2}
GROUP = "links"


class RayCollective(ProcessChannel):
    """Two workers of one of Ray's collective groups, as far as this measurement goes."""

    def __init__(self) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size(), 60.0, group=None, on_host=True, preposts=False)
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._send_all, daemon=True).start()

    def _send_all(self) -> None:
        from ray.util import collective

        while True:
            collective.send(*self._outbox.get(), GROUP)

    def _isend(self, buffer: torch.Tensor, destination: int) -> None:
        self._outbox.put((buffer, destination))

    def _irecv(self, buffer: torch.Tensor, source: int) -> Any:
        return buffer, source

    def _wait(self, work: Any) -> None:
        from ray.util import collective

        collective.recv(*work, GROUP)

    def _has_arrived(self, posted: Posted) -> bool:
        raise NotImplementedError("nothing is computed while a message is awaited")

    def _all_gather(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError("messages between two workers alone are timed")

    def _all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("messages between two workers alone are timed")

    def _begin_all_reduce(self, tensor: torch.Tensor) -> Callable[[], None]:
        raise NotImplementedError("messages between two workers alone are timed")


@ray.remote(num_cpus=1)
class Neighbour:
    """One of the two."""

    def measure(self, rank: int, meeting: Rendezvous, rounds: int) -> dict[str, dict[int, list[float]]]:
        from ray.util import collective

        torch.set_num_threads(1)
        collective.init_collective_group(2, rank, backend="gloo", group_name=GROUP)
        channels = {
            "Gloo": TorchChannel(timeout_s=60),
            "MPI": MPIWorld.join(meeting, rank, 60).channel(0, 60),
            "ray.util.collective": RayCollective(),
        }
        found: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES.values()} for name in channels}
        for _ in range(5):
            for name, channel in channels.items():
                dist.barrier()
                for link in time_messages(channel, list(SIZES.values()), torch.device("cpu"), rounds=max(3, rounds // 5)):
                    for size, seconds in link.seconds.items():
                        found[name][size].append(seconds)
        return found


def links(rounds: int) -> None:
    manager = ProcessManager("127.0.0.1", ["here"] * 2)
    neighbours = [Neighbour.remote() for _ in range(2)]
    found = ray.get([each.measure.remote(rank, manager.rendezvous, rounds) for rank, each in enumerate(neighbours)], timeout=300)[0]
    for each in neighbours:
        ray.kill(each)
    manager.close()
    print(f"half a round trip, us (GB/s) | {' | '.join(SIZES)}")
    for name, times in found.items():
        shown = (f"{1e6 * statistics.median(each):.0f} ({size / statistics.median(each) / 1e9:.2f})" for size, each in times.items())
        print(f"{name} | {' | '.join(shown)}", flush=True)


def steps(count: int) -> None:
    base = {
        "model": {"layers": 32, "width": 128, "heads": 4}, "buffers": {"open": 0, "close": 0}, "workers": 2, "mode": "parallel",
        "solver": "mgrit", "mgrit": {"coarsening": 4, "iterations": {"forward": 1, "backward": 1}}, "sequence_length": 16, "batch_size": 4,
        "step": {"middle": 1.0}, "adaptive": {"probe_every": 0},
    }  # fmt: skip
    times: dict[str, list[float]] = {"gloo": [], "mpi": []}
    ideal = None
    for _ in range(3):
        for channel, found in times.items():
            step = bench_step(rayllp.make_config(base | {"channel": channel}), steps=count // 3, emulate=Emulation.parse("1ms"))
            found.append(step.step_s)
            ideal = step.ideal_s
    assert ideal is not None
    print(f"a step of 32 layers of 1 ms on two workers (c_f = 4, 1+1), ideal {1000 * ideal:.1f} ms:")
    for channel, found in times.items():
        print(f"{channel}: {', '.join(f'{1000 * each:.1f}' for each in found)} ms; over the ideal {statistics.median(found) / ideal:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    links(arguments.rounds)
    steps(arguments.steps)
    ray.shutdown()
