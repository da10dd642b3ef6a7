"""The cluster that a run is on: the one that RAY_ADDRESS names, else one on this machine for as long as the run lasts."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import ray
from rich.console import Console

from rayllp.channel.interfaces import Door, knock
from rayllp.cluster.cpus import usable_cpus
from rayllp.errors import ClusterError, SettingsError
from rayllp.report.progress import tell

ADDRESS = "RAY_ADDRESS"
ANSWER_S = 10.0
PATIENT = {
    "RAY_worker_niceness": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
}
"""What the processes of a cluster of our own are started with, unless the user has set it.

Ray gives workers the niceness 15: beside one other busy program they would get next to nothing. And threads that wait for one that has lost
its core (GNU's OpenMP, Intel's) would spin, and take more cores from others and from it.
"""
TRIES, LATE = 3, "timed out during startup"
"""Ray gives its processes 30 s to start, which a busy machine may not have."""
FILES = 1024
"""Open files that Ray's processes and the workers need, of which each has some tens to hundreds."""


@contextlib.contextmanager
def join_cluster(cpus: int, console: Console | None = None) -> Iterator[None]:
    """The cluster this process belongs to, else one on this machine for as long as the run lasts, with at least so many CPUs by name.

    Args:
        console: where it is said which cluster was joined; default the standard error.

    Raises:
        SettingsError: RAY_ADDRESS is no address of a cluster.
        ClusterError: that cluster cannot be joined, or none can be started here.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get(ADDRESS, "").strip()
    with _own_handler():
        if address in ("", "local"):
            _start(cpus)
        else:
            _join(address, console or Console(stderr=True))
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_handler() -> Iterator[None]:
    """Keep what this process does at SIGTERM: Ray would end it by an exception that its own calls swallow."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


# A cluster of somebody's ----------------------------------------------------------------------------------------------------------


def _join(address: str, console: Console) -> None:
    # Ray takes the driver's address from the default route, else from the host's name. Where that is not the network of the cluster it
    # takes the driver for one of the head's, and workers elsewhere wait for ever for what the driver hands out.
    own = check_address(address)
    try:
        context = ray.init(address=address, logging_level=logging.WARNING, **({} if own is None else {"_node_ip_address": own}))
    except Exception as error:
        raise ClusterError(f"{ADDRESS}={address}: this cluster cannot be joined: {_reason(error)}. {_ADVICE}") from error
    nodes = [node for node in ray.nodes() if node["Alive"]]
    tell(console, _joined(context.address_info, nodes))


_ADVICE = f"Give the HOST:PORT that `ray start --head` has printed, or unset {ADDRESS} to start a cluster on this machine"


def _joined(info: Mapping[str, Any], nodes: list[dict[str, Any]]) -> str:
    """The line that says on which cluster a run is."""
    cpus, gpus = (sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    size = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}, {cpus:g} CPUs" + (f", {gpus:g} GPUs" if gpus else "")
    return f"joined the Ray cluster at {info['gcs_address']}, by {ADDRESS}: {size}; its session is {info['session_dir']}"


def check_address(address: str) -> str | None:
    """Refuse what is no address of a cluster, or where none answers, before Ray tries for a minute.

    Returns: this host's address on the way there; None: Ray is to look for the cluster.

    Raises:
        SettingsError: it is a URL, or not HOST:PORT.
        ClusterError: nothing listens there.
    """
    if address == "auto":
        return None
    scheme = urlsplit(address).scheme if "://" in address else ""
    if scheme in ("http", "https"):
        raise SettingsError(
            f"{ADDRESS}={address} is the address of a job server. To train there: RAY_API_SERVER_ADDRESS={address} ray job submit "
            f"--working-dir . -- python -m rayllp …; to join a cluster give its head's HOST:PORT, such as {urlsplit(address).hostname}:6379"
        )
    if scheme:
        raise SettingsError(
            f"{ADDRESS}={address}: a run needs to be a process of the cluster, and cannot reach it by {scheme}://. Start it on one of "
            "the cluster's machines with HOST:PORT of its head, or as a job (docs/cluster.md)"
        )
    host, port = _host_and_port(address)
    reached = knock(Door(host, port), ANSWER_S)
    if reached.own is None:
        raise ClusterError(f"{ADDRESS}={address}: no cluster answers there ({reached.why_not}). {_ADVICE}")
    return reached.own


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise SettingsError(f"{ADDRESS}={address} is not HOST:PORT. {_ADVICE}")
    return host, port


# One of this machine's own --------------------------------------------------------------------------------------------------------


def _start(cpus: int) -> None:
    _raise_file_limit()
    for left in reversed(range(TRIES)):
        try:
            with _environment(PATIENT), _deaf_to_hangups():
                ray.init(
                    address="local",
                    num_cpus=max(usable_cpus(), cpus),
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                    configure_logging=True,
                )
            return
        except BaseException as error:  # a wish to end, too
            ray.shutdown()
            if not isinstance(error, Exception):
                raise
            if not (left and LATE in str(error)):
                raise ClusterError(f"Ray cannot be started on this machine: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """Why Ray does not start here, and what to change."""
    if "AF_UNIX" in str(error):
        name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        return (
            f"{name}={os.environ.get(name)} is too long: the sockets that Ray makes below it may have paths of 107 bytes. Set "
            "RAY_TMPDIR to a path of 30 bytes or so"
        )
    if LATE in str(error):
        return f"its processes were not up within 30 s, in {TRIES} tries: try again when the machine is less busy, or has more memory free"
    return _reason(error)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables, where they are not set, for the processes that are started inside."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextlib.contextmanager
def _deaf_to_hangups() -> Iterator[None]:
    """Processes started inside outlive the terminal: the driver, which is told too, still needs them for a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _raise_file_limit() -> None:
    """As many open files as the system lets this process have, where it has few: Ray's processes inherit the limit.

    Raises:
        ClusterError: they are too few for Ray.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES <= hard or (soft < FILES and hard == resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    elif hard < FILES and hard != resource.RLIM_INFINITY:
        raise ClusterError(
            f"a process may have {hard} files open here (ulimit -Hn), and Ray needs about {FILES}: raise the limit, by `ulimit -n {FILES}` "
            "in a shell that may, or in the container's or the service's settings"
        )


def _reason(error: Exception) -> str:
    """An error's first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
