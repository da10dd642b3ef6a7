"""All workers of a run: placement group, actors, process group, and calls to all at once."""

import contextlib
import time
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayllp.cluster.worker import BlockWorker, Plan
from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.errors import ClusterError, RayllpError
from rayllp.models import FAMILIES, Architecture

START_TIMEOUT_S = 180.0


def choose_device(config: TrainConfig) -> str:
    """cpu or cuda, checked against what the cluster has.

    Raises:
        ClusterError: more workers than the cluster has GPUs or CPUs; says how many there are.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if config.device == "cuda" and gpus < config.world:
        raise ClusterError(
            f"device=cuda with {config.world} workers needs {config.world} GPUs, but the cluster has {gpus}: "
            "lower workers, add nodes, or use device=cpu"
        )
    device = "cuda" if config.device == "cuda" or (config.device == "auto" and gpus >= config.world) else "cpu"
    if config.channel == "nccl" and device == "cpu":
        raise ClusterError("channel=nccl moves GPU memory only, and this run is on CPUs: use channel=gloo or auto")
    if cpus < config.world:
        raise ClusterError(f"{config.world} workers need {config.world} CPUs, but the cluster has {cpus}: lower workers or add nodes")
    return device


class WorkerGroup:
    """The actors of one run.

    Args:
        group: a placement group to live in (a Tune trial's own); made here, and removed at shutdown, if None.
        first_bundle: the group's bundle that takes worker 0.
    """

    def __init__(self, config: TrainConfig, device: str, group: PlacementGroup | None = None, first_bundle: int = 0) -> None:
        self.config, self.device = config, device
        self._own_group = group is None
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // config.world) if device == "cpu" else 1
        self._bundle: dict[str, float] = {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
        self.group = group or placement_group([self._bundle] * config.world, strategy="PACK")
        self._first_bundle, self._threads = first_bundle, _threads(cpus)
        self.workers: list[Any] = []
        self._shared: Any = None

    def start(self, architecture: Architecture | None, batches: Batches, kept: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Create, connect and build all workers; what each says of itself.

        Args:
            architecture: a LayerStack of the user's; None: what the settings name.
            batches: the data set, loaded once and shared through Ray's object store.
            kept: transformers' configuration of a run that goes on.

        Raises:
            ClusterError: the resources did not come free, or a worker failed to start.
        """
        if not self.group.wait(START_TIMEOUT_S):
            available = {name: ray.available_resources().get(name, 0) for name in self._bundle}
            raise ClusterError(
                f"{self.config.world} workers of {self._bundle} each were not granted within {START_TIMEOUT_S:g} s; free now: {available}. "
                "Wait for other jobs, or lower workers"
            )
        actor = ray.remote(BlockWorker)
        self.workers = [
            actor.options(
                num_cpus=self._bundle["CPU"],
                num_gpus=self._bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self.group, placement_group_bundle_index=self._first_bundle + rank
                ),
            ).remote(rank, self.config, self._threads)
            for rank in range(self.config.world)
        ]
        places = self.call("place", timeout_s=START_TIMEOUT_S)
        one_node = len({node for node, _ in places}) == 1
        host = "127.0.0.1" if one_node else places[0][1]
        port = self._get([self.workers[0].listen.remote(host)], START_TIMEOUT_S)[0]
        backend = {"auto": "nccl" if self.device == "cuda" else "gloo"}.get(self.config.channel, self.config.channel)
        self.call("connect", host, port, backend, timeout_s=START_TIMEOUT_S)
        self._shared = ray.put(batches)
        return self._build(architecture, kept)

    def rebuild(self, config: TrainConfig, architecture: Architecture | None, kept: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Give the workers the layers of other settings, which want as many workers, and drop those they have; else as `start`."""
        self.config = config
        self.call("reconfigure", config)
        return self._build(architecture, kept)

    def _build(self, architecture: Architecture | None, kept: dict[str, Any] | None) -> list[dict[str, Any]]:
        plan = Plan({} if architecture is not None else dict(FAMILIES), kept)
        # No limit: reading pretrained weights takes as long as it takes, and a worker that dies is noticed.
        return self.call("build", architecture, self._shared, self.device, plan)

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Call `method` on all workers and wait; their answers by rank.

        Raises:
            RayllpError: what a worker raised on purpose.
            ClusterError: a worker died or did not answer within the limit.
        """
        return self._get([getattr(worker, method).remote(*arguments) for worker in self.workers], timeout_s)

    def _get(self, references: list[Any], timeout_s: float | None) -> list[Any]:
        # The first answer that fails ends the wait: the others may be blocked on the failed worker until their own time limit.
        pending, deadline = list(references), None if timeout_s is None else time.monotonic() + timeout_s
        while pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, pending = ray.wait(pending, num_returns=1, timeout=left)
            if not ready:
                raise ClusterError(f"{len(pending)} of {len(references)} workers did not answer within {timeout_s:g} s")
            try:
                ray.get(ready)
            except RayTaskError as error:
                self._raise(error, references)
            except (RayActorError, GetTimeoutError) as error:
                rank = next((i for i, reference in enumerate(references) if reference == ready[0]), -1)
                raise ClusterError(f"worker {rank} was lost: {error}") from error
        return list(ray.get(references))

    def _raise(self, error: RayTaskError, references: list[Any]) -> None:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if type(cause).__name__ == "ChannelError":  # a neighbour's failure, perhaps: give the culprit a moment to be known
            ray.wait(references, num_returns=len(references), timeout=2.0)
            for reference in references:
                try:
                    ray.get(reference, timeout=0)
                except GetTimeoutError:
                    continue
                except RayTaskError as other:
                    if isinstance(other.cause, BaseException) and type(other.cause).__name__ != "ChannelError":
                        cause = other.cause
                except RayActorError as other:
                    raise ClusterError(f"worker {references.index(reference)} was lost: {other}") from other
        if isinstance(cause, RayllpError):
            raise cause
        raise ClusterError(f"a worker failed: {type(cause).__name__}: {cause}") from error

    def shutdown(self) -> None:
        """Kill the actors and give the resources back."""
        for worker in self.workers:
            with contextlib.suppress(Exception):
                ray.kill(worker, no_restart=True)
        self.workers = []
        if self._own_group:
            with contextlib.suppress(Exception):
                remove_placement_group(self.group)


def _threads(cpus: int) -> int:
    return max(1, min(cpus, torch.get_num_threads()))
