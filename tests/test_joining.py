"""Which cluster a run joins or starts, and the errors where that cannot work."""

import math
import os
import resource
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from ray._private.utils import validate_socket_filepath

from rayllp.cluster import cpus, worker
from rayllp.cluster.cpus import cgroup_quota, usable_cpus
from rayllp.cluster.joining import FILES, PATIENT, _deaf_to_hangups, _environment, _explain, _joined, _raise_file_limit, check_address
from rayllp.cluster.worker import BlockWorker
from rayllp.errors import ClusterError, SettingsError
from rayllp.training.inputs import BuildContext, Network
from tests.conftest import tiny


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://head:8265", r"is the address of a job server.*ray job submit.*such as head:6379"),
        ("ray://head:10001", r"cannot reach it by ray://.*or as a job"),
        ("head", "head is not HOST:PORT.*or unset RAY_ADDRESS"),
        ("head:port", "head:port is not HOST:PORT"),
        ("/tmp/ray/session", "is not HOST:PORT"),
    ],
)
def test_what_is_no_address_of_a_cluster_is_refused_in_words(address, message):
    with pytest.raises(SettingsError, match=message):
        check_address(address)


def test_a_cluster_that_does_not_answer_is_named_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "{}:{}".format(*server.getsockname())
        check_address(address)
    with pytest.raises(ClusterError, match=rf"RAY_ADDRESS={address}: no cluster answers there \(Connection refused\)"):
        check_address(address)


def test_a_run_says_which_cluster_it_has_joined():
    nodes = [{"Resources": {"CPU": 8.0, "GPU": 2.0}}, {"Resources": {"CPU": 4.0}}]
    found = _joined({"gcs_address": "10.0.0.1:6379", "session_dir": "/tmp/ray/session_1"}, nodes)
    assert found == ("joined the Ray cluster at 10.0.0.1:6379, by RAY_ADDRESS: 2 nodes, 12 CPUs, 2 GPUs; its session is /tmp/ray/session_1")


def test_what_processes_are_started_with_is_the_users_where_it_is_set(monkeypatch):
    for name in PATIENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    before = dict(os.environ)
    with _environment(PATIENT):
        assert {**PATIENT, "OMP_WAIT_POLICY": "ACTIVE"}.items() <= os.environ.items()
    assert dict(os.environ) == before


def test_what_is_started_outlives_the_terminal():
    command = ["sh", "-c", "kill -HUP $$; echo still here"]
    with _deaf_to_hangups():
        assert subprocess.run(command, capture_output=True, text=True).stdout == "still here\n"
    assert subprocess.run(command, capture_output=True, text=True).returncode == -signal.SIGHUP


@pytest.mark.parametrize(("most", "workers", "threads"), [(8, 1, 6), (8, 2, 3), (2, 2, 2), (8, 7, 1)])
def test_workers_of_a_node_share_its_cpus(monkeypatch, most, workers, threads):
    before = torch.get_num_threads()
    monkeypatch.setattr(worker, "usable_cpus", lambda: 6)
    try:
        BlockWorker(0, tiny(), most).share_node(workers)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_long_path_of_rays_files_is_named_with_its_limit(monkeypatch, name):
    for other in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "/tmp/" + "long/" * 20)
    with pytest.raises(OSError, match="AF_UNIX") as raised:
        validate_socket_filepath(os.environ[name] + "ray/session_2026-01-01_00-00-00_000000_1/sockets/plasma_store")
    assert _explain(raised.value).startswith(f"{name}=/tmp/long/")
    assert "107 bytes" in _explain(raised.value)


def test_few_open_files_are_raised_as_far_as_the_system_lets_them_or_refused(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        _raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 512))
    with pytest.raises(ClusterError, match=r"may have 512 files open here \(ulimit -Hn\), and Ray needs about 1024: raise the limit"):
        _raise_file_limit()


# CPUs -------------------------------------------------------------------------------------------------------------------------------


def cgroups(folder, lines, files):
    (folder / "own").write_text(lines)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return cgroup_quota(folder, folder / "own")


@pytest.mark.parametrize(
    ("lines", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "200000 100000\n"}, 2.0),  # the pod's limit is the box's
        ("0::/not/seen/in/here\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("4:memory:/x\n3:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
    ],
)
def test_a_containers_share_of_the_cpus(tmp_path, lines, files, quota):
    assert cgroups(tmp_path, lines, files) == quota


def test_cpus_are_those_that_this_process_may_use(monkeypatch):
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, mine)
    monkeypatch.setattr(cpus, "bound_to", lambda: frozenset(range(16)))
    for quota, usable in ((3.5, 3), (0.5, 1), (math.inf, 16)):
        monkeypatch.setattr(cpus, "cgroup_quota", lambda quota=quota: quota)
        assert usable_cpus() == usable


def test_relative_paths_start_where_the_driver_is(tmp_path, monkeypatch):
    (tmp_path / "driver").mkdir()
    monkeypatch.chdir(tmp_path / "driver")
    context = BuildContext.of(Network(None))
    monkeypatch.chdir(tmp_path)  # as a worker of a cluster that was started here
    context.apply()
    assert Path.cwd() == tmp_path / "driver"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "driver").rmdir()  # another node
    context.apply()
    assert Path.cwd() == tmp_path
