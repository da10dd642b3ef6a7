"""`rayllp doctor`: examine a cluster's nodes, how they differ and how fast their links are, and say what to fix before training there."""

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.table import Column, Table

from rayllp.channel.interfaces import LOOPBACK, ConnectAttempt, Endpoint, explain_unreachable, try_connect, use_interface_of
from rayllp.channel.timing import Link, time_messages
from rayllp.channel.torch_dist import TorchChannel
from rayllp.checkpoint import locate
from rayllp.checkpoint.shared import Mark, leave_mark
from rayllp.cluster.hosts import find_unreachable
from rayllp.cluster.placement import WorkerLocation
from rayllp.cluster.process_groups import make_store
from rayllp.errors import ClusterError
from rayllp.report.progress import tell

PACKAGES = ("ray", "torch", "transformers", "safetensors", "rayllp")
MISSING = "–"
SIZES = {"32 KiB": 32 * 1024, "8 MiB": 8 * 1024**2}
SKEW_S = 1.0
ANSWER_S = 120.0
MOST_LINKS = 16
SLOW_GB_S = 0.1
LINK_S = 20.0
"""Time limit for a connection and for each message, in seconds."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster, as a process on it describes it.

    Attributes:
        versions: of Python and `PACKAGES`; "–" for a package that is missing.
        gpus: the name of each GPU.
        clock_skew_s: seconds by which its clock is ahead of this host's.
        shared: "ok", what is wrong with the shared path there, or "–" if no path was given.
    """

    id: str
    address: str
    host: str
    versions: dict[str, str]
    cpus: float
    gpus: list[str]
    nccl: str
    clock_skew_s: float
    shared: str
    niceness: int = 0
    wait_policy: str = "PASSIVE"


@dataclass(frozen=True)
class NodeLink:
    """A link between two nodes, or two processes on one node: round-trip time of 32 KiB messages, and bandwidth of 8 MiB messages."""

    nodes: tuple[str, str]
    backend: str
    latency_s: float
    bandwidth_gb_s: float


