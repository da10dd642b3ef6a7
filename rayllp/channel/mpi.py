"""A channel over MPI (mpi4py), between processes that MPI's own launcher or Ray has started.

MPI itself waits by polling without pause, and for ever. Here a wait polls without pause at first, then ever less often; it has a time
limit, and it ends when a worker is lost.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
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
from rayllp.channel.process_channel import Posted, ProcessChannel
from rayllp.errors import ChannelError, ClusterError, SettingsError

SPIN_S = 200e-6
"""For this many seconds a wait polls without pause; a message that a neighbour has just sent arrives within that time."""
PAUSE_SHARE = 1 / 32
"""After that, a wait pauses for this share of the time waited so far, which frees the core. So it ends late by at most this share."""
MIN_PAUSE_S, MAX_PAUSE_S = 20e-6, 250e-6
"""Bounds of that pause, in seconds."""
PROGRESS_S = 100e-6
"""Seconds between two calls that let MPI make progress on messages that have not left, while this worker computes."""
TAG = 7
"""The MPI tag of all messages."""


@cache
def load_mpi() -> ModuleType:
    """Return mpi4py's MPI module. Loading it does not initialise MPI.

    Raises:
        SettingsError: mpi4py, or an MPI library for it, is missing.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # mpi4py would hold the GIL during initialisation
        mpi4py.rc.finalize = False  # finalising would wait for workers that are gone
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise _missing(f" ({error})") from None
    return MPI


def check_mpi() -> None:
    """Refuse `channel: mpi` where mpi4py is missing. Loads no MPI library, which only workers need.

    Raises:
        SettingsError: mpi4py is missing.
    """
    if find_spec("mpi4py") is None:
        raise _missing()


def _missing(why: str = "") -> SettingsError:
    return SettingsError(f"channel: mpi needs mpi4py and an MPI library{why}: pip install 'rayllp[mpi]', or mpi4py beside the system's MPI")


class MPIWorld:
    """This process's membership in an MPI world. A process can be in only one world in its lifetime.

    Args:
        lifeline: the lifeline to the other workers. None if MPI's own launcher has started them: it ends all processes when one is lost.

    Attributes:
        comm: the communicator of the whole world.

    Raises:
        SettingsError: mpi4py or MPI is missing.
    """

    def __init__(self, lifeline: Lifeline | None = None) -> None:
        MPI = load_mpi()
        with _exit_on_loss(lifeline):
            if not MPI.Is_initialized():
                MPI.Init_thread(MPI.THREAD_MULTIPLE)
            _unlink_shared_memory(MPI.COMM_WORLD)
        self.comm, self.lifeline = MPI.COMM_WORLD, lifeline

    @staticmethod
    def join(rendezvous: Rendezvous, rank: int, timeout_s: float) -> "MPIWorld":
        """Become rank `rank` of the MPI world that meets at `rendezvous`.

        If another worker is lost meanwhile, this process ends: MPI's initialisation cannot be interrupted.

        Raises:
            ClusterError: this process was in a world before, or its MPI does not speak PMI-1.
        """
        if load_mpi().Is_initialized():
            raise ClusterError("this process was in an MPI world before; MPI lets a process be in one only: start a new one")
        size, variables = len(rendezvous.keys), rendezvous.environment(rank)
        os.environ.update(variables)
        try:
            world = MPIWorld(Lifeline(rendezvous, rank, timeout_s))
        finally:
            for name in variables:
                del os.environ[name]
        if (world.comm.Get_rank(), world.comm.Get_size()) != (rank, size):
            made, library = world.comm.Get_size(), load_mpi().Get_library_version().splitlines()[0]
            raise ClusterError(
                f"channel: mpi made a world of {made}, not {size}: {library} does not speak PMI-1. Use MPICH or one of its kin "
                "(pip install 'rayllp[mpi]' has it), or start all by the launcher of that MPI: mpiexec … rayllp train … --launcher mpi"
            )
        return world

    def channel(self, colour: int, timeout_s: float, group: dist.ProcessGroup | None = None) -> "MPIChannel":
        """Return a channel between all workers that pass the same colour.

        Every worker of the world has to call it, and it waits for all of them.
        """
        with _exit_on_loss(self.lifeline):
            return MPIChannel(self.comm.Split(colour), timeout_s, self.lifeline, group)

    def disconnect(self) -> None:
        """Tell the other workers that this one has left the world."""
        if self.lifeline is not None:
            self.lifeline.close()


