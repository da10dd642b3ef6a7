"""How many CPUs this process may use, given its CPU affinity and the CPU quota of its container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Return the number of CPUs this process may use, at least 1.

    It is limited by CPU affinity (taskset, Slurm, an MPI launcher) and by the quota of this process's cgroup (Docker, Kubernetes).
    """
    return max(1, int(min(len(bound_to()), cgroup_quota())))


def bound_to() -> frozenset[int]:
    """Return the CPUs that this process is bound to."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cgroup_quota(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the CPU time that the cgroups of this process allow, in CPUs; infinite without a limit.

    Args:
        root: where cgroups are mounted.
        own: file that lists the cgroups of this process, as `0::/PATH` (version 2) or `3:cpu,cpuacct:/PATH` (version 1).
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
    """Yield a cgroup's folder and its parents up to the root. In a container the root may be the cgroup's own folder."""
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
    """Return the CPUs that a quota (microseconds per period) allows; infinite for "max", -1 or nothing."""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else math.inf
