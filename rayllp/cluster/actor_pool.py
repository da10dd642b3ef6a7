"""The worker processes of a run: where in the cluster they run, and the processes that have no layers (yet)."""

import contextlib
import time
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rayllp.cluster.actor_names import NAMESPACE, group_name, worker_name
from rayllp.cluster.placement import Slot, threads_of
from rayllp.cluster.worker import LIVENESS, BlockWorker
from rayllp.config import TrainConfig
from rayllp.errors import ClusterError

START_TIMEOUT_S = 180.0
RELEASE_TIMEOUT_S = 10.0


class Starting(NamedTuple):
    """A worker process that may still be starting.

    Attributes:
        actor: handle of the `BlockWorker` actor.
        ready: reference to a result that is available once the process has started.
    """

    actor: Any
    ready: Any


class ActorPool:
    """Starts worker processes and keeps idle ones, because starting one takes seconds, most of them for imports.

    There are three kinds of idle processes. A spare has no bundle of its own; it waits on a node to replace a worker that is lost there. A
    standby actor has a bundle and waits to get layers when the number of workers grows. In a `lasting` pool the workers of a finished run
    wait for the next one.

    Args:
        count: number of workers to reserve resources for.
        device: "cpu" or "cuda"; a worker takes one CPU, and with "cuda" one GPU.
        group: an existing placement group to use, such as that of a Tune trial; None: the pool creates one, and removes it in `close`.
        first_bundle: index of the bundle in the group that the first worker takes.
        name: name of the run, by which other processes can find its workers (see `actor_names`); None: they have no names.
        lasting: True to keep the processes when a run ends, for another run in the same placement group.

    Attributes:
        slots: the bundles of all workers, whether taken or free.
    """

    def __init__(
        self,
        count: int,
        device: str,
        group: PlacementGroup | None = None,
        first_bundle: int = 0,
        name: str | None = None,
        *,
        lasting: bool = False,
    ) -> None:
        self.device, self.name, self.lasting = device, name, lasting
        # Without a placement group from outside, the workers share all of the cluster's CPUs; in one, each uses those of its bundle.
        alone = device == "cpu" and group is None
        self._cpus = int(ray.cluster_resources().get("CPU", 1)) if alone else 1
        self._bundle: dict[str, float] = {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
        self._lent = group is not None
        self.group = group or placement_group([self._bundle] * count, strategy="PACK", name=group_name(name) if name else "")
        self.slots = [Slot(self.group, first_bundle + rank) for rank in range(count)]
        self._started = 0
        self._idle: dict[Slot, Any] = {}
        self._spares: dict[str, Starting] = {}  # by node
        self._standbys: dict[Slot, Starting] = {}

    def wait_for_room(self) -> None:
        """Wait until the placement group has its resources.

        Raises:
            ClusterError: the resources did not become available in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        is_ready = self.group.wait(0)
        while not is_ready and time.monotonic() < deadline:
            is_ready = self.group.wait(1)  # signals are handled only between two waits, so each is short
        if not is_ready:
            available = {name: ray.available_resources().get(name, 0) for name in self._bundle}
            raise ClusterError(
                f"{len(self.slots)} workers of {self._bundle} each were not granted within {START_TIMEOUT_S:g} s; free now: {available}. "
                "Wait for other jobs, or lower workers"
            )

    def start_actor(self, slot: Slot, rank: int, config: TrainConfig) -> Any:
        """Return an actor in this slot: the idle one that an earlier run left there, or a new one."""
        actor = self._idle.pop(slot, None)
        if actor is not None:
            self.reassign(actor, rank, config)  # no need to wait: if this fails, so does the next call
            return actor
        strategy = PlacementGroupSchedulingStrategy(placement_group=slot.group, placement_group_bundle_index=slot.bundle)
        return self._start(rank, config, strategy, self._bundle["CPU"])

    def reassign(self, actor: Any, rank: int, config: TrainConfig) -> Any:
        """Give an actor a new rank and new settings, after which it has no layers; return a reference that is ready when it is done."""
        return actor.reconfigure.remote(config, rank, self._threads(config))

    def _start(self, rank: int, config: TrainConfig, strategy: Any, cpus: float) -> Any:
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": self._bundle.get("GPU", 0), "scheduling_strategy": strategy}
        if self.name:
            options |= {"name": worker_name(self.name, self._started), "namespace": NAMESPACE}
        self._started += 1
        actor = ray.remote(concurrency_groups={LIVENESS: 1})(BlockWorker)
        return actor.options(**options).remote(rank, config, self._threads(config))

    def _threads(self, config: TrainConfig) -> int:
        """Return the number of threads of each worker in a run with these settings."""
        return threads_of(max(1, self._cpus // config.world))

    def free(self, taken: Collection[Slot]) -> list[Slot]:
        """Return the slots that are neither in `taken` nor have a standby actor, those on live nodes first."""
        free = [slot for slot in self.slots if slot not in taken and slot not in self._standbys]
        return sorted(free, key=lambda slot: not slot.is_alive())

    # Spares ---------------------------------------------------------------------------------------------------------------------

    def keep_spares(self, nodes: Iterable[str], config: TrainConfig, *sources: Any) -> None:
        """Start a spare on each of these nodes that has none. Does not wait.

        A spare reserves no resources. There are none on GPUs, because Ray cannot give a GPU to a process that was started without one.
        There are none either if the pool was given a placement group: a Tune trial must not start processes outside its group.

        Args:
            nodes: identifiers of the nodes.
            sources: arguments of `BlockWorker.warm`.
        """
        if self.device != "cpu" or self._lent:
            return
        for node in set(nodes) - self._spares.keys():
            actor = self._start(-1, config, NodeAffinitySchedulingStrategy(node, soft=False), cpus=0)
            self._spares[node] = Starting(actor, actor.warm.remote(*sources))

    def take_spare(self, node: str) -> Any | None:
        """Return the spare on this node, or None if there is none that works.

        A spare that is still starting is waited for: it will be ready sooner than a new process.
        """
        spare = self._spares.pop(node, None)
        if spare is None:
            return None
        try:
            ray.get(spare.ready, timeout=START_TIMEOUT_S)
            ray.get(spare.actor.ping.remote(), timeout=START_TIMEOUT_S)
        except (RayActorError, RayTaskError, GetTimeoutError):  # treat a failed spare as if there were none
            self.dismiss([spare.actor])
            return None
        return spare.actor

    # Standby actors ---------------------------------------------------------------------------------------------------------------

    def start_standbys(self, wanted: int, taken: Collection[Slot], config: TrainConfig) -> None:
        """Start standby actors where the cluster has room, until there are `wanted`. Does not wait.

        Args:
            taken: slots of the active workers.
        """
        free = self.free(taken)
        available = ray.available_resources()
        for _ in range(wanted - len(self._standbys)):
            slot = next((slot for slot in free if slot.is_alive()), None)
            if slot is not None:
                free.remove(slot)
            elif all(available.get(name, 0) >= amount for name, amount in self._bundle.items()):
                available = {name: amount - self._bundle.get(name, 0) for name, amount in available.items()}
                slot = Slot(placement_group([self._bundle]), 0)
                self.slots.append(slot)
            else:
                break
            actor = self.start_actor(slot, -1, config)
            self._standbys[slot] = Starting(actor, actor.location.remote())

    def count_standbys(self) -> int:
        """Return how many standby actors have started. Those that died while starting are dropped."""
        ready = 0
        for slot, standby in list(self._standbys.items()):
            if ray.wait([standby.ready], timeout=0)[0]:
                try:
                    ray.get(standby.ready)
                    ready += 1
                except RayActorError:
                    del self._standbys[slot]
        return ready

    def take_standbys(self, most: int) -> list[tuple[Slot, Any]]:
        """Remove up to `most` standby actors that have started from the pool, and return them with their slots."""
        ready = [slot for slot, standby in self._standbys.items() if ray.wait([standby.ready], timeout=0)[0]]
        return [(slot, self._standbys.pop(slot).actor) for slot in ready[: max(0, most)]]

    # The end --------------------------------------------------------------------------------------------------------------------

    def dismiss(self, actors: Iterable[Any]) -> None:
        """Kill these actors. Errors are ignored: they may be dead already."""
        for actor in actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)

    def dismiss_idle(self) -> None:
        """Kill all actors that have no layers."""
        for starting in (*self._standbys.values(), *self._spares.values()):
            with contextlib.suppress(Exception):  # unless failed results are fetched, Ray prints their tracebacks
                ray.get(starting.ready, timeout=0)
        self.dismiss([*self._idle.values(), *(each.actor for each in (*self._standbys.values(), *self._spares.values()))])
        self._idle, self._standbys, self._spares = {}, {}, {}

    def release(self, placed: Iterable[tuple[Slot, Any]]) -> None:
        """Take back the workers of a run that has ended, with their slots.

        In a `lasting` pool they give up their layers and stay idle for the next run. Otherwise they are killed and the pool is closed.
        """
        placed = list(placed)
        if not self.lasting:
            self.dismiss(actor for _, actor in placed)
            self.close()
            return
        self._forget_standbys()
        releasing = {actor.release_layers.remote(): (slot, actor) for slot, actor in placed}
        if releasing:
            ray.wait(list(releasing), num_returns=len(releasing), timeout=RELEASE_TIMEOUT_S)
        for reference, (slot, actor) in releasing.items():
            try:
                ray.get(reference, timeout=0)
            except Exception:  # it is dead, or does not return from its current call
                self.dismiss([actor])
            else:
                if slot in self.slots:
                    self._idle[slot] = actor
                else:
                    self.dismiss([actor])

    def _forget_standbys(self) -> None:
        """Kill what was added during a run: standby actors, and bundles beyond those that the pool began with."""
        self.dismiss(standby.actor for standby in self._standbys.values())
        self._standbys = {}
        extra = [slot for slot in self.slots if slot.group.id != self.group.id]
        self.slots = [slot for slot in self.slots if slot.group.id == self.group.id]
        self._remove_groups(extra)

    def close(self) -> None:
        """Kill all actors that have no layers, and give the resources back. A placement group that the pool was given is kept."""
        self.dismiss_idle()
        self._remove_groups(slot for slot in self.slots if not self._lent or slot.group.id != self.group.id)

    @staticmethod
    def _remove_groups(slots: Iterable[Slot]) -> None:
        for group in {slot.group.id: slot.group for slot in slots}.values():
            with contextlib.suppress(Exception):
                remove_placement_group(group)
