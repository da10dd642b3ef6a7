"""All workers of a run: placement group, actors, process group, and calls to all at once."""

import contextlib
import math
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rayllp.checkpoint.memory import Inventory, Layout, common_step, copy_offset, holder_of
from rayllp.cluster.names import NAMESPACE, group_name, worker_name
from rayllp.cluster.places import Slot, draining, threads_of
from rayllp.cluster.worker import BlockWorker, Plan
from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.errors import ClusterError, RayllpError, WorkerLostError
from rayllp.models import FAMILIES, Architecture

START_TIMEOUT_S = 180.0
BROKEN = ("ChannelError", "RuntimeError", "DistBackendError")
"""Errors of a worker that may only be the echo of another's."""


class Starting(NamedTuple):
    """A worker that has no layers yet, and what says that it is there."""

    actor: Any
    ready: Any


@dataclass(frozen=True)
class Estate:
    """The states of all blocks after `step` steps while layers are shared out anew; with step None there are none."""

    step: int | None
    layouts: tuple[Layout, ...]
    states: tuple[Any, ...]


class WorkerGroup:
    """The actors of one run.

    Args:
        group: a placement group to live in (a Tune trial's own); made here, and removed at shutdown, if None.
        first_bundle: the group's bundle that takes worker 0.
        name: the run's, under which Ray's other users find its workers (`rayllp.cluster.names`); None: nobody does.
    """

    def __init__(
        self, config: TrainConfig, device: str, group: PlacementGroup | None = None, first_bundle: int = 0, name: str | None = None
    ) -> None:
        self.config, self.device, self.name = config, device, name
        self._own_group = group is None
        # A run that has a cluster to itself uses all of it; in a lent group a worker has what its bundle has.
        alone = device == "cpu" and group is None
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // config.world) if alone else 1
        self._bundle: dict[str, float] = {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
        self.group = group or placement_group([self._bundle] * config.world, strategy="PACK", name=group_name(name) if name else "")
        self._threads = threads_of(cpus)
        self.workers: list[Any] = []
        self._slots = [Slot(self.group, first_bundle + rank) for rank in range(config.world)]  # of the workers, and then free ones
        self._started = 0
        self._nodes: list[str] = []
        self._offset = 1
        self._spares: dict[str, Starting] = {}  # by node
        self._recruits: dict[Slot, Starting] = {}
        self._layouts: dict[int, Layout] = {}
        self._estate: Estate | None = None
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
        self.workers = [self._actor(rank, self._slots[rank]) for rank in range(self.config.world)]
        self._shared, self._sources = ray.put(batches), (architecture, kept)
        self._connect()
        return self._build(range(self.config.world))

    def _actor(self, rank: int, slot: Slot) -> Any:
        place = PlacementGroupSchedulingStrategy(placement_group=slot.group, placement_group_bundle_index=slot.bundle)
        return self._start_actor(rank, place, self._bundle["CPU"])

    def _start_actor(self, rank: int, strategy: Any, cpus: float) -> Any:
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": self._bundle.get("GPU", 0), "scheduling_strategy": strategy}
        if self.name:
            options |= {"name": worker_name(self.name, self._started), "namespace": NAMESPACE}
        self._started += 1
        return ray.remote(BlockWorker).options(**options).remote(rank, self.config, self._threads)

    def _connect(self, *, keep_offset: bool = False) -> None:
        """Join all workers anew. With `keep_offset` the copies that they hold stay those of the same workers' states."""
        places = self.call("place", timeout_s=START_TIMEOUT_S)
        self._nodes = [node for node, _ in places]
        one_node = len(set(self._nodes)) == 1
        host = "127.0.0.1" if one_node else places[0][1]
        port = self._get({0: self.workers[0].listen.remote(host)}, START_TIMEOUT_S)[0]
        backend = {"auto": "nccl" if self.device == "cuda" else "gloo"}.get(self.config.channel, self.config.channel)
        if not keep_offset:
            self._offset = copy_offset(self._nodes[: self.config.layer_workers])
        self.call("connect", host, port, backend, self.device, self._offset, timeout_s=START_TIMEOUT_S)

    def rebuild(self, config: TrainConfig, architecture: Architecture | None, kept: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Give the workers the layers of other settings, which want as many workers, and drop those they have; else as `start`."""
        self.config, self._sources = config, (architecture, kept)
        self._reconfigure()
        return self._build(range(config.world))

    def _build(self, ranks: Iterable[int]) -> list[dict[str, Any]]:
        # No limit: reading pretrained weights takes as long as it takes, and a worker that dies is noticed.
        found = self.call_some(ranks, "build", self._sources[0], self._shared, self.device, self._plan())
        self._layouts |= {share["rank"]: share["layout"] for share in found}
        return found

    def _plan(self) -> Plan:
        architecture, kept = self._sources
        return Plan({} if architecture is not None else dict(FAMILIES), kept)

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
                late = f"{len(pending)} of {len(references)} workers did not answer within {timeout_s:g} s"
                raise _lost(lost, late) if (lost := self.lost()) else ClusterError(late)
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
            raise _lost(lost) from error
        # Nobody died: a worker whose neighbour failed says so first, perhaps.
        ray.wait(list(references.values()), num_returns=len(references), timeout=self.config.hang_timeout_s)
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
        ray.wait(list(references.values()), num_returns=len(references), timeout=self.config.hang_timeout_s)
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
            spare = self._take_spare(self._nodes[rank])
            self.workers[rank] = spare or self._actor(rank, self._slots[rank])
            if spare is not None:
                self._get({rank: spare.reconfigure.remote(self.config, rank)}, START_TIMEOUT_S)
        self._connect(keep_offset=True)
        self._build(sorted(lost))

    def keep_spares(self) -> None:
        """Begin to start a spare on each node that has workers and no spare. Waits for nothing.

        A spare has done what takes longest in a worker's start, the imports. It takes the bundle of a worker that was lost on its node,
        so it asks for no resources of its own; on GPUs there are none, since a process without one cannot be given one.
        """
        if not self.config.spare_workers or not self.config.max_failures or self.device != "cpu":
            return
        for node in set(self._nodes) - self._spares.keys():
            actor = self._start_actor(-1, NodeAffinitySchedulingStrategy(node, soft=False), cpus=0)
            self._spares[node] = Starting(actor, actor.warm.remote(self._sources[0], self._shared, self._plan()))

    def _take_spare(self, node: str) -> Any | None:
        """The spare on this node; None: there is none. One that is still starting is further along than a new worker would be."""
        spare = self._spares.pop(node, None)
        if spare is not None:
            with contextlib.suppress(RayActorError, RayTaskError, GetTimeoutError):  # it died itself: as if there were none
                ray.get([spare.ready, spare.actor.ping.remote()], timeout=START_TIMEOUT_S)
                return spare.actor
        return None

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
        step, found = self._common_step(lost)
        if step is None:
            return None
        self.call_some(self.survivors(lost), "roll_back", step)
        for rank in lost:
            self._get({rank: self.workers[rank].adopt.remote(self._given(rank, step, found))}, None)
        return step

    def common_step(self, lost: frozenset[int]) -> int | None:
        """The last step that the states of all blocks are held of; None: there is none."""
        return self._estate.step if self._estate is not None else self._common_step(lost)[0]

    def _common_step(self, lost: frozenset[int]) -> tuple[int | None, dict[int, Inventory]]:
        """The last step that is held in memory everywhere, and what each survivor holds."""
        ranks = self.survivors(lost)
        found = dict(zip(ranks, self.call_some(ranks, "inventory"), strict=True))
        return (common_step(found, set(lost), self.config.layer_workers, self._offset) if ranks else None), found

    def _given(self, rank: int, step: int, found: dict[int, Inventory]) -> Any:
        """A reference to the state of a block after `step` steps, from whoever holds it."""
        holder, neighbour = (rank, False) if rank in found else holder_of(rank, step, found, self.config.layer_workers, self._offset)
        return self.workers[holder].give.remote(step, neighbour)

    # Another number of workers ---------------------------------------------------------------------------------------------------

    def places(self, lost: frozenset[int]) -> int:
        """Workers that can go on at once: the survivors, and those whose place in the cluster outlived them."""
        return len(self.workers) - len(lost) + sum(self._slots[rank].is_alive() for rank in lost)

    def leaving(self) -> tuple[frozenset[int], float]:
        """Ranks of workers on nodes that were told to go, and the seconds that the first of these has left."""
        nodes = draining() if self._nodes else {}
        ranks = frozenset(rank for rank, node in enumerate(self._nodes) if node in nodes)
        return ranks, min((nodes[self._nodes[rank]] for rank in ranks), default=math.inf)

    def recruit(self, most: int) -> None:
        """Begin to start workers, where the cluster has room, so that there are `most` with those at work. Waits for nothing."""
        wanted = most - len(self.workers) - len(self._recruits)
        free = [slot for slot in self._slots[len(self.workers) :] if slot not in self._recruits]
        available = ray.available_resources()
        for _ in range(wanted):
            slot = next((slot for slot in free if slot.is_alive()), None)
            if slot is not None:
                free.remove(slot)
            elif all(available.get(name, 0) >= amount for name, amount in self._bundle.items()):
                available = {name: amount - self._bundle.get(name, 0) for name, amount in available.items()}
                slot = Slot(placement_group([self._bundle]), 0)
                self._slots.append(slot)
            else:
                break
            actor = self._actor(-1, slot)
            self._recruits[slot] = Starting(actor, actor.place.remote())

    def recruited(self) -> int:
        """Recruits that are there. One that died on the way is forgotten."""
        ready = 0
        for slot, recruit in list(self._recruits.items()):
            if ray.wait([recruit.ready], timeout=0)[0]:
                try:
                    ray.get(recruit.ready)
                    ready += 1
                except RayActorError:
                    del self._recruits[slot]
        return ready

    @property
    def is_halfway(self) -> bool:
        """Whether layers are between two ways of sharing them out, because workers were lost meanwhile: `reshape` goes on with that."""
        return self._estate is not None

    def reshape(
        self,
        config: TrainConfig,
        lost: frozenset[int],
        architecture: Architecture | None,
        kept: dict[str, Any] | None,
        leaving: frozenset[int] = frozenset(),
    ) -> list[dict[str, Any]]:
        """Share the layers out anew, among as many workers as `config` says: survivors, recruits that are there, new ones for lost ones.

        Blocks are then at `common_step`, new ones if that is None. States pass from those that hold them through Ray's object store.

        Args:
            leaving: workers that give their states, and get no layers.

        Returns: what each worker says of itself.
        """
        self._estate = estate = self._estate or self._collect(lost)
        self.call_some(self.survivors(lost), "leave", timeout_s=START_TIMEOUT_S)
        self.config, self._sources = config, (architecture, kept)
        self._reseat(config.world, lost, leaving)
        self._reconfigure()
        self._connect()
        shares = self._build(range(config.world))
        if estate.step is not None:
            gathering = {}
            for share in shares:
                holders = [n for n, layout in enumerate(estate.layouts) if not share["sources"].isdisjoint(name for name, _ in layout)]
                layouts, states = [estate.layouts[n] for n in holders], [estate.states[n] for n in holders]
                gathering[share["rank"]] = self.workers[share["rank"]].gather.remote(layouts, *states)
            self._get(gathering, None)
        self._estate = None
        return shares

    def _collect(self, lost: frozenset[int]) -> Estate:
        """All blocks' states, in Ray's object store: the workers give up what they hold next."""
        step, found = self._common_step(lost)
        states = {} if step is None else {rank: self._given(rank, step, found) for rank in range(len(self.workers))}
        if states:
            ray.wait(list(states.values()), num_returns=len(states), fetch_local=False)
        return Estate(step, tuple(self._layouts[rank] for rank in states), tuple(states.values()))

    def _reseat(self, world: int, lost: frozenset[int], leaving: frozenset[int]) -> None:
        """The workers from now on, in the order of their layers: survivors, recruits that are there, then new ones where the lost were."""
        seats = [(self._slots[rank], self.workers[rank]) for rank in self.survivors(lost | leaving)]
        for dismissed in [*(worker for _, worker in seats[world:]), *(self.workers[rank] for rank in leaving - lost)]:
            ray.kill(dismissed, no_restart=True)
        seats = seats[:world]
        for slot, recruit in list(self._recruits.items()):
            if len(seats) < world and ray.wait([recruit.ready], timeout=0)[0]:
                seats.append((slot, recruit.actor))
                del self._recruits[slot]
        used = {slot for slot, _ in seats} | self._recruits.keys()
        for slot in sorted((slot for slot in self._slots if slot not in used), key=lambda slot: not slot.is_alive()):
            if len(seats) < world:
                seats.append((slot, self._actor(len(seats), slot)))
        used = {slot for slot, _ in seats}
        self._slots = [slot for slot, _ in seats] + [slot for slot in self._slots if slot not in used]
        self.workers = [worker for _, worker in seats]

    def _reconfigure(self) -> None:
        self._get({rank: worker.reconfigure.remote(self.config, rank) for rank, worker in enumerate(self.workers)}, START_TIMEOUT_S)

    def dismiss(self) -> None:
        """Kill all actors; `start` makes new ones."""
        starting = [*self._recruits.values(), *self._spares.values()]
        for actor in [*self.workers, *(each.actor for each in starting)]:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        self.workers, self._recruits, self._spares = [], {}, {}

    def shutdown(self) -> None:
        """Kill the actors and give the resources back."""
        if not ray.is_initialized():  # the cluster is gone, and a call would start another
            return
        self.dismiss()
        for group in {slot.group.id: slot.group for slot in self._slots}.values():
            if self._own_group or group.id != self.group.id:
                with contextlib.suppress(Exception):
                    remove_placement_group(group)


def _lost(ranks: frozenset[int], why: str = "") -> WorkerLostError:
    names, plural = ", ".join(map(str, sorted(ranks))), len(ranks) > 1
    return WorkerLostError(f"worker{'s' if plural else ''} {names} {'were' if plural else 'was'} lost{why and f' ({why})'}", ranks)