class MPIChannel(ProcessChannel):
    """A channel over the communicator `comm`, which nothing else may use for collectives at the same time.

    CPU tensors are sent from and received into their own memory. So are CUDA tensors if the MPI library says that it can do that; otherwise
    they are staged through main memory.

    Args:
        comm: communicator of this channel's workers.
        timeout_s: time limit of every wait, in seconds.
        lifeline: the lifeline to all other workers, if there is one.
        group: torch's process group of the same workers, if there is one.
    """

    def __init__(
        self,
        comm: Any,
        timeout_s: float = 300.0,
        lifeline: Lifeline | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size(), timeout_s, group=group, on_host=not is_cuda_aware(), preposts=True)
        self.comm, self._lifeline, self._mpi = comm, lifeline, load_mpi()
        self._sent: list[tuple[Any, Tensor]] = []
        self._lock = threading.Lock()
        self._has_unsent, self._closed = threading.Event(), False
        self._progress_thread: threading.Thread | None = None

    def _isend(self, buffer: Tensor, destination: int) -> None:
        request = self.comm.Isend(self._mpi_buffer(buffer), destination, TAG)
        if request.Test():
            return
        with self._lock:
            self._sent.append((request, buffer))
        self._start_progress()

    def _irecv(self, buffer: Tensor, source: int) -> Any:
        return self.comm.Irecv(self._mpi_buffer(buffer), source, TAG)

    def _has_arrived(self, posted: Posted) -> bool:
        return bool(posted.work.Test())

    def _mpi_buffer(self, buffer: Tensor) -> Any:
        """Return a flat tensor in the form in which mpi4py takes a buffer."""
        raw = buffer.view(torch.uint8)
        if raw.is_cuda:
            torch.cuda.current_stream(raw.device).synchronize()  # MPI does not know which work on the tensor is still queued
            return [raw, self._mpi.BYTE]
        return [raw.numpy(), self._mpi.BYTE]

    def _wait(self, work: Any) -> None:
        """Poll until the request is done."""
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
                if self._lifeline is not None and not self._lifeline.is_intact():
                    raise RuntimeError("a worker is gone")
            time.sleep(min(MAX_PAUSE_S, max(MIN_PAUSE_S, waited * PAUSE_SHARE)))

    def exit_on_loss(self) -> AbstractContextManager[None]:
        """Return a context in which the loss of a worker ends this process: for other libraries' calls to MPI, which have no time limit."""
        return _exit_on_loss(self._lifeline)

    # Messages that have not left yet --------------------------------------------------------------------------------------------

    def _start_progress(self) -> None:
        """Let a background thread call MPI while this worker computes: without such calls, a long message may not leave."""
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            return
        if self._progress_thread is None:
            self._progress_thread = threading.Thread(target=self._progress, name="mpi progress", daemon=True)
            self._progress_thread.start()
        self._has_unsent.set()

    def _progress(self) -> None:
        """Test messages until they have left; each test lets MPI move them on. Runs in the background thread."""
        while True:
            self._has_unsent.wait()
            if self._closed:
                return
            with self._lock:
                self._sent = [(request, buffer) for request, buffer in self._sent if not request.Test()]
                if not self._sent:
                    self._has_unsent.clear()
            time.sleep(PROGRESS_S)

    # Collectives ----------------------------------------------------------------------------------------------------------------

    def _begin_all_gather(self, buffer: Tensor) -> Callable[[], Sequence[Tensor]]:
        found = buffer.new_empty(self.size, len(buffer))
        work = self.comm.Iallgather(self._mpi_buffer(buffer), self._mpi_buffer(found.view(-1)))
        return self._ending(work, found.unbind())

    def _begin_all_to_all(self, parts: Tensor) -> Callable[[], Tensor]:
        found = torch.empty_like(parts)
        work = self.comm.Ialltoall(self._mpi_buffer(parts.view(-1)), self._mpi_buffer(found.view(-1)))
        return self._ending(work, found)

    def _begin_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        wide = tensor.detach().to(device="cpu", dtype=torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else None)
        values = wide.contiguous().numpy()
        # A reduction to rank 0, then a broadcast: MPI_Allreduce need not give all ranks the same bits.
        mine = self._mpi.IN_PLACE if self.rank == 0 else values
        work = self.comm.Ireduce(mine, values if self.rank == 0 else None, self._mpi.SUM, 0)

        def end() -> None:
            self._wait(work)
            self._wait(self.comm.Ibcast(values, 0))
            found = torch.from_numpy(values).view(tensor.shape)
            if found.data_ptr() != tensor.data_ptr():
                tensor.copy_(found)

        return end

    def finish(self) -> None:
        with self._lock:
            sent, self._sent = self._sent, []
            self._has_unsent.clear()
        for request, _ in sent:
            try:
                self._wait(request)
            except RuntimeError as error:
                raise ChannelError(f"worker {self.rank}: a message was not taken by its receiver: {error}") from error
        self._unchecked.check()

    def close(self) -> None:
        self._closed = True
        self._has_unsent.set()
        with self._lock:
            self._sent.clear()
        self._posted.clear()


def _exit_on_loss(lifeline: Lifeline | None) -> AbstractContextManager[None]:
    return nullcontext() if lifeline is None else lifeline.exit_on_loss()


def _unlink_shared_memory(comm: Any) -> None:
    """Unlink the files of the memory that MPICH shares on a node, once all workers have mapped it.

    A worker that is killed later then leaves no such file behind.
    """
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
    """Return True if this MPI library says that it can send and receive CUDA tensors.

    Asks in the standard's way (MPI 4.1: memory kinds), then in the older one of MPICH and Open MPI. No answer means no.
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
