"""Training without Ray (`--launcher mpi`), in processes that an MPI launcher started. Rank 0 is the driver and the first worker.

    mpiexec -n 4 python -m rayllp train CONFIG --launcher mpi

The other ranks carry out rank 0's calls. Nothing is elastic: the launcher ends all processes when one is lost, and running the same command
again resumes from the last checkpoint.
"""

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rayllp.channel.interfaces import LOOPBACK, addresses, explain_unreachable, open_listeners
from rayllp.channel.mpi import MPIWorld, load_mpi
from rayllp.cluster.cpus import bound_to, usable_cpus
from rayllp.cluster.placement import WorkerLocation, threads_of
from rayllp.cluster.worker import BlockWorker
from rayllp.config import TrainConfig, make_config
from rayllp.data import Batches
from rayllp.errors import ClusterError, RayllpError, RendezvousError, SettingsError
from rayllp.report.progress import tell
from rayllp.training.driver import train_session
from rayllp.training.inputs import BuildContext, Network
from rayllp.training.interrupt import ASKING
from rayllp.training.prepare import open_run, prepare
from rayllp.training.result import TrainResult
from rayllp.training.worker_group import WorkerGroup, WorkerShare

PAUSE_S = 5e-4
"""Pause between two polls for a call from rank 0, or for its answers: MPI's own waits would keep a core busy."""

Call = tuple[str, tuple[Any, ...]]
"""A method of `MPIWorker` and its arguments."""


def train_launched(
    config: TrainConfig | None, *, output: str | Path | None = None, resume: str | Path | None = None, console: Console | None = None
) -> TrainResult | None:
    """Train in processes that an MPI launcher started; all of them call this.

    Without `config.workers` there are as many workers as processes. States are sent by MPI, whatever `config.channel` says.

    Returns: the result on rank 0, None on the others.

    Raises:
        SettingsError: mpi4py or MPI is missing; on rank 0: `config.workers` is a range, or not the number of processes.
        RayllpError: on rank 0: as raised by `rayllp.train`.
    """
    process = MPIProcess()
    if process.rank > 0:
        for number in ASKING:  # the launcher, or a job manager, sends signals to all ranks; rank 0 decides what to do
            signal.signal(number, signal.SIG_IGN)
        process.serve()
        load_mpi().Finalize()
        return None
    try:
        prepared = prepare(sized(config, process.size) if resume is None else config, output, resume)
        config = prepared.config
        check_size(config, process.size)
        device = _device(config, process)
        with open_run(prepared, output, console) as (run, locks):
            group = MPIWorkerGroup(config, device, process)
            result = train_session(config, run, group, prepared.inputs, prepared.resume_from, console=console, locks=locks)
    except BaseException as error:
        process.abandon(error)
        raise
    process.stop()
    load_mpi().Finalize()
    return result


def sized(config: TrainConfig | None, size: int) -> TrainConfig:
    """Return the settings, with `workers` set to the number of processes if it is not given."""
    config = config or TrainConfig()
    if config.workers is None and config.mesh.layer is None:
        return make_config(config.model_dump(exclude_unset=True) | {"workers": size})
    return config


def check_size(config: TrainConfig, size: int) -> None:
    """Check that the settings want as many workers as there are processes.

    Raises:
        SettingsError: they want another number, or a range.
    """
    if config.fewest_workers != config.world:
        raise SettingsError("--launcher mpi has a fixed number of processes: set workers to a number, not a range, or leave it out")
    if config.world != size:
        raise SettingsError(f"{size} processes were launched for workers={config.world}: make them equal, or leave workers out")


def _device(config: TrainConfig, process: "MPIProcess") -> str:
    """Return "cpu" or "cuda" as the settings say; "auto" means GPUs if there is one for each process of this node."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= process.local_size
    if config.device == "cuda" and not enough:
        raise SettingsError(
            f"device=cuda: {process.local_size} processes on this node and {torch.cuda.device_count()} GPUs: use device=cpu"
        )
    return "cuda" if enough and config.device != "cpu" else "cpu"


class MPIWorker(BlockWorker):
    """A worker in a process that an MPI launcher started."""

    def __init__(self, process: "MPIProcess", config: TrainConfig, device: str) -> None:
        if device == "cuda":  # as in Ray's workers, each process sees one GPU
            os.environ["CUDA_VISIBLE_DEVICES"] = _visible(process.local_rank)
        super().__init__(process.rank, config, threads_of(process.cpus))
        self.connections.mpi, self._address = process.world, LOOPBACK

    def location(self) -> WorkerLocation:
        """Return this host, and its address on the network that all hosts share; before `use_address` that is the loopback address."""
        name = socket.gethostname()
        return WorkerLocation(name, self._address, name)

    def use_address(self, by_rank: Sequence[str]) -> None:
        """Use this worker's address from a list of one address per rank."""
        self._address = by_rank[self.rank]

    def reconfigure_in_place(self, config: TrainConfig) -> None:
        """Give up this worker's layers and take new settings."""
        self.reconfigure(config, self.rank)

    def disconnect(self, failure: Exception | None = None) -> None:
        """End all processes of the run: the others wait for what this one has failed to do."""
        if failure is not None:
            print(f"worker {self.rank}:", *traceback.format_exception_only(failure), sep="\n", file=sys.stderr, flush=True)
        load_mpi().COMM_WORLD.Abort(1)


def _visible(rank: int) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES that leaves the `rank`-th process of this node its own GPU."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices.split(",")[rank] if devices and "," in devices else devices or str(rank)


