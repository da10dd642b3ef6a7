"""All workers of a run as Ray actors: starting and connecting them, calls to all of them, recovery, and redistribution of layers."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from torch.distributed import DistError

from rayllp.channel.interfaces import LOOPBACK, explain_unreachable
from rayllp.channel.pmi import ProcessManager, Rendezvous
from rayllp.checkpoint import Folder
from rayllp.checkpoint.location import checkpoint_folder
from rayllp.checkpoint.memory import CopyPlacement, Inventory, Source
from rayllp.checkpoint.states import StateLayout
from rayllp.cluster.actor_names import run_name
from rayllp.cluster.actor_pool import START_TIMEOUT_S, ActorPool
from rayllp.cluster.hosts import check_storage, find_unreachable
from rayllp.cluster.placement import Slot, capacity, draining
from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.errors import ChannelError, ClusterError, MessageTimeoutError, RayllpError, RendezvousError, WorkerLostError
from rayllp.training.inputs import BuildContext, Network
from rayllp.training.worker_group import ElasticGroup, StepReport, WorkerShare

FOLLOWING = ChannelError, DistError
"""Errors that a worker may raise only because another one has failed. A bare RuntimeError may be one, too."""
RENDEZVOUS_TRIES = 2


@dataclass(frozen=True)
class RedistributionPlan:
    """The states from which the blocks are restored while layers are redistributed.

    Attributes:
        step: optimizer steps done in these states; None: there are no states, and blocks are newly initialised.
        layouts: the layout of each state.
        states: for each layout, a reference to the state in Ray's object store.
    """

    step: int | None
    layouts: tuple[StateLayout, ...]
    states: tuple[Any, ...]


class RayGroup(ElasticGroup):
    """The workers of one run.

    Args:
        pool: provides the processes.
        storage: where checkpoints are written, which all hosts must share; None: no checkpoints are written.
    """

    def __init__(self, config: TrainConfig, pool: ActorPool, storage: Folder | None = None) -> None:
        self.config, self.device, self.pool, self.storage = config, pool.device, pool, storage
        self._seen_by: set[str] = set()  # nodes that are known to share the storage
        self.workers: list[Any] = []
        self._slots: list[Slot] = []  # of the workers, by rank
        self._nodes: list[str] = []
        self._addresses: list[str] = []  # IP addresses of the workers' nodes, by rank
        self._copy_placement = CopyPlacement(blocks=config.layer_workers)
        self._layouts: dict[int, StateLayout] = {}
        self._redistribution: RedistributionPlan | None = None
        self._batches: Any = None
        self._shared: dict[bool, Any] = {}
        self._network = Network(None)
        self._manager: ProcessManager | None = None

    @classmethod
    def for_run(cls, config: TrainConfig, run: Path, device: str, pool: ActorPool | None = None) -> Self:
        """Return a group with as many workers as the settings want and the cluster has room for now.

        Args:
            run: the run directory.
            pool: provides the processes; None: a new pool with a placement group of its own.
        """
        room = capacity(device) if pool is None else len(pool.slots)
        fitting = config.with_workers(max(config.fewest_workers, min(config.world, room)))
        storage = checkpoint_folder(run, config.checkpoint.path)
        return cls(fitting, pool or ActorPool(fitting.world, device, name=run_name(run)), storage)

    @property
    def is_started(self) -> bool:
        return bool(self.workers)

    def start(self, config: TrainConfig, network: Network, batches: Batches) -> list[WorkerShare]:
        """Start the workers, as `WorkerGroup.start` says. Data in memory pass through Ray's object store, once for all workers."""
        self.config = config
        self.pool.wait_for_room()
        self._slots = self.pool.slots[: self.config.world]
        self.workers = [self.pool.start_actor(slot, rank, self.config) for rank, slot in enumerate(self._slots)]
        self._batches, self._shared, self._network = batches, {}, network
        self._connect()
        return self._build(range(self.config.world))

    @property
    def _is_all_on_this_host(self) -> bool:
        """True if all workers are on this host."""
        return {*self._nodes} == {ray.get_runtime_context().get_node_id()}

    @property
    def _sent(self) -> Any:
        """Reference to the batches in Ray's object store. If a worker is on another host, small data files are sent along."""
        far = not self._is_all_on_this_host
        if far not in self._shared:
            self._shared[far] = ray.put(self._batches.with_files() if far else self._batches)
        return self._shared[far]

    def _connect(self, *, keep_copies: bool = False) -> None:
        """Connect all workers. With `keep_copies` the copies of states that they hold stay valid: ranks and layers have not changed."""
        locations = self.call("location", timeout_s=START_TIMEOUT_S)
        self._nodes, self._addresses = [location.node for location in locations], [location.address for location in locations]
        self._seen_by |= check_storage(self.storage, locations, self._seen_by, self._ask)
        workers_on = Counter(self._nodes)
        host = LOOPBACK if len(workers_on) == 1 else locations[0].address
        backend = self.config.channel if self.config.channel in ("gloo", "nccl") else "nccl" if self.device == "cuda" else "gloo"
        if not keep_copies:
            self._copy_placement = CopyPlacement.of(self.config, self._nodes)
        for attempt in count(1):
            port = self._listen(0, host)
            try:
                arguments = host, port, backend, self.device, self._copy_placement.offset, self._begin_mpi()
                joining = {n: worker.connect.remote(*arguments, workers_on[self._nodes[n]]) for n, worker in enumerate(self.workers)}
                self._get(joining, START_TIMEOUT_S)
                return
            except RendezvousError as error:
                if attempt == RENDEZVOUS_TRIES or not self.keeps_processes:
                    unreachable = find_unreachable(locations, self._listen, self._ask)
                    raise RendezvousError(explain_unreachable(unreachable, str(error))) from None
                self.call("disconnect", timeout_s=START_TIMEOUT_S)

    def _ask(self, rank: int, method: str, *arguments: Any) -> Any:
        """Call a method of one worker and return its answer."""
        return self.call_some([rank], method, *arguments, timeout_s=START_TIMEOUT_S)[0]

    def _listen(self, rank: int, host: str) -> int:
        """Have a worker open a port at this address of its own; return the port."""
        return int(self._ask(rank, "listen", host))

    def _begin_mpi(self) -> Rendezvous | None:
        """Start the service by which workers form an MPI world, if states are to be sent by MPI; return where it is."""
        self._end_mpi()
        if self.config.channel != "mpi":
            return None
        self._manager = ProcessManager(LOOPBACK if self._is_all_on_this_host else ray.util.get_node_ip_address(), self._nodes)
        return self._manager.rendezvous

    def _end_mpi(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    @property
    def keeps_processes(self) -> bool:
        """False with MPI, since a process can be in only one MPI world."""
        return self.config.channel != "mpi"

    def rebuild(self, config: TrainConfig, network: Network) -> list[WorkerShare]:
        self.config, self._network = config, network
        self._reconfigure()
        return self._build(range(config.world))

    def _build(self, ranks: Iterable[int]) -> list[WorkerShare]:
        # no time limit: reading pretrained weights may take long, and a worker that dies is noticed anyway
        shares: list[WorkerShare] = self.call_some(ranks, "build", BuildContext.of(self._network), self._sent, self.device)
        self._layouts |= {share["rank"]: share["layout"] for share in shares}
        return shares

    # Calls ----------------------------------------------------------------------------------------------------------------------

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        return self.call_some(range(len(self.workers)), method, *arguments, timeout_s=timeout_s)

    def call_some(self, ranks: Iterable[int], method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Call a method on some workers, as `call` does; return the answers in the order of `ranks`."""
        return self._get({rank: getattr(self.workers[rank], method).remote(*arguments) for rank in ranks}, timeout_s)

    def _get(self, references: dict[int, Any], timeout_s: float | None) -> list[Any]:
        # Stop waiting at the first failure: other workers may be waiting for the failed one until their own time limit.
        pending, deadline = list(references.values()), None if timeout_s is None else time.monotonic() + timeout_s
        while pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, pending = ray.wait(pending, num_returns=1, timeout=left)
            if not ready:
                # By now the others have given up waiting for messages: those that have not answered hang.
                late = f"{len(pending)} of {len(references)} workers did not answer within {timeout_s:g} s"
                raise _lost(self.find_lost() | self._give_up(_ranks(references, pending)), late)
            try:
                ray.get(ready)
            except (RayTaskError, RayActorError) as error:
                self._raise(error, references)
        return list(ray.get(list(references.values())))

    def _raise(self, error: Exception, references: dict[int, Any]) -> None:
        """Raise the cause of a failed call: the loss of workers, or else the error of the worker that failed first."""
        lost = self.find_lost()
        if lost:
            for reference in references.values():  # fetch all results, or Ray prints the errors of the others
                with contextlib.suppress(Exception):
                    ray.get(reference, timeout=0)
            self._abort_connections(lost)
            raise _lost(lost) from error
        # No worker died. The first error may come from a neighbour of the worker that really failed, so wait for the others' errors.
        _, pending = ray.wait(list(references.values()), num_returns=len(references), timeout=self.config.hang_timeout_s)
        causes = [error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) else error]
        for reference in references.values():
            try:
                ray.get(reference, timeout=0)
            except GetTimeoutError:
                continue
            except RayTaskError as other:
                causes.append(other.cause if isinstance(other.cause, BaseException) else other)
        silent = _ranks(references, pending)
        if silent and any(isinstance(cause, MessageTimeoutError) for cause in causes):  # the silent ones are those that others waited for
            raise _lost(self._give_up(silent), "others waited for their messages in vain") from error
        cause = next((each for each in causes if not isinstance(each, FOLLOWING) and type(each) is not RuntimeError), causes[0])
        if isinstance(cause, RayllpError):
            raise cause
        raise ClusterError(f"a worker failed: {type(cause).__name__}: {cause}") from error

    def find_lost(self) -> frozenset[int]:
        """Return the ranks of workers that are dead or do not answer a ping within `hang_timeout_s`; the latter are killed."""
        references = {rank: worker.ping.remote() for rank, worker in enumerate(self.workers)}
        ray.wait(list(references.values()), num_returns=len(references), timeout=self.config.hang_timeout_s)
        gone = set()
        for rank, reference in references.items():
            try:
                ray.get(reference, timeout=0)
            except (GetTimeoutError, RayActorError):
                gone.add(rank)
        return self._give_up(frozenset(gone))

    def _give_up(self, ranks: frozenset[int]) -> frozenset[int]:
        """Kill these workers, if they are alive, and return their ranks."""
        self.pool.dismiss(self.workers[rank] for rank in ranks)
        return ranks

    def _abort_connections(self, lost: frozenset[int]) -> None:
        """Stop survivors from waiting for lost workers, if they would not notice the loss: when a host is gone, or on GPUs."""
        survivors = self.survivors(lost)
        addresses = dict(enumerate(self._addresses))  # empty before the workers were first connected
        gone = {addresses.get(rank, "") for rank in lost} - {addresses.get(rank, "") for rank in survivors}
        if gone or self.device == "cuda":
            calls = [self.workers[rank].abort_connections.remote(sorted(gone)) for rank in survivors]
            ray.wait(calls, num_returns=len(calls), timeout=self.config.hang_timeout_s)

    @property
    def size(self) -> int:
        return len(self.workers)

    # After a loss ---------------------------------------------------------------------------------------------------------------

    def replace(self, lost: Collection[int]) -> None:
        self.call_some(self.survivors(lost), "disconnect", timeout_s=START_TIMEOUT_S)
        for rank in lost:
            spare = self.pool.take_spare(self._nodes[rank])
            self.workers[rank] = spare or self.pool.start_actor(self._slots[rank], rank, self.config)
            if spare is not None:
                self._get({rank: self.pool.reassign(spare, rank, self.config)}, START_TIMEOUT_S)
        self._connect(keep_copies=True)
        self._build(sorted(lost))

    def keep_spares(self) -> None:
        """Start spare processes. There are none with MPI, where a loss means new processes for all workers."""
        if self.config.spare_workers and self.config.max_failures and self.keeps_processes:
            self.pool.keep_spares(self._nodes, self.config, BuildContext.of(self._network), self._sent)

    def survivors(self, lost: Collection[int]) -> list[int]:
        """Return the ranks of the workers that are not lost."""
        return [rank for rank in range(len(self.workers)) if rank not in lost]

    def steps_done(self, lost: Collection[int]) -> int:
        return max(self.call_some(self.survivors(lost), "steps_done"), default=0)

    def step_reports(self, lost: Collection[int], start: int, stop: int) -> list[list[StepReport]]:
        return self.call_some(self.survivors(lost), "step_reports", start, stop)

    def restore_from_memory(self, lost: frozenset[int]) -> int | None:
        step, inventories = self._common_step(lost)
        if step is None:
            return None
        self.call_some(self.survivors(lost), "restore_from_memory", step)
        states = {rank: self._request_states(self._copy_placement.sources(rank, step, inventories) or [], step) for rank in lost}
        self._get({rank: self.workers[rank].restore_from_states.remote(*states[rank]) for rank in lost}, None)
        return step

    def common_step(self, lost: frozenset[int]) -> int | None:
        return self._redistribution.step if self._redistribution is not None else self._common_step(lost)[0]

    def _common_step(self, lost: frozenset[int]) -> tuple[int | None, dict[int, Inventory]]:
        """Return the last step whose state is held in memory for every block (None if there is none), and what each survivor holds."""
        ranks = self.survivors(lost)
        inventories = dict(zip(ranks, self.call_some(ranks, "inventory"), strict=True))
        return self._copy_placement.common_step(inventories) if ranks else None, inventories

    def _request_states(self, sources: Iterable[Source], step: int) -> list[Any]:
        """Have survivors put their states after `step` steps into Ray's object store.

        Returns: the arguments of `BlockWorker.restore_from_states`: the layouts of the states, then references to them.
        """
        layouts, references = [], []
        for source in sources:
            layout = self._layouts[source.owner]
            layouts.append(layout if source.has_weights else layout.without_weights)
            references.append(self.workers[source.holder].give_state.remote(step, source.is_copy, source.has_weights))
        return [layouts, *references]

    # Another number of workers ---------------------------------------------------------------------------------------------------

    def count_available_workers(self, lost: frozenset[int]) -> int:
        return len(self.workers) - len(lost) + sum(self._slots[rank].is_alive() for rank in lost)

    def draining_ranks(self) -> tuple[frozenset[int], float]:
        nodes = draining() if self._nodes else {}
        ranks = frozenset(rank for rank, node in enumerate(self._nodes) if node in nodes)
        return ranks, min((nodes[self._nodes[rank]] for rank in ranks), default=math.inf)

    def start_standbys(self, most: int) -> None:
        self.pool.start_standbys(most - len(self.workers), self._slots, self.config)

    def count_standbys(self) -> int:
        return self.pool.count_standbys()

    @property
    def is_halfway(self) -> bool:
        return self._redistribution is not None

    def reshape(
        self, config: TrainConfig, lost: frozenset[int], network: Network, leaving: frozenset[int] = frozenset()
    ) -> list[WorkerShare]:
        """Redistribute the layers, as `ElasticGroup.reshape` says. States pass through Ray's object store."""
        self._redistribution = plan = self._redistribution or self._collect(lost)
        self.call_some(self.survivors(lost), "disconnect", timeout_s=START_TIMEOUT_S)
        self.config, self._network = config, network
        self._fill_slots(config.world, lost, leaving if self.keeps_processes else frozenset(self.survivors(lost)))
        self._reconfigure()
        self._connect()
        shares = self._build(range(config.world))
        if plan.step is not None:
            restoring = {}
            for share in shares:
                needed = [n for n, layout in enumerate(plan.layouts) if not share["sources"].isdisjoint(layout.names)]
                layouts, states = [plan.layouts[n] for n in needed], [plan.states[n] for n in needed]
                restoring[share["rank"]] = self.workers[share["rank"]].restore_from_states.remote(layouts, *states)
            self._get(restoring, None)
        self._redistribution = None
        return shares

    def _collect(self, lost: frozenset[int]) -> RedistributionPlan:
        """Collect the states of all blocks in Ray's object store, because workers are about to give up what they hold."""
        step, inventories = self._common_step(lost)
        if step is None:
            return RedistributionPlan(None, (), ())
        layouts, *states = self._request_states(self._copy_placement.sources_of_all(step, inventories) or [], step)
        ray.wait(states, num_returns=len(states), fetch_local=False)
        return RedistributionPlan(step, tuple(layouts), tuple(states))

    def _fill_slots(self, world: int, lost: frozenset[int], leaving: frozenset[int]) -> None:
        """Choose the workers from now on: survivors in the order of their layers, then standby actors that are ready, then new actors."""
        placed = [(self._slots[rank], self.workers[rank]) for rank in self.survivors(lost | leaving)]
        self.pool.dismiss([*(worker for _, worker in placed[world:]), *(self.workers[rank] for rank in leaving - lost)])
        placed = placed[:world]
        placed += self.pool.take_standbys(world - len(placed))
        free = self.pool.free([slot for slot, _ in placed])[: world - len(placed)]
        placed += [(slot, self.pool.start_actor(slot, len(placed) + number, self.config)) for number, slot in enumerate(free)]
        self._slots, self.workers = [slot for slot, _ in placed], [worker for _, worker in placed]

    def _reconfigure(self) -> None:
        self._get({rank: self.pool.reassign(worker, rank, self.config) for rank, worker in enumerate(self.workers)}, START_TIMEOUT_S)

    def dismiss(self) -> None:
        """Kill all workers, spares and standby actors."""
        self._end_mpi()
        self.pool.dismiss(self.workers)
        self.pool.dismiss_idle()
        self.workers = []

    def shutdown(self) -> None:
        if ray.is_initialized():  # without this check, a call would start a new cluster if the old one is gone
            self.pool.release(zip(self._slots, self.workers, strict=False))
            self.workers = []
        self._end_mpi()


def _ranks(references: dict[int, Any], pending: Collection[Any]) -> frozenset[int]:
    """Return the ranks of the workers whose answers are pending."""
    return frozenset(rank for rank, reference in references.items() if reference in pending)


def _lost(ranks: frozenset[int], why: str = "") -> WorkerLostError:
    names, plural = ", ".join(map(str, sorted(ranks))), len(ranks) > 1
    return WorkerLostError(f"worker{'s' if plural else ''} {names} {'were' if plural else 'was'} lost{why and f' ({why})'}", ranks)
