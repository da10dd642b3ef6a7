"""Training without Ray (`--launcher mpi`), in processes that an MPI launcher started. Rank 0 is the driver and the first worker.

    mpiexec -n 4 python -m rayllp train CONFIG --launcher mpi

The other ranks do as rank 0 tells them. Nothing is elastic: the launcher ends all processes when one is lost, and running the same command
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rayllp.channel.interfaces import LOOPBACK, ConnectAttempt, Endpoint, addresses, explain_unreachable, open_listeners
from rayllp.channel.mpi import MPIWorld, load_mpi, unlink_shared_memory
from rayllp.cluster.cpus import bound_to, usable_cpus
from rayllp.cluster.placement import WorkerLocation, threads_of
from rayllp.cluster.worker import BlockWorker
from rayllp.config import TrainConfig, make_config
from rayllp.data import Batches
from rayllp.data.cache import with_files
from rayllp.errors import ClusterError, RayllpError, RendezvousError, SettingsError
from rayllp.training.driver import Driver
from rayllp.training.interrupt import ASKING
from rayllp.training.prepare import open_run, prepare
from rayllp.training.result import BuildContext, Network, TrainResult
from rayllp.training.worker_group import WorkerGroup, WorkerShare

TAG = 11
PAUSE_S = 5e-4
"""Pause between two polls for a message to or from the driver: MPI's own blocking receive would keep a core busy."""
STOP = "stop"


@dataclass(frozen=True)
class Launched:
    """This process among those that the MPI launcher started.

    Attributes:
        comm: communicator of all processes.
        local_rank, local_size: this process's rank among those on its node, and their number.
        cpus: number of CPUs that this process may use.
    """

    comm: Any
    local_rank: int
    local_size: int
    cpus: int = 1


