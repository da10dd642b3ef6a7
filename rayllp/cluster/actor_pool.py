"""The worker processes of a run: where in the cluster they live, and those that have no layers (yet)."""

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
    """A process that has no layers yet, and what says that it is there."""

    actor: Any
    ready: Any


class ActorPool:
    """Starts worker processes, and keeps those that are not at work: a process's start, most of it imports, takes seconds.

    They are spares, one a node, which take the bundle of a worker that was lost there; standbys, for which the cluster had room; and, where
    the pool is `lasting`, those that are left from the run before.

    Args:
        count: how many workers there are to be.
        device: which resources each takes.
        group: a placement group to live in (a Tune trial's own); made here, and removed at `close`, if None.
        first_bundle: the group's bundle that takes the first worker.
        name: the run's, under which Ray's other users find its workers (`rayllp.cluster.actor_names`); None: nobody does.
        lasting: whether processes stay when a run ends, for another one in the same placement group.

    Attributes:
        slots: the places in the cluster, of workers and free.
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
        # A run that has a cluster to itself uses all of it; in a lent group a worker has what its bundle has.
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
        """Until the placement group has its resources.

        Raises:
            ClusterError: they did not come free.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        there = self.group.wait(0)
        while not there and time.monotonic() < deadline:
            there = self.group.wait(1)  # no signal is heeded meanwhile
        if not there:
            available = {name: ray.available_resources().get(name, 0) for name in self._bundle}
            raise ClusterError(
                f"{len(self.slots)} workers of {self._bundle} each were not granted within {START_TIMEOUT_S:g} s; free now: {available}. "
                "Wait for other jobs, or lower workers"
            )

    def start_actor(self, slot: Slot, rank: int, config: TrainConfig) -> Any:
        """A worker in this place: the one that an earlier run left there, else a new process."""
        actor = self._idle.pop(slot, None)
        if actor is not None:
            self.reassign(actor, rank, config)  # if that fails, so does whatever it is asked next
            return actor
        place = PlacementGroupSchedulingStrategy(placement_group=slot.group, placement_group_bundle_index=slot.bundle)
        return self._start(rank, config, place, self._bundle["CPU"])

    def reassign(self, actor: Any, rank: int, config: TrainConfig) -> Any:
        """Give a process that has no layers another place; what says that it is done."""
        return actor.reconfigure.remote(config, rank, self._threads(config))

    def _start(self, rank: int, config: TrainConfig, strategy: Any, cpus: float) -> Any:
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": self._bundle.get("GPU", 0), "scheduling_strategy": strategy}
        if self.name:
            options |= {"name": worker_name(self.name, self._started), "namespace": NAMESPACE}
        self._started += 1
        actor = ray.remote(concurrency_groups={LIVENESS: 1})(BlockWorker)
        return actor.options(**options).remote(rank, config, self._threads(config))

    def _threads(self, config: TrainConfig) -> int:
        """Of each worker of such a run."""
        return threads_of(max(1, self._cpus // config.world))

    def free(self, taken: Collection[Slot]) -> list[Slot]:
        """Places that neither have these workers nor a standby, those of nodes that live first."""
        found = [slot for slot in self.slots if slot not in taken and slot not in self._standbys]
        return sorted(found, key=lambda slot: not slot.is_alive())

    # Spares ---------------------------------------------------------------------------------------------------------------------

    def keep_spares(self, nodes: Iterable[str], config: TrainConfig, *sources: Any) -> None:
        """Begin to start a spare on each of these nodes that has none. Waits for nothing.

        It asks for no resources of its own, and on GPUs there are none, since a process without one cannot be given one. Nor are there any
        beside a lent placement group, which is to hold all that a Tune trial starts.

        Args:
            sources: what `BlockWorker.warm` wants.
        """
        if self.device != "cpu" or self._lent:
            return
        for node in set(nodes) - self._spares.keys():
            actor = self._start(-1, config, NodeAffinitySchedulingStrategy(node, soft=False), cpus=0)
            self._spares[node] = Starting(actor, actor.warm.remote(*sources))

    def take_spare(self, node: str) -> Any | None:
        """The spare on this node; None: there is none. One that is still starting is further along than a new worker would be."""
        spare = self._spares.pop(node, None)
        if spare is None:
            return None
        try:
            ray.get(spare.ready, timeout=START_TIMEOUT_S)
            ray.get(spare.actor.ping.remote(), timeout=START_TIMEOUT_S)
        except (RayActorError, RayTaskError, GetTimeoutError):  # as if there were none
            self.dismiss([spare.actor])
            return None
        return spare.actor

    # Standbys -------------------------------------------------------------------------------------------------------------------

    def start_standbys(self, wanted: int, taken: Collection[Slot], config: TrainConfig) -> None:
        """Begin to start workers, where the cluster has room, so that there are so many standbys. Waits for nothing."""
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
            self._standbys[slot] = Starting(actor, actor.place.remote())

    def count_standbys(self) -> int:
        """Standbys that are there. One that died on the way is forgotten."""
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
        """Standbys that are there, with their places; they are none any more."""
        there = [slot for slot, standby in self._standbys.items() if ray.wait([standby.ready], timeout=0)[0]]
        return [(slot, self._standbys.pop(slot).actor) for slot in there[: max(0, most)]]

    # The end --------------------------------------------------------------------------------------------------------------------

    def dismiss(self, actors: Iterable[Any]) -> None:
        """End these processes."""
        for actor in actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)

    def dismiss_idle(self) -> None:
        """End all processes that have no layers."""
        for starting in (*self._standbys.values(), *self._spares.values()):
            with contextlib.suppress(Exception):  # of what failed unnoticed Ray would print a traceback, when it is forgotten
                ray.get(starting.ready, timeout=0)
        self.dismiss([*self._idle.values(), *(each.actor for each in (*self._standbys.values(), *self._spares.values()))])
        self._idle, self._standbys, self._spares = {}, {}, {}

    def release(self, placed: Iterable[tuple[Slot, Any]]) -> None:
        """A run has ended: its workers give up their layers and stay, where the pool is lasting; else all is given back."""
        placed = list(placed)
        if not self.lasting:
            self.dismiss(actor for _, actor in placed)
            self.close()
            return
        self._forget_standbys()
        leaving = {actor.release_layers.remote(): (slot, actor) for slot, actor in placed}
        if leaving:
            ray.wait(list(leaving), num_returns=len(leaving), timeout=RELEASE_TIMEOUT_S)
        for reference, (slot, actor) in leaving.items():
            try:
                ray.get(reference, timeout=0)
            except Exception:  # dead, or at something that it does not leave
                self.dismiss([actor])
            else:
                if slot in self.slots:
                    self._idle[slot] = actor
                else:
                    self.dismiss([actor])

    def _forget_standbys(self) -> None:
        """Let go of what was added while a run lasted: standbys, and places beyond the first ones."""
        self.dismiss(standby.actor for standby in self._standbys.values())
        self._standbys = {}
        extra = [slot for slot in self.slots if slot.group.id != self.group.id]
        self.slots = [slot for slot in self.slots if slot.group.id == self.group.id]
        self._remove_groups(extra)

    def close(self) -> None:
        """End all processes without layers, and give the resources back."""
        self.dismiss_idle()
        self._remove_groups(slot for slot in self.slots if not self._lent or slot.group.id != self.group.id)

    @staticmethod
    def _remove_groups(slots: Iterable[Slot]) -> None:
        for group in {slot.group.id: slot.group for slot in slots}.values():
            with contextlib.suppress(Exception):
                remove_placement_group(group)
