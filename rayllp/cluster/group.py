"""All workers of a run: placement group, actors, process group, and calls to all at once."""

import contextlib
import time
from collections.abc import Collection, Iterable
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayllp.checkpoint.memory import common_step, holder_of
from rayllp.cluster.worker import BlockWorker, Plan
from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.errors import ClusterError, RayllpError, WorkerLostError
from rayllp.models import FAMILIES, Architecture

START_TIMEOUT_S = 180.0
ANSWER_S = 10.0
"""How long a worker may take to say that it is there, when others have failed and it has nothing to wait for."""
BROKEN = ("ChannelError", "RuntimeError", "DistBackendError")
"""Errors of a worker that may only be the echo of another's."""


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
        self._sources: tuple[Architecture | None, dict[str, Any] | None] = (None, None)

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
        self.workers = [self._actor(rank) for rank in range(self.config.world)]
        self._shared, self._sources = ray.put(batches), (architecture, kept)
        self._connect()
        return self._build(range(self.config.world))

    def _actor(self, rank: int) -> Any:
        return (
            ray.remote(BlockWorker)
            .options(
                num_cpus=self._bundle["CPU"],
                num_gpus=self._bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self.group, placement_group_bundle_index=self._first_bundle + rank
                ),
            )
            .remote(rank, self.config, self._threads)
        )

    def _connect(self) -> None:
        places = self.call("place", timeout_s=START_TIMEOUT_S)
        one_node = len({node for node, _ in places}) == 1
        host = "127.0.0.1" if one_node else places[0][1]
        port = self._get({0: self.workers[0].listen.remote(host)}, START_TIMEOUT_S)[0]
        backend = {"auto": "nccl" if self.device == "cuda" else "gloo"}.get(self.config.channel, self.config.channel)
        self.call("connect", host, port, backend, self.device, timeout_s=START_TIMEOUT_S)

    def rebuild(self, config: TrainConfig, architecture: Architecture | None, kept: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Give the workers the layers of other settings, which want as many workers, and drop those they have; else as `start`."""
        self.config, self._sources = config, (architecture, kept)
        self.call("reconfigure", config)
        return self._build(range(config.world))

    def _build(self, ranks: Iterable[int]) -> list[dict[str, Any]]:
        architecture, kept = self._sources
        plan = Plan({} if architecture is not None else dict(FAMILIES), kept)
        # No limit: reading pretrained weights takes as long as it takes, and a worker that dies is noticed.
        return self.call_some(ranks, "build", architecture, self._shared, self.device, plan)

    # Calls ----------------------------------------------------------------------------------------------------------------------

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Call `method` on all workers and wait; their answers by rank.

        Raises:
            RayllpError: what a worker raised on purpose.
            WorkerLostError: workers died.
            ClusterError: a worker failed otherwise, or did not answer within the limit.
        """
        return self.call_some(range(len(self.workers)), method, *arguments, timeout_s=timeout_s)

    def call_some(self, ranks: Iterable[int], method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """The same on some workers; answers in the order of `ranks`."""
        return self._get({rank: getattr(self.workers[rank], method).remote(*arguments) for rank in ranks}, timeout_s)

    def _get(self, references: dict[int, Any], timeout_s: float | None) -> list[Any]:
        # The first answer that fails ends the wait: the others may be blocked on the failed worker until their own time limit.
        pending, deadline = list(references.values()), None if timeout_s is None else time.monotonic() + timeout_s
        while pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, pending = ray.wait(pending, num_returns=1, timeout=left)
            if not ready:
                raise ClusterError(f"{len(pending)} of {len(references)} workers did not answer within {timeout_s:g} s")
            try:
                ray.get(ready)
            except (RayTaskError, RayActorError) as error:
                self._raise(error, references)
        return list(ray.get(list(references.values())))

    def _raise(self, error: Exception, references: dict[int, Any]) -> None:
        """Raise what lies behind a failed call: workers that died, else what the culprit raised."""
        lost = self.lost()
        if lost:
            for reference in references.values():  # else Ray prints what nobody asked for
                with contextlib.suppress(Exception):
                    ray.get(reference, timeout=0)
            names = ", ".join(map(str, sorted(lost)))
            raise WorkerLostError(
                f"worker{'s' if len(lost) > 1 else ''} {names} {'were' if len(lost) > 1 else 'was'} lost", lost
            ) from error
        # Nobody died: a worker whose neighbour failed says so first, perhaps.
        ray.wait(list(references.values()), num_returns=len(references), timeout=ANSWER_S)
        causes = [error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) else error]
        for reference in references.values():
            try:
                ray.get(reference, timeout=0)
            except GetTimeoutError:
                continue
            except RayTaskError as other:
                causes.append(other.cause if isinstance(other.cause, BaseException) else other)
        cause = next((c for c in causes if type(c).__name__ not in BROKEN), causes[0])
        if isinstance(cause, RayllpError):
            raise cause
        raise ClusterError(f"a worker failed: {type(cause).__name__}: {cause}") from error

    def lost(self) -> frozenset[int]:
        """Ranks of workers that are dead, or do not answer now that others have failed; those are killed."""
        references = {rank: worker.ping.remote() for rank, worker in enumerate(self.workers)}
        ray.wait(list(references.values()), num_returns=len(references), timeout=ANSWER_S)
        gone = set()
        for rank, reference in references.items():
            try:
                ray.get(reference, timeout=0)
            except GetTimeoutError:
                ray.kill(self.workers[rank], no_restart=True)
                gone.add(rank)
            except RayActorError:
                gone.add(rank)
        return frozenset(gone)

    # After a loss ---------------------------------------------------------------------------------------------------------------

    def replace(self, lost: Collection[int]) -> None:
        """New workers in place of lost ones, all connected anew. The others keep their layers and the states in their memory.

        Raises:
            WorkerLostError: more were lost meanwhile.
            ClusterError: the resources of the lost did not come back.
        """
        self.call_some(self.survivors(lost), "leave", timeout_s=START_TIMEOUT_S)
        for rank in lost:
            self.workers[rank] = self._actor(rank)
        self._connect()
        self._build(sorted(lost))

    def survivors(self, lost: Collection[int]) -> list[int]:
        """Ranks of all other workers."""
        return [rank for rank in range(len(self.workers)) if rank not in lost]

    def reached(self, lost: Collection[int]) -> int:
        """Steps that some survivor has done."""
        return max(self.call_some(self.survivors(lost), "reached"), default=0)

    def roll_back(self, lost: frozenset[int]) -> int | None:
        """All blocks back to the last step that is held in memory everywhere; that step, or None where there is none.

        Args:
            lost: ranks whose workers are new, and get their state from a replica or from the next worker.
        """
        ranks, blocks = self.survivors(lost), self.config.layer_workers
        if not ranks:
            return None
        found = dict(zip(ranks, self.call_some(ranks, "inventory"), strict=True))
        step = common_step(found, set(lost), blocks)
        if step is None:
            return None
        self.call_some(ranks, "roll_back", step)
        for rank in lost:
            holder, neighbour = holder_of(rank, step, found, blocks)
            self._get({rank: self.workers[rank].adopt.remote(self.workers[holder].give.remote(step, neighbour))}, None)
        return step

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
