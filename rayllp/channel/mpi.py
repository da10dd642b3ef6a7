"""Messages of MPI (mpi4py), whose ranks are processes that MPI's own launcher, or Ray, started.

MPI waits by asking again and again, and for ever. Here a wait asks without pause at first, then ever more rarely, has a time limit, and
ends when a worker is lost.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayllp.channel.pmi import Lifeline, Rendezvous
from rayllp.channel.wired import Posted, WiredChannel
from rayllp.errors import ChannelError, ClusterError, SettingsError

SPIN_S = 200e-6
"""As long a wait asks without pause: a message from a neighbour that has just sent it is there by then."""
RARELY = 1 / 32
"""Then it pauses for this share of the time waited, so that it is late by no more, and takes little from others on its core."""
SHORTEST_S, LONGEST_S = 20e-6, 250e-6
PUSH_S = 100e-6
"""Pause between pushes of messages that have not left, while this worker computes."""
TAG = 7


@cache
def load_mpi() -> ModuleType:
    """mpi4py's MPI, initialised by nobody yet unless MPI's launcher started this process.

    Raises:
        SettingsError: mpi4py, or an MPI library for it, is missing.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # its own way holds Python's lock meanwhile
        mpi4py.rc.finalize = False  # which would wait for workers that are gone
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise _missing(f" ({error})") from None
    return MPI


def check_mpi() -> None:
    """Refuse `channel: mpi` where mpi4py is missing. Loads no MPI library, which only workers need.

    Raises:
        SettingsError: it is.
    """
    if find_spec("mpi4py") is None:
        raise _missing()


def _missing(why: str = "") -> SettingsError:
    return SettingsError(f"channel: mpi needs mpi4py and an MPI library{why}: pip install 'rayllp[mpi]', or mpi4py beside the system's MPI")


class MPIWorld:
    """This process's membership in an MPI world. A process is a member of one in its life.

    Args:
        comm: all of the world.
        lifeline: to the others, where something other than MPI's launcher started them; that one ends all when one is lost.
    """

    def __init__(self, comm: Any, lifeline: Lifeline | None = None) -> None:
        self.comm, self.lifeline = comm, lifeline

    @staticmethod
    def join(rendezvous: Rendezvous, rank: int, timeout_s: float) -> "MPIWorld":
        """Become rank `rank` of the world that meets there.

        If another worker is lost meanwhile this process ends: MPI's start cannot be broken off.

        Raises:
            ClusterError: this process was in a world before, or its MPI does not speak PMI-1.
        """
        MPI, world = load_mpi(), len(rendezvous.keys)
        if MPI.Is_initialized():
            raise ClusterError("this process was in an MPI world before; MPI lets a process be in one only: start a new one")
        lifeline, found = Lifeline(rendezvous, rank, timeout_s), rendezvous.environment(rank)
        os.environ.update(found)
        try:
            with lifeline.fatal():
                MPI.Init_thread(MPI.THREAD_MULTIPLE)
        finally:
            for name in found:
                del os.environ[name]
        comm = MPI.COMM_WORLD
        if (comm.Get_rank(), comm.Get_size()) != (rank, world):
            library = MPI.Get_library_version().splitlines()[0]
            raise ClusterError(
                f"channel: mpi made a world of {comm.Get_size()}, not {world}: {library} does not speak PMI-1. Use MPICH or one of its kin "
                "(pip install 'rayllp[mpi]' has it), or start all by the launcher of that MPI: mpiexec … rayllp train … --launcher mpi"
            )
        with lifeline.fatal():
            leave_no_names(comm)
        return MPIWorld(comm, lifeline)

    def channel(self, colour: int, timeout_s: float, group: dist.ProcessGroup | None = None) -> "MPIChannel":
        """Between all workers that give this colour; all of the world call it, and it waits for them."""
        with _fatal_losses(self.lifeline):
            return MPIChannel(self.comm.Split(colour), timeout_s, self.lifeline, group)

    def leave(self) -> None:
        """Tell the others that this worker is not with them any more."""
        if self.lifeline is not None:
            self.lifeline.cut()


