"""The Ray cluster that a run uses: the one that RAY_ADDRESS names, else one that is started on this machine and ends with the run."""

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

from rayllp.channel.interfaces import Endpoint, try_connect
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
"""Environment of the processes of a cluster that we start ourselves; variables that the user has set are kept.

Ray runs workers at niceness 15, at which they would get almost no CPU time beside one other busy program. And OpenMP threads (GNU's,
Intel's) that wait for a thread without a core would spin, and take CPU time from that thread and from others.
"""
TRIES, LATE = 3, "timed out during startup"
"""Ray gives its processes 30 s to start. On a busy machine that may not be enough, so starting them is tried again."""
FILES = 1024
"""Open files that Ray's processes and the workers need; each of them needs tens to hundreds."""


@contextlib.contextmanager
def join_cluster(cpus: int, console: Console | None = None) -> Iterator[None]:
    """Use the cluster that this process has joined already. Otherwise join that of RAY_ADDRESS, or start one here, and leave it at the end.

    Args:
        cpus: a cluster that is started here offers at least this many CPUs, even if the machine has fewer.
        console: where to say which cluster was joined; default: standard error.

    Raises:
        SettingsError: RAY_ADDRESS is not the address of a cluster.
        ClusterError: the cluster cannot be joined, or none can be started here.
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
    """Keep this process's handler of SIGTERM. Ray installs one that raises an exception, which Ray's own calls swallow."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


# Joining an existing cluster ------------------------------------------------------------------------------------------------------


def _join(address: str, console: Console) -> None:
    # Ray takes the driver's address from the default route, or from the host name. If that address is not in the cluster's network, Ray
    # believes the driver to be on the head node, and workers on other nodes wait forever for objects that the driver holds.
    own = check_address(address)
    try:
        context = ray.init(address=address, logging_level=logging.WARNING, **({} if own is None else {"_node_ip_address": own}))
    except Exception as error:
        raise ClusterError(f"{ADDRESS}={address}: this cluster cannot be joined: {_reason(error)}. {_ADVICE}") from error
    nodes = [node for node in ray.nodes() if node["Alive"]]
    tell(console, _joined(context.address_info, nodes))


_ADVICE = f"Give the HOST:PORT that `ray start --head` has printed, or unset {ADDRESS} to start a cluster on this machine"


def _joined(info: Mapping[str, Any], nodes: list[dict[str, Any]]) -> str:
    """Return the line that tells the user which cluster the run is on."""
    cpus, gpus = (sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    size = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}, {cpus:g} CPUs" + (f", {gpus:g} GPUs" if gpus else "")
    return f"joined the Ray cluster at {info['gcs_address']}, by {ADDRESS}: {size}; its session is {info['session_dir']}"


def check_address(address: str) -> str | None:
    """Check the value of RAY_ADDRESS, and that something listens there: Ray itself would try for a minute.

    Returns: this host's own address on the way to the cluster; None if Ray is to find the cluster ("auto").

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
    attempt = try_connect(Endpoint(host, port), ANSWER_S)
    if attempt.local_address is None:
        raise ClusterError(f"{ADDRESS}={address}: no cluster answers there ({attempt.error}). {_ADVICE}")
    return attempt.local_address


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise SettingsError(f"{ADDRESS}={address} is not HOST:PORT. {_ADVICE}")
    return host, port


# Starting a cluster on this machine -----------------------------------------------------------------------------------------------


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
        except BaseException as error:  # a request to end this process, too
            ray.shutdown()
            if not isinstance(error, Exception):
                raise
            if not (left and LATE in str(error)):
                raise ClusterError(f"Ray cannot be started on this machine: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """Return why Ray does not start here, and what to change."""
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
    """Set environment variables that are not set yet, for the processes that are started inside."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextlib.contextmanager
def _deaf_to_hangups() -> Iterator[None]:
    """Have processes that are started inside ignore SIGHUP.

    They outlive a closed terminal, because the driver, which gets the signal as well, still needs them to write a checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _raise_file_limit() -> None:
    """Raise this process's limit of open files as far as Ray needs and the system permits. Ray's processes inherit the limit.

    Raises:
        ClusterError: the system permits too few.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES <= hard or (soft < FILES and hard == resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    elif hard < FILES and hard != resource.RLIM_INFINITY:
        raise ClusterError(
            f"a process may have {hard} files open here (ulimit -Hn), and Ray needs about {FILES}: raise the limit, by `ulimit -n {FILES}` "
            "in a shell that has the right to, or in the container's or the service's settings"
        )


def _reason(error: Exception) -> str:
    """Return the first line of an error's message that is not empty, or the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
