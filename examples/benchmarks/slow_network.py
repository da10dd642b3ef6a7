"""What the sweeps of a rolling window take on a slow network: four workers, two on each of two hosts that a cable joins.

    sudo python examples/benchmarks/slow_network.py [--rate 100] [--state 2] [--rounds 10]

The hosts are network namespaces; tc's tbf holds the cable to so many MB/s. 32 layers that take 5 ms each are solved in windows of four that
roll on by two layers a sweep. Sweeps are done by every worker for all rows of the states, and by each for its share (in pieces), in turn.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rayllp.bench.emulated import Wait
from rayllp.channel.base import MessageTag, StateSpec
from rayllp.channel.torch_dist import TorchChannel
from rayllp.mgrit import Communicator, shares
from rayllp.mgrit.placement import Placement
from rayllp.mgrit.propagator import Propagator
from rayllp.mgrit.rolling import RollingOptions, RollingProblem, RollingSolver
from rayllp.state import State, combine

MIB = 2**20
LAYERS, WORKERS, STRIDE, LAYER_S = 32, 4, 2, 0.005
CASES = {"whole": sys.maxsize, "in pieces": 0}
"""Ways to do the arithmetic, and the size of messages from which it is done in pieces."""


class Layers(Propagator):
    """Layers that take their time."""

    def tentative_step(self, layer: int, state: State) -> State:
        wait = Wait(LAYER_S)
        stepped = combine(lambda part: part * 1.01, state)
        wait()
        return stepped


class Strides(RollingSolver):
    """A window that rolls on by the same number of layers after each sweep."""

    def stride(self, squares: object) -> int:
        return STRIDE


def on_host(rank: int, address: str, state_bytes: int, rounds: int) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", store=dist.TCPStore(address, 29500, WORKERS, rank == 0), rank=rank, world_size=WORKERS, timeout=limit)
    channel, first = TorchChannel(), torch.ones(state_bytes // 4 // 256, 256)
    problem = RollingProblem(Placement.cyclic(LAYERS, WORKERS), WORKERS, Layers(), StateSpec.of(first))
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(rounds):  # they take turns, since the machine may be busy with other things
        for name, size in CASES.items():
            shares.IN_PIECES_BYTES = size
            channel.all_reduce(torch.zeros(1), MessageTag(turn, name))
            began = time.perf_counter()
            solver = Strides(problem, RollingOptions(tolerance=1.0), Communicator(channel, MessageTag(turn, name)))
            solver.solve(first if rank == 0 else None, 0)
            found[name].append((time.perf_counter() - began) * STRIDE / LAYERS)
    print(json.dumps(found), flush=True)
    channel.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=100, help="of the cable, MB/s")
    parser.add_argument("--state", type=float, default=2.0, help="MiB of a state")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        on_host(given.rank, given.address, int(given.state * MIB), given.rounds)
        return
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.hosts import PYTHON, hosts

    with hosts() as pair:
        for host in pair:
            host.slow_down(given.rate)
        command = [PYTHON, __file__, "--state", str(given.state), "--rounds", str(given.rounds), "--address", pair[0].address]
        ranks = [pair[rank % 2].start(*command, "--rank", str(rank), GLOO_SOCKET_IFNAME="cable") for rank in range(WORKERS)]
        found = [json.loads(rank.communicate(timeout=3600)[0].splitlines()[-1]) for rank in ranks]
    for name in CASES:
        low, middle, high = statistics.quantiles(map(max, zip(*(each[name] for each in found), strict=True)), n=4)
        print(f"{given.state:g} MiB, {given.rate} MB/s, {name}: a sweep takes {1e3 * middle:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})")


if __name__ == "__main__":
    main()