def launched() -> Launched:
    """Initialise MPI and describe this process. All processes call it.

    Raises:
        SettingsError: mpi4py or MPI is missing.
    """
    MPI = load_mpi()
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    unlink_shared_memory(MPI.COMM_WORLD)
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    # The launcher may have bound each process to CPUs of its own. Otherwise processes with common CPUs share them.
    sharing = sum(not bound.isdisjoint(bound_to()) for bound in node.allgather(bound_to()))
    return Launched(MPI.COMM_WORLD.Dup(), node.Get_rank(), node.Get_size(), max(1, usable_cpus() // sharing))


def train_launched(
    config: TrainConfig | None, *, output: str | Path | None = None, resume: str | Path | None = None, console: Console | None = None
) -> TrainResult | None:
    """Train in processes that an MPI launcher started; all of them call this.

    Without `config.workers` there are as many workers as processes. States are sent by MPI, whatever `config.channel` says.

    Returns: the result on rank 0, None on the others.

    Raises:
        SettingsError: on rank 0: `config.workers` is a range, or not the number of processes.
        RayllpError: on rank 0: as raised by `rayllp.train`.
    """
    process = launched()
    comm = process.comm
    if comm.Get_rank() > 0:
        for number in ASKING:  # the launcher, or a job manager, sends signals to all ranks; rank 0 decides what to do
            signal.signal(number, signal.SIG_IGN)
        _serve(process)
        load_mpi().Finalize()
        return None
    others = _OtherProcesses(comm)
    try:
        prepared = prepare(sized(config, comm.Get_size()) if resume is None else config, output, resume)
        config = prepared.config
        check_size(config, comm.Get_size())
        device = _device(config, process)
        with open_run(prepared, output, console) as (run, holds):
            group = LaunchedGroup(config, device, process, others)
            result = Driver(config, run, group, None, None, prepared.loaded, console, holds).train(prepared.resume_from)
    except BaseException as error:
        others.abandon(error)
        raise
    others.stop()
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
        raise SettingsError("--launcher mpi starts a number of processes: set workers to a number, or leave it out")
    if config.world != size:
        raise SettingsError(f"{size} processes were launched for workers={config.world}: make them equal, or leave workers out")


def _device(config: TrainConfig, process: Launched) -> str:
    """Return "cpu" or "cuda" as the settings say; "auto" means GPUs if there is one for each process of this node."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= process.local_size
    if config.device == "cuda" and not enough:
        raise SettingsError(
            f"device=cuda: {process.local_size} processes on this node and {torch.cuda.device_count()} GPUs: use device=cpu"
        )
    return "cuda" if enough and config.device != "cpu" else "cpu"


class LaunchedWorker(BlockWorker):
    """A worker in a process that an MPI launcher started."""

    def __init__(self, rank: int, config: TrainConfig, process: Launched, device: str) -> None:
        if device == "cuda":  # as in Ray's workers, each process sees one GPU
            os.environ["CUDA_VISIBLE_DEVICES"] = _visible(process.local_rank)
        super().__init__(rank, config, threads_of(process.cpus))
        self._process = process
        self.membership.mpi = MPIWorld(process.comm)
        self._address, self._attempts = LOOPBACK, list[ConnectAttempt]()

    def location(self) -> WorkerLocation:
        """Return this host, and its address on the network that all hosts share; before `use_address` that is the loopback address."""
        name = socket.gethostname()
        return WorkerLocation(name, self._address, name)

    def try_connections(self, endpoints: list[Endpoint]) -> list[ConnectAttempt]:
        """Try to connect to these endpoints, and remember the results for `use_address`."""
        self._attempts = super().try_connections(endpoints)
        return self._attempts

    def use_address(self, number: int) -> None:
        """Use this host's address on the way to endpoint `number` of the last call of `try_connections`."""
        address = self._attempts[number].local_address
        assert address is not None, "an endpoint that all reached"
        self._address = address

    def leave(self, failure: Exception | None = None) -> None:
        """End all processes of the run: the others wait for what this one has failed to do."""
        if failure is not None:
            print(f"worker {self.rank}:", *traceback.format_exception_only(failure), sep="\n", file=sys.stderr, flush=True)
        self._process.comm.Abort(1)


def _visible(rank: int) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES that leaves the `rank`-th process of this node its own GPU."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices.split(",")[rank] if devices and "," in devices else devices or str(rank)


# Calls ----------------------------------------------------------------------------------------------------------------------------


def _serve(process: Launched) -> None:
    """Do what rank 0 asks for until it says stop."""
    worker: LaunchedWorker | None = None
    while True:
        method, arguments = _hear(process.comm, 0)
        if method == STOP:
            return
        try:
            if method == "begin":
                rank, config, device = arguments
                worker, answer = LaunchedWorker(rank, config, process, device), None
            else:
                answer = getattr(worker, method)(*arguments)
            outcome = True, answer
        except Exception as error:
            outcome = False, error if _travels(error) else ClusterError(f"{type(error).__name__}: {error}")
        process.comm.send(outcome, 0, TAG)


def _hear(comm: Any, source: int) -> Any:
    while not comm.Iprobe(source, TAG):
        time.sleep(PAUSE_S)
    return comm.recv(source=source, tag=TAG)


def _travels(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


class _OtherProcesses:
    """Rank 0's connection to the other processes.

    Attributes:
        busy: ranks that have been asked something and have not answered yet.
    """

    def __init__(self, comm: Any) -> None:
        self.comm, self.busy = comm, set[int]()

    def ask(self, rank: int, method: str, *arguments: Any) -> None:
        self.busy.add(rank)
        self.comm.send((method, arguments), rank, TAG)

    def answer(self, rank: int) -> tuple[bool, Any]:
        outcome: tuple[bool, Any] = _hear(self.comm, rank)
        self.busy.discard(rank)
        return outcome

    def stop(self) -> None:
        for rank in range(1, self.comm.Get_size()):
            self.comm.send((STOP, ()), rank, TAG)

    def abandon(self, error: BaseException) -> None:
        """End the other processes because training failed: tell them to stop, or abort MPI if any of them is still busy."""
        if not self.busy:
            self.stop()
            return
        text = f"{type(error).__name__}: {error}" if isinstance(error, RayllpError) else "".join(traceback.format_exception(error))
        if isinstance(error, KeyboardInterrupt):
            text = "stopped"
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False, style="red")
        self.comm.Abort(2)


class LaunchedGroup(WorkerGroup):
    """All workers of a run whose processes an MPI launcher started.

    If a worker fails in a call in which workers exchange messages, all processes end.
    """

    def __init__(self, config: TrainConfig, device: str, process: Launched, others: _OtherProcesses) -> None:
        self.config, self.device = config, device
        self._process, self._others = process, others
        self._mine: LaunchedWorker | None = None
        self._batches: Batches | None = None

    def start(self, network: Network, batches: Batches) -> list[WorkerShare]:
        """Have each process, including this one, make its worker, and connect them. They stay connected until the run ends."""
        other_ranks = range(1, self.config.world)
        for rank in other_ranks:
            self._others.ask(rank, "begin", rank, self.config, self.device)
        self._mine, self._batches = LaunchedWorker(0, self.config, self._process, self.device), batches
        _unpack({rank: self._others.answer(rank) for rank in other_ranks})
        if self._process.local_size < self._process.comm.Get_size():
            self._find_addresses()
            self._batches = with_files(batches)
        host = self._mine.location().address
        port = self._mine.listen(host)
        self.call("connect", host, port, "nccl" if self.device == "cuda" else "gloo", self.device, 1)
        return self._build(network)

    def _find_addresses(self) -> None:
        """Tell each process its address in the network that all hosts share.

        That network is found by trying this host's addresses; the first one that all processes can connect to is used.

        Raises:
            RendezvousError: no address can be reached by all.
        """
        with open_listeners(addresses()) as endpoints:
            answers = self.call("try_connections", endpoints)
        shared = [number for number in range(len(endpoints)) if all(tried[number].local_address is not None for tried in answers)]
        if not shared:
            unreachable = [
                (f"process {rank}", endpoint, attempt.error)
                for rank, tried in enumerate(answers)
                for endpoint, attempt in zip(endpoints, tried, strict=True)
                if attempt.local_address is None
            ]
            raise RendezvousError(explain_unreachable(unreachable, f"{socket.gethostname()} has no address that all processes reach"))
        self.call("use_address", shared[0])

    def rebuild(self, config: TrainConfig, network: Network) -> list[WorkerShare]:
        self.config = config
        for rank in range(config.world):
            self._call_some([rank], "reconfigure", config, rank)
        return self._build(network)

    def _build(self, network: Network) -> list[WorkerShare]:
        return self.call("build", network.architecture, self._batches, self.device, BuildContext.of(network))

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Call a method on all workers. `timeout_s` is ignored, since messages between workers have a time limit of their own."""
        return self._call_some(range(self.config.world), method, *arguments)

    def _call_some(self, ranks: Sequence[int], method: str, *arguments: Any) -> list[Any]:
        for rank in ranks:
            if rank > 0:
                self._others.ask(rank, method, *arguments)
        answers: dict[int, tuple[bool, Any]] = {}
        if 0 in ranks:
            try:
                answers[0] = True, getattr(self._mine, method)(*arguments)
            except Exception as error:
                answers[0] = False, error
        answers |= {rank: self._others.answer(rank) for rank in ranks if rank > 0}
        return _unpack(answers)

    def shutdown(self) -> None:
        """Do nothing: the processes belong to the launcher and end with the program."""


def _unpack(answers: dict[int, tuple[bool, Any]]) -> list[Any]:
    """Return the answers, or raise the first worker's failure."""
    for rank, (worked, answer) in answers.items():
        if not worked:
            if isinstance(answer, RayllpError):
                raise answer
            raise ClusterError(f"worker {rank} failed: {type(answer).__name__}: {answer}") from answer
    return [answer for _, answer in answers.values()]