class MPIChannel(WiredChannel):
    """Messages within `comm`, whose own collectives nobody else may use meanwhile.

    CPU tensors travel from and to where they are. So do CUDA tensors if MPI says that it can; else they are staged through the host.

    Args:
        lifeline: to all other workers, if there is one.
        group: the same workers as torch's process group, if there is one.
    """

    def __init__(
        self,
        comm: Any,
        timeout_s: float = 300.0,
        lifeline: Lifeline | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size(), timeout_s, group=group, on_host=not is_cuda_aware(), asks_ahead=True)
        self.comm, self._lifeline, self._mpi = comm, lifeline, load_mpi()
        self._sent: list[tuple[Any, Tensor]] = []
        self._lock = threading.Lock()
        self._unsent, self._closed = threading.Event(), False
        self._pusher: threading.Thread | None = None

    def _begin_send(self, buffer: Tensor, destination: int) -> None:
        request = self.comm.Isend(self._memory(buffer), destination, TAG)
        if request.Test():
            return
        with self._lock:
            self._sent.append((request, buffer))
        self._push_in_background()

    def _begin_receive(self, buffer: Tensor, source: int) -> Any:
        return self.comm.Irecv(self._memory(buffer), source, TAG)

    def _is_there(self, posted: Posted) -> bool:
        return bool(posted.work.Test())

    def _memory(self, buffer: Tensor) -> Any:
        """A flat tensor as MPI takes it."""
        raw = buffer.view(torch.uint8)
        if raw.is_cuda:
            torch.cuda.current_stream(raw.device).synchronize()  # MPI knows nothing of what its stream has yet to do
            return [raw, self._mpi.BYTE]
        return [raw.numpy(), self._mpi.BYTE]

    def _await(self, work: Any) -> None:
        """Ask until it is done."""
        if work.Test():
            return
        started = time.perf_counter()
        looked = waited = 0.0
        while not work.Test():
            waited = time.perf_counter() - started
            if waited < SPIN_S:
                continue
            if waited > self.timeout_s:
                raise RuntimeError(f"MPI request not done after {waited:.3g} s")
            if waited - looked > 0.01:
                looked = waited
                if self._lifeline is not None and not self._lifeline.holds():
                    raise RuntimeError("a worker is gone")
            time.sleep(min(LONGEST_S, max(SHORTEST_S, waited * RARELY)))

    def fatal_losses(self) -> AbstractContextManager[None]:
        """A worker that is lost inside ends this process: for MPI calls of others, which have no time limit."""
        return _fatal_losses(self._lifeline)

    # What has not left ----------------------------------------------------------------------------------------------------------

    def _push_in_background(self) -> None:
        """A long message may want its sender's help to leave, also while that one computes."""
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            return
        if self._pusher is None:
            self._pusher = threading.Thread(target=self._push, name="mpi sends", daemon=True)
            self._pusher.start()
        self._unsent.set()

    def _push(self) -> None:
        while True:
            self._unsent.wait()
            if self._closed:
                return
            with self._lock:
                self._sent = [(request, buffer) for request, buffer in self._sent if not request.Test()]
                if not self._sent:
                    self._unsent.clear()
            time.sleep(PUSH_S)

    # Together -------------------------------------------------------------------------------------------------------------------

    def _gather(self, buffer: Tensor) -> list[Tensor]:
        found = buffer.new_empty(self.size, len(buffer))
        self._await(self.comm.Iallgather(self._memory(buffer), self._memory(found.view(-1))))
        return list(found.unbind())

    def _exchange(self, parts: Tensor) -> Tensor:
        found = torch.empty_like(parts)
        self._await(self.comm.Ialltoall(self._memory(parts.view(-1)), self._memory(found.view(-1))))
        return found

    def _begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        wide = tensor.detach().to(device="cpu", dtype=torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else None)
        values = wide.contiguous().numpy()
        # To one and from it to all: MPI_Allreduce need not give all the same bits.
        mine = self._mpi.IN_PLACE if self.rank == 0 else values
        work = self.comm.Ireduce(mine, values if self.rank == 0 else None, self._mpi.SUM, 0)

        def end() -> None:
            self._await(work)
            self._await(self.comm.Ibcast(values, 0))
            found = torch.from_numpy(values).view(tensor.shape)
            if found.data_ptr() != tensor.data_ptr():
                tensor.copy_(found)

        return end

    def finish(self) -> None:
        with self._lock:
            sent, self._sent = self._sent, []
            self._unsent.clear()
        for request, _ in sent:
            try:
                self._await(request)
            except RuntimeError as error:
                raise ChannelError(f"worker {self.rank}: a message was not taken by its receiver: {error}") from error
        self._unchecked.check()

    def close(self) -> None:
        self._closed = True
        self._unsent.set()
        with self._lock:
            self._sent.clear()
        self._posted.clear()


def _fatal_losses(lifeline: Lifeline | None) -> AbstractContextManager[None]:
    return nullcontext() if lifeline is None else lifeline.fatal()


def leave_no_names(comm: Any) -> None:
    """Take the names from the memory that MPICH shares on a node, now that all have it: whoever is killed then leaves none behind."""
    comm.Barrier()
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text(encoding="utf-8").splitlines():
            path = Path(line.split(maxsplit=5)[-1])
            if path.name.startswith("mpich_shm_"):
                path.unlink(missing_ok=True)
    comm.Barrier()


@cache
def is_cuda_aware() -> bool:
    """Whether this MPI says that it moves CUDA tensors itself.

    It is asked by the standard's way (MPI 4.1: memory kinds), then by the older one of MPICH and Open MPI; silence means no.
    """
    if not torch.cuda.is_available():
        return False
    MPI = load_mpi()
    info = MPI.COMM_WORLD.Get_info()
    if "cuda" in (info.Get("mpi_memory_alloc_kinds") or ""):
        return True
    try:
        return bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return False