@dataclass
class Diagnosis:
    """The result of an examination: `faults` say what to fix, `notes` what to know."""

    nodes: list[Node] = field(default_factory=list)
    links: list[NodeLink] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine(path: str | None = None) -> Diagnosis:
    """Examine the cluster that this process has joined.

    Args:
        path: folder or URL where runs will be written; every node tries to write there. None: that is not checked.
    """
    diagnosis = Diagnosis()
    alive = [node for node in ray.nodes() if node["Alive"]]
    with _shared_place(path, diagnosis) as mark:
        for node in alive:
            with _as_fault(diagnosis, f"node {node['NodeManagerAddress']} did not answer"):
                diagnosis.nodes.append(_ask(node, mark))
    _compare(diagnosis)
    pairs = [(one, other) for one, other in zip(diagnosis.nodes, diagnosis.nodes[1:], strict=False)] or [(n, n) for n in diagnosis.nodes]
    if len(pairs) > MOST_LINKS:
        diagnosis.notes.append(f"links: the first {MOST_LINKS} of {len(pairs)} neighbours were measured")
    for one, other in pairs[:MOST_LINKS]:
        backend = "nccl" if one.gpus and other.gpus and (one is not other or len(one.gpus) > 1) else "gloo"
        with _as_fault(diagnosis, f"{backend} between {one.host} and {other.host} does not work"):
            link = _measure_link(one, other, backend)
            diagnosis.links.append(link)
            if one is not other and link.bandwidth_gb_s < SLOW_GB_S:
                diagnosis.faults.append(
                    f"{one.host} to {other.host}: {link.bandwidth_gb_s:.2f} GB/s; make sure that {backend} uses the fast interface: set "
                    f"{'NCCL' if backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME on every node"
                )
    return diagnosis


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print the nodes and links as tables that fit 80 columns, then what to fix."""
    say = partial(tell, console)
    headers = "host", "address", "CPUs", "GPUs", "clock, s", "shared path"
    table = Table(*(Column(header, overflow="fold") for header in headers), title="nodes")
    alike: dict[str, list[str]] = {}  # hosts by their versions, which are many and mostly the same
    for node in diagnosis.nodes:
        gpus = ", ".join(f"{count} × {name}" for name, count in Counter(node.gpus).items()) or "–"
        table.add_row(node.host, node.address, f"{node.cpus:g}", gpus, f"{node.clock_skew_s:+.3f}", node.shared)
        versions = node.versions | {"NCCL": node.nccl}
        alike.setdefault(", ".join(f"{name} {value}" for name, value in versions.items()), []).append(node.host)
    console.print(table)
    for versions_of, hosts in alike.items():
        say(f"{', '.join(hosts)}: {versions_of}")
    links = Table("from", "to", "backend", "round trip 32 KiB, µs", "bandwidth 8 MiB, GB/s", title="links between neighbours")
    for link in diagnosis.links:
        links.add_row(*link.nodes, link.backend, f"{link.latency_s * 1e6:.0f}", f"{link.bandwidth_gb_s:.2f}")
    console.print(links)
    for note in diagnosis.notes:
        say(f"note: {note}")
    for fault in diagnosis.faults:
        say(f"to fix: {fault}", style="red")
    if not diagnosis.faults:
        console.print("nothing to fix", style="green")


# Nodes ------------------------------------------------------------------------------------------------------------------------------


def _ask(node: dict[str, Any], mark: Mark | None) -> Node:
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    describe = ray.remote(num_cpus=0, scheduling_strategy=strategy)(_describe_node)
    ray.get(describe.remote(None), timeout=ANSWER_S)  # starts the process, so that this does not count as clock skew
    before = time.time()
    answer = ray.get(describe.remote(mark), timeout=ANSWER_S)
    after = time.time()
    resources = node["Resources"]
    skew = answer.pop("time") - (before + after) / 2
    return Node(id=node["NodeID"], address=node["NodeManagerAddress"], cpus=resources.get("CPU", 0), clock_skew_s=skew, **answer)


def _describe_node(mark: Mark | None) -> dict[str, Any]:
    import platform

    now = time.time()
    versions = {"Python": platform.python_version(), **dict.fromkeys(PACKAGES, MISSING)}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    gpus, nccl = _gpus()
    return {
        "time": now, "host": socket.gethostname(), "versions": versions, "gpus": gpus, "nccl": nccl,
        "shared": MISSING if mark is None else mark.check_visible(), "niceness": os.nice(0),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
    }  # fmt: skip


def _gpus() -> tuple[list[str], str]:
    """Return the names of this node's GPUs and the version of NCCL.

    They come from nvidia-smi, since this process was given no GPU by Ray and sees none.
    """
    import subprocess

    import torch

    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return [], "–"
    names = [line.strip() for line in listed.stdout.splitlines() if line.strip()] if listed.returncode == 0 else []
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() or (names and torch.version.cuda) else "–"
    return names, nccl


@contextlib.contextmanager
def _shared_place(path: str | None, diagnosis: Diagnosis) -> Iterator[Mark | None]:
    mark = None
    with contextlib.ExitStack() as stack:
        if path is None:
            diagnosis.notes.append("shared storage was not tried: give --path, the folder or URL where runs will be written")
        else:
            try:
                mark = stack.enter_context(leave_mark(locate(path)))
            except Exception as error:  # each fsspec implementation raises errors of its own
                diagnosis.faults.append(f"{path} cannot be written here ({type(error).__name__}: {error}): choose another place for runs")
        yield mark


def _compare(diagnosis: Diagnosis) -> None:
    """Add a fault for each thing in which the nodes differ or that one of them lacks."""
    for name in ("Python", *PACKAGES):
        if len({node.versions[name] for node in diagnosis.nodes}) > 1:
            where = ", ".join(f"{node.host} {node.versions[name]}" for node in diagnosis.nodes)
            diagnosis.faults.append(f"{name} differs ({where}): install the same version on every node")
    for node in diagnosis.nodes:
        missing = [name for name in PACKAGES if node.versions[name] == MISSING and name != "rayllp"]
        if missing:
            diagnosis.faults.append(f"{node.host} lacks {', '.join(missing)}: install rayllp there, or give a runtime environment with it")
        if abs(node.clock_skew_s) > SKEW_S:
            diagnosis.faults.append(
                f"the clock of {node.host} is {node.clock_skew_s:+.1f} s off: run a time service (chrony, ntpd) on every node"
            )
        if node.shared not in ("ok", "–"):
            diagnosis.faults.append(
                f"{node.host} cannot use the shared path ({node.shared}): mount it there, or give a URL that all nodes reach"
            )
    _note_impatience(diagnosis)
    if not diagnosis.nodes:
        diagnosis.faults.append("no node answered: is the cluster up? `ray status` tells")


def _note_impatience(diagnosis: Diagnosis) -> None:
    """Note settings that make workers slow beside other programs. They are no faults: whoever started the cluster may have chosen them."""
    nice = [node for node in diagnosis.nodes if node.niceness > 0]
    if nice:
        hosts = ", ".join(node.host for node in nice)
        diagnosis.notes.append(
            f"workers on {hosts} run at niceness {nice[0].niceness} (Ray's default is 15), and get next to nothing beside a busy program: "
            "where nodes do other work, start them with RAY_worker_niceness=0"
        )
    spinning = [node.host for node in diagnosis.nodes if node.cpus and not node.gpus and node.wait_policy.upper() != "PASSIVE"]
    if spinning:
        diagnosis.notes.append(
            f"threads on {', '.join(spinning)} spin while they wait, also for one that another program keeps from its core: where nodes do "
            "other work, start them with OMP_WAIT_POLICY=PASSIVE"
        )


@contextlib.contextmanager
def _as_fault(diagnosis: Diagnosis, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        diagnosis.faults.append(f"{what}: {reason}")


# Links ------------------------------------------------------------------------------------------------------------------------------


class _End:
    """An actor at one end of a link."""

    def listen(self, host: str) -> int:
        self._listener = socket.create_server((host, 0))
        return int(self._listener.getsockname()[1])

    def try_connections(self, endpoints: list[Endpoint]) -> list[ConnectAttempt]:
        return [try_connect(endpoint) for endpoint in endpoints]

    def measure(self, rank: int, own: str, at: tuple[str, int], backend: str) -> Link | None:
        """Measure the times of a small and of a large message; return them on rank 0."""
        import torch
        import torch.distributed as dist

        use_interface_of(own)
        limit = timedelta(seconds=LINK_S)
        store = make_store(at, 2, limit, self._listener if rank == 0 else None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
        device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        # Rank 0 gets the times, each half a round trip; rank 1 gets none.
        links = time_messages(TorchChannel(timeout_s=LINK_S), list(SIZES.values()), device, rounds=10)
        dist.destroy_process_group()
        return links[0] if links else None


def _measure_link(one: Node, other: Node, backend: str) -> NodeLink:
    gpus = 1 if backend == "nccl" else 0
    ends = [
        ray.remote(_End)
        .options(num_cpus=0, num_gpus=gpus, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
        .remote()
        for node in (one, other)
    ]
    locations = [WorkerLocation(node.id, LOOPBACK if one is other else node.address, node.host) for node in (one, other)]

    def ask(rank: int, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(ends[rank], method).remote(*arguments), timeout=ANSWER_S)

    try:
        unreachable = find_unreachable(locations, lambda rank, host: int(ask(rank, "listen", host)), ask)
        if unreachable:
            raise ClusterError(explain_unreachable(unreachable, ""))
        at = locations[0].address, ask(0, "listen", locations[0].address)
        measured = [end.measure.remote(rank, locations[rank].address, at, backend) for rank, end in enumerate(ends)]
        try:
            timed_links = ray.get(measured, timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(f"messages of 8 MiB did not pass within {ANSWER_S:g} s: the link is very slow, or loses packets") from None
    finally:
        for end in ends:
            ray.kill(end)
    return NodeLink((one.host, other.host), backend, 2 * timed_links[0].seconds[SIZES["32 KiB"]], timed_links[0].bandwidth_gb_s)


def run_doctor(path: str | None, console: Console) -> bool:
    """Examine the cluster of RAY_ADDRESS, or one that is started on this machine; return True if there is nothing to fix."""
    from rayllp.cluster.joining import join_cluster

    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        tell(console, "RAY_ADDRESS is not set: looking at a cluster of this machine's own, as `rayllp train` would start it")
    with join_cluster(1, console):
        diagnosis = examine(path)
    show(diagnosis, console)
    return not diagnosis.faults