class MPIProcess:
    """This process among those that the MPI launcher started. Each has one worker; rank 0 has all of them call the same method at once.

    Attributes:
        world: the MPI world of these processes.
        rank, size: this process's rank, and the number of processes.
        local_rank, local_size: the same among the processes of its node.
        cpus: number of CPUs that this process may use.
        worker: this process's worker, once `make_worker` was called.

    Raises:
        SettingsError: mpi4py or MPI is missing.
    """

    def __init__(self) -> None:
        self.world = MPIWorld()
        self._comm = self.world.comm.Dup()  # for calls and their answers
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        node = self._comm.Split_type(load_mpi().COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.Get_rank(), node.Get_size()
        # The launcher may have bound each process to CPUs of its own. Otherwise processes with common CPUs share them.
        sharing = sum(not bound.isdisjoint(bound_to()) for bound in node.allgather(bound_to()))
        self.cpus = max(1, usable_cpus() // sharing)
        self.worker: MPIWorker | None = None
        self._in_call = False

    def make_worker(self, config: TrainConfig, device: str) -> None:
        """Make this process's worker."""
        self.worker = MPIWorker(self, config, device)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """On rank 0: call a method of the worker, or `make_worker`, in all processes. Returns the answers by rank, or raises an error."""
        self._in_call = True
        self._broadcast((method, arguments))
        outcomes = self._gather(self._run(method, arguments))
        self._in_call = False
        for rank, (worked, answer) in enumerate(outcomes):
            if not worked:
                if isinstance(answer, RayllpError):
                    raise answer
                raise ClusterError(f"worker {rank} failed: {type(answer).__name__}: {answer}") from answer
        return [answer for _, answer in outcomes]

    def stop(self) -> None:
        """On rank 0: end `serve` in the other processes."""
        self._broadcast(None)

    def serve(self) -> None:
        """On the other ranks: do what rank 0 calls until it stops."""
        while (call := self._broadcast(None)) is not None:
            worked, answer = self._run(*call)
            if not worked and not _is_picklable(answer):
                answer = ClusterError(f"worker {self.rank} failed: {type(answer).__name__}: {answer}")
            self._gather((worked, answer))

    def abandon(self, error: BaseException) -> None:
        """On rank 0: end the other processes because training failed: tell them to stop, or abort MPI if they are in a call."""
        if not self._in_call:
            self.stop()
            return
        text = f"{type(error).__name__}: {error}" if isinstance(error, RayllpError) else "".join(traceback.format_exception(error))
        if isinstance(error, KeyboardInterrupt):
            text = "stopped"
        tell(Console(stderr=True), text, style="red")
        self._comm.Abort(2)

    def _run(self, method: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        """Call a method; return True and its answer, or False and its error."""
        try:
            return True, getattr(self if method == "make_worker" else self.worker, method)(*arguments)
        except Exception as error:
            return False, error

    def _broadcast(self, call: Call | None) -> Call | None:
        """Return rank 0's call, or None if it stops."""
        self._barrier()
        return self._comm.bcast(call, 0)

    def _gather(self, outcome: tuple[bool, Any]) -> list[tuple[bool, Any]]:
        """Return all outcomes on rank 0, and nothing on the others."""
        self._barrier()
        return self._comm.gather(outcome, 0) or []

    def _barrier(self) -> None:
        """Wait for all processes, with pauses."""
        request = self._comm.Ibarrier()
        while not request.Test():
            time.sleep(PAUSE_S)


def _is_picklable(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


class MPIWorkerGroup(WorkerGroup):
    """All workers of a run whose processes an MPI launcher started.

    If a worker fails in a call in which workers exchange messages, all processes end.
    """

    def __init__(self, config: TrainConfig, device: str, process: MPIProcess) -> None:
        self.config, self.device = config, device
        self._process = process
        self._batches: Batches | None = None

    @property
    def is_started(self) -> bool:
        return self._batches is not None

    def start(self, config: TrainConfig, network: Network, batches: Batches) -> list[WorkerShare]:
        """Have each process, including this one, make its worker, and connect them. They stay connected until the run ends."""
        self.config = config
        self.call("make_worker", self.config, self.device)
        host = LOOPBACK
        self._batches = batches
        if self._process.local_size < self._process.size:
            host = self._find_addresses()
            self._batches = batches.with_files()
        assert self._process.worker is not None
        port = self._process.worker.listen(host)
        self.call("connect", host, port, "nccl" if self.device == "cuda" else "gloo", self.device, 1)
        return self._build(network)

    def _find_addresses(self) -> str:
        """Tell each process its address in the network that all hosts share; return that of this host.

        That network is found by trying this host's addresses; the first one that all processes can connect to is used.

        Raises:
            RendezvousError: no address can be reached by all.
        """
        with open_listeners(addresses()) as endpoints:
            attempts = self.call("try_connections", endpoints)
        for endpoint, by_rank in zip(endpoints, zip(*attempts, strict=True), strict=True):
            if all(attempt.local_address for attempt in by_rank):
                self.call("use_address", [attempt.local_address for attempt in by_rank])
                return endpoint.address
        unreachable = [
            (f"process {rank}", endpoint, attempt.error)
            for rank, of_rank in enumerate(attempts)
            for endpoint, attempt in zip(endpoints, of_rank, strict=True)
            if attempt.local_address is None
        ]
        raise RendezvousError(explain_unreachable(unreachable, f"{socket.gethostname()} has no address that all processes reach"))

    def rebuild(self, config: TrainConfig, network: Network) -> list[WorkerShare]:
        self.config = config
        self.call("reconfigure_in_place", config)
        return self._build(network)

    def _build(self, network: Network) -> list[WorkerShare]:
        return self.call("build", BuildContext.of(network), self._batches, self.device)

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Call a method on all workers. `timeout_s` is ignored, since messages between workers have a time limit of their own."""
        return self._process.call(method, *arguments)

    def shutdown(self) -> None:
        """Do nothing: the processes belong to the launcher and end with the program."""
