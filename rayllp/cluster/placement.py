"""What a cluster has room for, and where in it a worker is."""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group_table

from rayllp.channel.interfaces import Door, knock
from rayllp.config import TrainConfig
from rayllp.errors import ClusterError

PING_S = 2.0


def choose_device(config: TrainConfig) -> str:
    """cpu or cuda, checked against what the cluster has.

    Raises:
        ClusterError: more workers than the cluster has GPUs or CPUs; says how many there are.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    fewest = config.fewest_workers
    if config.device == "cuda" and gpus < fewest:
        raise ClusterError(
            f"device=cuda with {fewest} workers needs {fewest} GPUs, but the cluster has {gpus}: "
            "lower workers, add nodes, or use device=cpu"
        )
    device = "cuda" if config.device == "cuda" or (config.device == "auto" and gpus >= fewest) else "cpu"
    if config.channel == "nccl" and device == "cpu":
        raise ClusterError("channel=nccl moves GPU memory only, and this run is on CPUs: use channel=gloo or auto")
    if cpus < fewest:
        raise ClusterError(f"{fewest} workers need {fewest} CPUs, but the cluster has {cpus}: lower workers or add nodes")
    return device


def capacity(device: str) -> int:
    """Workers that there is room for now."""
    kind = "GPU" if device == "cuda" else "CPU"
    return int(min(ray.available_resources().get(name, 0) for name in {kind, "CPU"}))


class Place(NamedTuple):
    """Of a worker: the node's identifier, its address in the cluster, and the host's name."""

    node: str
    address: str
    host: str


@dataclass(frozen=True, eq=False)
class Slot:
    """A worker's place in the cluster: a bundle of a placement group."""

    group: PlacementGroup
    bundle: int

    def is_alive(self) -> bool:
        """Whether the bundle is on a node that lives, and will: by Ray, which may take half a minute to know, and by the node's port."""
        table = placement_group_table(self.group)
        node = table.get("bundles_to_node_id", {}).get(self.bundle)
        if node in draining():
            return False
        found = next((known for known in ray.nodes() if known["NodeID"] == node and known["Alive"]), None)
        return found is not None and _answers(found["NodeManagerAddress"], found["NodeManagerPort"])


def draining() -> dict[str, float]:
    """Nodes that were told to go, as before a preemption, and the seconds that each has left; infinite where nobody said."""
    # What Ray Serve asks too; there is no public way yet.
    found = ray._private.state.state.get_draining_nodes()
    return {node: deadline_ms / 1000 - time.time() if deadline_ms else math.inf for node, deadline_ms in found.items()}


def _answers(host: str, port: int) -> bool:
    """Whether something listens there."""
    return knock(Door(host, port), PING_S).own is not None


def threads_of(cpus: int) -> int:
    """Threads of a worker that has so many CPUs."""
    return max(1, min(cpus, torch.get_num_threads()))
