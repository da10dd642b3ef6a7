"""A worker's connections to the other workers of its run: process groups of torch, and an MPI world if states are sent by MPI."""

import socket
from collections.abc import Collection
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from rayllp.channel.base import Channel
from rayllp.channel.interfaces import close_connections_to, use_interface_of
from rayllp.channel.local import LocalChannel
from rayllp.channel.mpi import MPIWorld
from rayllp.channel.pmi import Rendezvous
from rayllp.channel.torch_dist import TorchChannel
from rayllp.config import TrainConfig
from rayllp.errors import RayllpError, RendezvousError


class Connections:
    """One worker's connections to a set of workers. It can disconnect, and join another set.

    Attributes:
        mpi: the MPI world of this process, which it cannot leave as long as it lives; None without MPI.
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
        """Open the rendezvous port on the network interface with the address `host` only; return the port."""
        self._listener = socket.create_server((host, 0))
        return int(self._listener.getsockname()[1])

    def join(
        self, config: TrainConfig, rank: int, own: str, at: tuple[str, int], backend: str, device: str, mpi: Rendezvous | None
    ) -> None:
        """Connect to the other workers.

        Args:
            config: settings with the number of workers and how they are arranged.
            rank: rank of this worker.
            own: this host's address on the network interface to use.
            at: address and port where rank 0 listens.
            backend: backend of the process groups, "gloo" or "nccl".
            device: "cpu" or "cuda".
            mpi: where the workers meet to form an MPI world that sends the states; None: the process groups send them.

        Raises:
            RendezvousError: the workers could not be connected.
        """
        use_interface_of(own)
        try:
            self._join(config, rank, at, backend, device)
            if mpi is not None:
                self.mpi = MPIWorld.join(mpi, rank, _connect_timeout(config).total_seconds())
        except RayllpError:
            raise
        except (RuntimeError, OSError) as error:
            raise RendezvousError(f"worker {rank} on {socket.gethostname()}: {str(error).splitlines()[0]}") from None

    def _join(self, config: TrainConfig, rank: int, at: tuple[str, int], backend: str, device: str) -> None:
        timeout, listener = _connect_timeout(config), self._listener
        self._listener = None
        store = make_store(at, config.world, timeout, listener if rank == 0 else None)
        if rank > 0 and listener is not None:  # it was opened to test which hosts connect to this one, or when this worker had rank 0
            listener.close()
        dist.init_process_group(backend, store=store, rank=rank, world_size=config.world, timeout=timeout)
        D, P = config.mesh.data, config.layer_workers
        replicas = [[replica * P + block for block in range(P)] for replica in range(D)]
        self._layers = _new_group(replicas, rank, timeout)
        self._replicas = _new_group([list(ranks) for ranks in zip(*replicas, strict=True)], rank, timeout) if D > 1 else None
        for group in filter(None, (dist.group.WORLD, self._layers, self._replicas)):
            _set_timeout(group, device, config.receive_timeout_s)
        if config.world > 1 and (D == 1 or config.shards_optimizer):  # else another replica has the same state already
            self._copies = dist.new_group(backend="gloo", timeout=timeout)

    def channels(self, config: TrainConfig, rank: int) -> tuple[Channel, Channel]:
        """Return the channels to the other blocks of this replica, and to the same block of the other replicas."""
        assert self._layers is not None, "join() comes first"
        limit, data, P = config.receive_timeout_s, self._replicas, config.layer_workers
        if self.mpi is not None:
            layers = self.mpi.channel(rank // P, limit, self._layers)
            return layers, LocalChannel.alone() if data is None else self.mpi.channel(rank % P, limit, data)
        return TorchChannel(self._layers, limit), LocalChannel.alone() if data is None else TorchChannel(data, limit)

    def copies(self, limit_s: float) -> Channel | None:
        """Return the channel for copies of states; None if replicas make copies unnecessary. Nothing else uses it.

        Args:
            limit_s: time limit of its messages.
        """
        if self._copies is None:
            return None
        _set_timeout(self._copies, "cpu", limit_s)
        return TorchChannel(self._copies, limit_s)

    def abort_connections(self, hosts: Collection[str]) -> None:
        """End this worker's waiting for hosts that are gone. Must be called from a thread other than the one that waits.

        NCCL's operations end neither when a connection is lost nor after a time limit, so its communicators are aborted.

        Args:
            hosts: IP addresses of those hosts.
        """
        close_connections_to(hosts)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()

    def disconnect(self) -> None:
        """Close all connections, so that workers that wait for this one fail at once."""
        if self.mpi is not None:
            self.mpi.disconnect()
        self._layers = self._replicas = self._copies = None
        if dist.is_initialized():
            dist.destroy_process_group()


def make_store(at: tuple[str, int], world: int, timeout: timedelta, listener: socket.socket | None) -> TCPStore:
    """Return the store by which workers exchange their addresses.

    Args:
        at: address and port where rank 0 listens.
        world: number of workers.
        listener: on rank 0, the socket that listens there; it becomes the store's. None on the others.
    """
    if listener is None:
        return TCPStore(*at, world, False, timeout)
    return TCPStore(*at, world, True, timeout, master_listen_fd=listener.detach())


def _connect_timeout(config: TrainConfig) -> timedelta:
    """Return the time limit for connecting.

    A worker that is lost meanwhile is noticed only by this limit. It is shorter than `hang_timeout_s`, so that the workers that wait for it
    report the loss before they are taken for lost themselves.
    """
    return timedelta(seconds=min(config.receive_timeout_s, config.hang_timeout_s / 2))


def _new_group(groups: list[list[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """Create process groups of these ranks; return the one that this worker is in. torch requires every worker to create all groups."""
    created = [dist.new_group(ranks, timeout=timeout) for ranks in groups]
    return next(group for group, ranks in zip(created, groups, strict=True) if rank in ranks)


def _set_timeout(group: dist.ProcessGroup, device: str, seconds: float) -> None:
    """Set the time limit of the group's operations, which differs from the one for creating it."""
    group._get_backend(torch.device(device))._set_default_timeout(timedelta(seconds=seconds))
