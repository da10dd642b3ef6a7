"""How many CPUs this process may use: those that it is bound to, and a container's share of them."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """At least 1. By affinity (taskset, Slurm, MPI's launcher) and by the quota of this process's cgroup (Docker, Kubernetes)."""
    return max(1, int(min(len(bound_to()), cgroup_quota())))


def bound_to() -> frozenset[int]:
    """The CPUs that this process is bound to."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cgroup_quota(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs' worth of time that this process's cgroup, and those around it, are given; infinite where there is no limit.

    Args:
        root: where cgroups are mounted.
        own: lists this process's: `0::/PATH` (version 2), or `3:cpu,cpuacct:/PATH` (version 1).
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    quota = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _upwards(root, path):
                quota = min(quota, _ratio(*_read(folder / "cpu.max").split()[:2]))
        elif "cpu" in controllers.split(","):
            for folder in _upwards(root / "cpu", path):
                quota = min(quota, _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")))
    return quota


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """A cgroup's folder and those around it, up to the root: in a container its own may be the root."""
    folder = root / path.strip("/")
    yield folder
    while folder != root and root in folder.parents:
        folder = folder.parent
        yield folder


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _ratio(quota: str = "", period: str = "") -> float:
    """CPUs of a quota in microseconds a period; infinite for "max", -1, or nothing."""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else math.inf
