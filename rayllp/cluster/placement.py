"""Placement of workers: how many the cluster has room for, on CPUs or GPUs, and where each of them runs."""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group_table

from rayllp.channel.interfaces import Endpoint, try_connect
from rayllp.config import TrainConfig
from rayllp.errors import ClusterError

PING_S = 2.0


def choose_device(config: TrainConfig) -> str:
    """Return "cpu" or "cuda", as the settings say and the cluster permits.

    Raises:
        ClusterError: there are fewer GPUs or CPUs in the cluster than workers, or the channel does not fit the device.
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
    """Return the number of workers for which the cluster has free resources now."""
    kind = "GPU" if device == "cuda" else "CPU"
    return int(min(ray.available_resources().get(name, 0) for name in {kind, "CPU"}))


class WorkerLocation(NamedTuple):
    """Where a worker runs.

    Attributes:
        node: Ray's identifier of the node.
        address: the node's IP address in the cluster.
        host: the host name.
    """

    node: str
    address: str
    host: str


@dataclass(frozen=True, eq=False)
class Slot:
    """A bundle of a placement group, which holds the resources of one worker."""

    group: PlacementGroup
    bundle: int

    def is_alive(self) -> bool:
        """True if the bundle is on a live node that is not about to shut down.

        Ray may take half a minute to notice that a node is dead, so this also tries to connect to the node.
        """
        table = placement_group_table(self.group)
        node = table.get("bundles_to_node_id", {}).get(self.bundle)
        if node in draining():
            return False
        live = next((each for each in ray.nodes() if each["NodeID"] == node and each["Alive"]), None)
        return live is not None and _answers(live["NodeManagerAddress"], live["NodeManagerPort"])


def draining() -> dict[str, float]:
    """Return the nodes that Ray is draining, as before a preemption, with the seconds that each has left (infinite if unknown)."""
    # Ray Serve asks the same; there is no public function for it yet.
    deadlines = ray._private.state.state.get_draining_nodes()
    return {node: deadline_ms / 1000 - time.time() if deadline_ms else math.inf for node, deadline_ms in deadlines.items()}


def _answers(host: str, port: int) -> bool:
    """True if something listens on this port."""
    return try_connect(Endpoint(host, port), PING_S).local_address is not None


def threads_of(cpus: int) -> int:
    """Return the number of threads of a worker that may use `cpus` CPUs; never more than torch's default."""
    return max(1, min(cpus, torch.get_num_threads()))
