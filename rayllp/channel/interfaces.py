"""Chooses the network interface that workers talk over (the one with their node's address), and tests whether hosts reach each other.

Left to themselves, libraries use the address that the host's own name resolves to (127.0.1.1 on stock Debian and Ubuntu), or the first
interface that is up, which may lead nowhere.
"""

import contextlib
import os
import socket
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil

from rayllp.errors import ClusterError

LOOPBACK = "127.0.0.1"
CONNECT_S = 3.0
"""Longest wait for a connection to another host, in seconds."""
VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}", "FI_TCP_IFACE": "{}", "UCX_NET_DEVICES": "{}"}
"""Environment variables that make Gloo, NCCL, and MPI's libfabric and UCX use just one interface, with the form of their values."""
ON_ONE_HOST = {"UCX_NET_DEVICES"}
"""Variables to set only where all workers are on one host: between hosts UCX would leave InfiniBand unused."""

_ours: dict[str, str] = {}
"""Values of these variables that this process has set itself, which do not count as the user's settings."""


def use_interface_of(address: str) -> None:
    """Make the process groups that this process joins from now on use the interface with this address. No other code sets these variables.

    A variable that the user has set stays as it is. Where no interface has the address (behind NAT, for instance), the libraries are left
    to themselves.

    Raises:
        ClusterError: the user's own GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME fits no interface of this host.
    """
    _check_user_settings()
    name = interface_of(address)
    for variable, form in VARIABLES.items():
        if user_setting(variable) is not None:
            continue
        os.environ.pop(variable, None)
        if name is not None and (address == LOOPBACK or variable not in ON_ONE_HOST):
            _ours[variable] = os.environ[variable] = form.format(name)


def interface_of(address: str) -> str | None:
    """Return the name of this host's interface with this address; None if there is none."""
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(each.address == address for each in addresses)), None)


def addresses() -> list[str]:
    """Return this host's IPv4 addresses that other hosts may reach. Where the user has chosen interfaces for Gloo, only theirs."""
    chosen = user_setting("GLOO_SOCKET_IFNAME")
    names = psutil.net_if_addrs() if chosen is None else chosen.split(",")
    found = [each.address for name in names for each in psutil.net_if_addrs().get(name, ()) if each.family == socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]


def user_setting(variable: str) -> str | None:
    """Return the value that the user has set this environment variable to; None if the user has not."""
    value = os.environ.get(variable)
    return None if not value or value == _ours.get(variable) else value


def _check_user_settings() -> None:
    """Refuse a GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME of the user's that fits no interface of this host."""
    there = sorted(psutil.net_if_addrs())
    gloo, nccl = user_setting("GLOO_SOCKET_IFNAME"), user_setting("NCCL_SOCKET_IFNAME")
    if gloo is not None and not set(gloo.split(",")) <= set(there):
        raise _no_such_interface("GLOO_SOCKET_IFNAME", gloo, there)
    # NCCL takes prefixes of names. With "=" in front they are whole names, with "^" the interfaces are excluded.
    if nccl is not None and not nccl.startswith("^"):
        exact, wanted = nccl.startswith("="), nccl.lstrip("=").split(",")
        if not any(name == each or (not exact and name.startswith(each)) for name in there for each in wanted):
            raise _no_such_interface("NCCL_SOCKET_IFNAME", nccl, there)


def _no_such_interface(variable: str, value: str, there: Sequence[str]) -> ClusterError:
    return ClusterError(
        f"{variable}={value} on {socket.gethostname()} fits none of its interfaces ({', '.join(there)}): unset it, and the one that holds "
        "the node's address in the cluster is used, or name one of these"
    )


def close_connections_to(hosts: Collection[str]) -> int:
    """Shut down this process's TCP connections to hosts that are gone, given by address; return how many there were.

    A host that was cut off does not even close its connections, so whoever waits for a message from it would wait until its time limit.
    """
    closed = 0
    for connection in psutil.Process().net_connections(kind="tcp"):
        if connection.raddr and connection.raddr.ip in hosts and connection.fd >= 0:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as twin:
                twin.shutdown(socket.SHUT_RDWR)  # acts on the connection itself, whichever descriptor it is called on
                closed += 1
    return closed


# Which hosts reach each other -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """The address and port that a process listens on."""

    address: str
    port: int


@contextlib.contextmanager
def open_listeners(local_addresses: Sequence[str]) -> Iterator[list[Endpoint]]:
    """Listen on each of these addresses of this host for as long as the context lasts, so that other hosts can try to connect."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server((address, 0))) for address in local_addresses]
        yield [Endpoint(*listener.getsockname()[:2]) for listener in listeners]


class ConnectAttempt(NamedTuple):
    """An attempt to connect to an endpoint.

    Attributes:
        local_address: this host's address on the connection; None if the endpoint could not be reached.
        error: the reason why it could not.
    """

    local_address: str | None
    error: str = ""


def try_connect(endpoint: Endpoint, timeout_s: float = CONNECT_S) -> ConnectAttempt:
    """Try to connect to an endpoint, and hang up again."""
    try:
        with socket.create_connection((endpoint.address, endpoint.port), timeout_s) as connection:
            return ConnectAttempt(str(connection.getsockname()[0]))
    except TimeoutError:
        return ConnectAttempt(None, f"no answer within {timeout_s:g} s")
    except OSError as error:
        return ConnectAttempt(None, error.strerror or str(error))


def explain_unreachable(unreachable: Sequence[tuple[str, Endpoint, str]], error: str) -> str:
    """Return a message that says why workers could not be connected, and what to do.

    Args:
        unreachable: for each pair of hosts that failed: the name of the one, the endpoint of the other, and the reason.
        error: the message of the library that failed to connect them.
    """
    if not unreachable:
        return (
            f"the workers could not be connected ({error}), though all hosts reach each other at their addresses in the cluster. If "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME is set on a host, unset it, or name the interface that the hosts share"
        )
    host, endpoint, why = unreachable[0]
    more = f" ({len(unreachable) - 1} more such pairs)" if len(unreachable) > 1 else ""
    return (
        f"the workers could not be connected: {host} does not reach {endpoint.address}: {why}{more}. A firewall lets no connection to port "
        f"{endpoint.port} through, or the hosts share another network: open TCP between all nodes on all ports, or start Ray on each with "
        "--node-ip-address, its address in the network that they share"
    )
