"""A worker's connections to the others of its run: process groups of torch, and an MPI world where states travel by MPI."""

import socket
from collections.abc import Collection
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from rayllp.channel.base import Channel
from rayllp.channel.interfaces import hang_up_on, use_interface_of
from rayllp.channel.local import LocalChannel
from rayllp.channel.mpi import MPIWorld
from rayllp.channel.pmi import Rendezvous
from rayllp.channel.torch_dist import TorchChannel
from rayllp.config import TrainConfig
from rayllp.errors import RayllpError, RendezvousError


class Membership:
    """Of one worker, in one set of workers after another.

    Attributes:
        mpi: the world that this process is in, for as long as it lives.
    """

    def __init__(self) -> None:
        self.mpi: MPIWorld | None = None
        self._listener: socket.socket | None = None
        self._layers: dist.ProcessGroup | None = None
        self._replicas: dist.ProcessGroup | None = None
        self._copies: dist.ProcessGroup | None = None

    @property
    def is_joined(self) -> bool:
        return self._layers is not None or dist.is_initialized()

    def listen(self, host: str) -> int:
        """Open the rendezvous port on this interface alone; the port."""
        self._listener = socket.create_server((host, 0))
        return int(self._listener.getsockname()[1])

    def join(
        self, config: TrainConfig, rank: int, own: str, at: tuple[str, int], backend: str, device: str, mpi: Rendezvous | None
    ) -> None:
        """Become one of them.

        Args:
            own: the address whose interface is used.
            at: where the first of them listens.
            backend: of torch's groups.
            mpi: where the MPI world meets that is to carry states; None: torch's groups do.

        Raises:
            RendezvousError: they could not be connected.
        """
        use_interface_of(own)
        try:
            self._join(config, rank, at, backend, device)
            if mpi is not None:
                self.mpi = MPIWorld.join(mpi, rank, _limit(config).total_seconds())
        except RayllpError:
            raise
        except (RuntimeError, OSError) as error:
            raise RendezvousError(f"worker {rank} on {socket.gethostname()}: {str(error).splitlines()[0]}") from None

    def _join(self, config: TrainConfig, rank: int, at: tuple[str, int], backend: str, device: str) -> None:
        timeout, listener = _limit(config), self._listener
        self._listener = None
        store = meet(at, config.world, timeout, listener if rank == 0 else None)
        if rank > 0 and listener is not None:  # opened to see who reaches this host, or as the first of other workers
            listener.close()
        dist.init_process_group(backend, store=store, rank=rank, world_size=config.world, timeout=timeout)
        D, P = config.mesh.data, config.layer_workers
        replicas = [[replica * P + block for block in range(P)] for replica in range(D)]
        self._layers = _make(replicas, rank, timeout)
        self._replicas = _make([list(ranks) for ranks in zip(*replicas, strict=True)], rank, timeout) if D > 1 else None
        for group in filter(None, (dist.group.WORLD, self._layers, self._replicas)):
            _set_limit(group, device, config.receive_timeout_s)
        if config.world > 1 and (D == 1 or config.shards_optimizer):  # else a block's state is on another replica already
            self._copies = dist.new_group(backend="gloo", timeout=timeout)

    def channels(self, config: TrainConfig, rank: int) -> tuple[Channel, Channel]:
        """To the other blocks, and to the other replicas."""
        assert self._layers is not None, "join() comes first"
        limit, data, P = config.receive_timeout_s, self._replicas, config.layer_workers
        if self.mpi is not None:
            layers = self.mpi.channel(rank // P, limit, self._layers)
            return layers, LocalChannel.alone() if data is None else self.mpi.channel(rank % P, limit, data)
        return TorchChannel(self._layers, limit), LocalChannel.alone() if data is None else TorchChannel(data, limit)

    def copies(self, limit_s: float) -> Channel | None:
        """For copies of states, which nothing else uses; None: other replicas have them."""
        if self._copies is None:
            return None
        _set_limit(self._copies, "cpu", limit_s)
        return TorchChannel(self._copies, limit_s)

    def break_off(self, gone: Collection[str]) -> None:
        """End what this worker waits for, because hosts are gone; to be called from another thread than the one that waits.

        NCCL's operations end by no connection that is lost, and by no time limit of theirs: its communicators are aborted.

        Args:
            gone: their addresses.
        """
        hang_up_on(gone)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()

    def leave(self) -> None:
        """Close all connections, so that others who wait for this worker are told at once."""
        if self.mpi is not None:
            self.mpi.leave()
        self._layers = self._replicas = self._copies = None
        if dist.is_initialized():
            dist.destroy_process_group()


def meet(at: tuple[str, int], world: int, timeout: timedelta, listener: socket.socket | None) -> TCPStore:
    """Where workers learn each other's addresses.

    Args:
        at: where the first of them listens.
        listener: the first worker's own port there.
    """
    if listener is None:
        return TCPStore(*at, world, False, timeout)
    return TCPStore(*at, world, True, timeout, master_listen_fd=listener.detach())


def _limit(config: TrainConfig) -> timedelta:
    """To connect. A worker that is lost now is not noticed by those who wait for it here: they must give up before they seem silent."""
    return timedelta(seconds=min(config.receive_timeout_s, config.hang_timeout_s / 2))


def _make(groups: list[list[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """Make process groups of these ranks, all of them on every worker, as torch asks; this worker's."""
    made = [dist.new_group(ranks, timeout=timeout) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)


def _set_limit(group: dist.ProcessGroup, device: str, seconds: float) -> None:
    """Let the group's operations take so long: its making had a limit of its own."""
    group._get_backend(torch.device(device))._set_default_timeout(timedelta(seconds=seconds))
