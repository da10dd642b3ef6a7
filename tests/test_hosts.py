"""Two hosts with networks, names and files of their own (tests/hosts.py): training over both, and the errors where they do not fit.

One test belongs to the suite; the others take minutes: `pytest -m hosts tests/test_hosts.py`.
"""

import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.conftest import losses_over_threads, tiny
from tests.hosts import PYTHON, ROOT, Host, hosts, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
SETTINGS = {"mode": "serial", "steps": 6, "workers": 2}


@pytest.fixture
def pair() -> Iterator[tuple[Host, Host]]:
    """Two hosts without Ray."""
    with hosts() as (one, other):
        yield one, other


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Host, Host]]:
    """Two hosts that form one cluster, with one CPU each, so that two workers are on two hosts."""
    with hosts() as (one, other):
        one.join(cpus=1)
        other.join(cpus=1)
        yield one, other


def write(host: Host, **changes: Any) -> list[str]:
    """Write a small config to the shared folder; return the arguments of `rayllp train` with it, and a directory of its own."""
    settings = tiny(**SETTINGS | changes).model_dump(mode="json", exclude_unset=True)
    name = f"{host.shared}/{time.monotonic_ns()}"
    host.write(f"{name}.yaml", yaml.safe_dump(settings))
    return ["train", f"{name}.yaml", "--output", f"{name}_run"]


def records(host: Host, run: str, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in host.run("cat", f"{run}/{name}.jsonl").stdout.splitlines()]


def losses(host: Host, run: str) -> list[float]:
    return [metric["loss"] for metric in records(host, run)]


def expected(**changes: Any) -> list[float]:
    """Return the losses with the same settings and workers that are threads of this process."""
    config = tiny(**SETTINGS | changes)
    return losses_over_threads(config, config.steps)


# In the suite ---------------------------------------------------------------------------------------------------------------------


def test_two_hosts_train_one_network(cluster):
    """They do although their names resolve to the loopback address, and another interface leads nowhere."""
    one, _ = cluster
    command = write(one)
    one.rayllp(*command)
    assert losses(one, command[-1]) == pytest.approx(expected(), rel=1e-12)


# Every way to train ---------------------------------------------------------------------------------------------------------------


@pytest.mark.hosts
def test_storage_that_they_do_not_share_is_refused(cluster):
    one, _ = cluster
    command = write(one)
    refused = one.rayllp(*command[:-1], f"{one.own}/run", check=False)
    assert refused.returncode != 0
    assert f"host2 (10.77.0.2) does not share {one.own}/run/checkpoints with this host (FileNotFoundError: No such" in refused.stderr
    assert "run" not in one.run("ls", one.own).stdout.split()


@pytest.mark.hosts
def test_a_run_goes_on_from_its_checkpoint_on_the_other_host(cluster):
    one, other = cluster
    command = write(one, steps=4)
    one.rayllp(*command)
    other.rayllp("train", "--resume", command[-1], "--set", "steps=8")
    whole = write(one, steps=8)
    one.rayllp(*whole)
    assert len(losses(one, command[-1])) == 8
    assert losses(one, command[-1])[:4] == losses(one, whole[-1])[:4]


@pytest.mark.hosts
@pytest.mark.parametrize("mode", ["parallel", "adaptive"])
def test_states_travel_by_mpi(cluster, mode):
    one, _ = cluster
    command = write(one, channel="mpi", mode=mode)
    one.rayllp(*command)
    assert losses(one, command[-1]) == pytest.approx(expected(mode=mode), rel=1e-12)


@pytest.mark.hosts
def test_processes_of_mpis_launcher(pair):
    """MPICH's `mpiexec` reaches the other host by a stand-in for ssh."""
    one, other = pair
    shell = f"{one.shared}/shell"
    text = f"""#!/bin/sh
case "$*" in *{other.address}*) pid={other.pid};; *) pid={one.pid};; esac
while [ "$1" != "{other.address}" ] && [ "$1" != "{one.address}" ]; do shift; done
shift
exec nsenter -t $pid --net --mount --uts sh -c "$*"
"""
    one.write(shell, text)
    one.run("chmod", "+x", shell)
    command = write(one)
    launch = [PYTHON.replace("/python", "/mpiexec"), "-launcher", "ssh", "-launcher-exec", shell]
    places = ["-hosts", f"{one.address},{other.address}", "-ppn", "1", "-iface", "cable", "-n", "2"]
    one.run(*launch, *places, PYTHON, "-m", "rayllp", *command, "--launcher", "mpi", timeout_s=400)
    assert losses(one, command[-1]) == pytest.approx(expected(), rel=1e-12)


@pytest.mark.hosts
def test_a_sweep(cluster):
    one, _ = cluster
    sweep = {
        "name": "two", "settings": {"model.layers": 12, "model.width": 16, "steps": 4, "workers": 1, "mode": "serial", "eval.every": 2},
        "space": {"optimizer.lr": {"choice": [1e-3, 2e-3]}}, "objective": {"kind": "loss"}, "trials": 2, "concurrent": 2,
    }  # fmt: skip
    one.write(f"{one.shared}/sweep.yaml", yaml.safe_dump(sweep))
    one.rayllp("tune", f"{one.shared}/sweep.yaml", "--output", f"{one.shared}/sweep", timeout_s=300)
    assert "optimizer" in one.run("cat", f"{one.shared}/sweep/best.yaml").stdout


@pytest.mark.hosts
def test_a_job(pair):
    one, other = pair
    one.join(cpus=1, dashboard=True)
    other.join(cpus=1)
    command = write(one)
    submit = ["job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", one.shared, "--", PYTHON, "-m", "rayllp", *command]
    one.ray(*submit, timeout_s=300)
    assert losses(one, command[-1]) == pytest.approx(expected(), rel=1e-12)


# Hosts that vanish ----------------------------------------------------------------------------------------------------------------


def follow(host: Host, run: str, step: int, limit_s: float) -> float:
    """Wait until a run has done this many steps; return how many seconds that took."""
    began = time.monotonic()
    while time.monotonic() < began + limit_s:
        found = host.run("sh", "-c", f"tail -n 1 {run}/metrics.jsonl 2>/dev/null", check=False).stdout
        if found.endswith("\n") and json.loads(found)["step"] >= step - 1:
            return time.monotonic() - began
        time.sleep(0.2)
    raise AssertionError(f"{step} steps were not done within {limit_s} s: {found}")


@pytest.mark.hosts
def test_a_host_is_cut_off_for_a_minute(pair):
    """No connection is reset, messages just stop. The run goes on with the other host, and takes this one back later."""
    one, other = pair
    for host in (one, other):
        host.join(cpus=2)
    size = {"model": {"layers": 12, "width": 96, "heads": 2}, "sequence_length": 64, "batch_size": 16}
    # With their number set, two workers and four sum the same microbatches in the same order.
    changes = {"steps": 200, "workers": {"min": 2, "max": 4}, "hang_timeout_s": 5, "resize_check_s": 1, "microbatches": 8, **size}
    command = write(one, **changes)
    run = command[-1]
    training = one.start_rayllp(*command)
    try:
        follow(one, run, 20, 200)
        reached = len(losses(one, run))
        other.cut()
        alone = follow(one, run, reached + 5, 120)
        time.sleep(max(0.0, 60 - alone))
        other.leave()
        other.mend()
        other.join(cpus=2)
        text, _ = training.communicate(timeout=600)
    finally:
        training.kill()
    assert training.returncode == 0, text
    sizes = [metric["workers"] for metric in records(one, run)]
    print(f"cut at step {reached}; going on after {alone:.1f} s; workers {sizes[0]} → {min(sizes)} → {sizes[-1]}")
    print("\n".join(line for line in text.splitlines() if re.match("step [0-9]+: ", line)))
    assert (sizes[0], min(sizes), sizes[-1]) == (4, 2, 4)
    undisturbed = write(one, **changes | {"workers": 4})
    one.rayllp(*undisturbed)
    assert losses(one, run) == losses(one, undisturbed[-1])


@pytest.mark.hosts
def test_workers_are_killed_on_either_host(cluster):
    """Measures ten times how many seconds pass from the kill to the next finished step."""
    one, other = cluster
    command = write(one, steps=4000, max_failures=100, spare_workers=True)
    run = command[-1]
    training = one.start_rayllp(*command)
    found = []
    try:
        follow(one, run, 10, 120)
        time.sleep(15)  # spares
        for number in range(10):
            host = (one, other)[number % 2]
            before = len(losses(one, run))
            (victim, *_) = host.run("pgrep", "-f", "ray::BlockWorker.run").stdout.split()
            began = time.monotonic()
            host.run("kill", "-9", victim)
            follow(one, run, before + 1, 60)
            while not (faults := [event for event in records(one, run, "events") if event["kind"] == "restore"])[number:]:
                time.sleep(0.1)
            follow(one, run, faults[number]["step"] + 1, 60)
            found.append(time.monotonic() - began)
            time.sleep(8)
    finally:
        training.send_signal(signal.SIGKILL)
    found.sort()
    print(f"kill to next finished step: median {(found[4] + found[5]) / 2:.1f} s, worst {found[-1]:.1f} s: {[round(s, 1) for s in found]}")
    assert found[-1] < 60


@pytest.mark.hosts
def test_a_slow_link(cluster):
    """On a link of 80 Mbit/s whose queue drops packets, training is slower, and still right."""
    one, other = cluster
    for host in (one, other):
        host.run("tc", "qdisc", "add", "dev", "cable", "root", "tbf", "rate", "80mbit", "burst", "16kb", "limit", "32kb")
    try:
        command = write(one)
        one.rayllp(*command)
        found = one.rayllp("doctor", check=False)
    finally:
        for host in (one, other):
            host.run("tc", "qdisc", "del", "dev", "cable", "root")
    assert losses(one, command[-1]) == pytest.approx(expected(), rel=1e-12)
    assert found.returncode == 1
    assert "0.01 GB/s; make sure that gloo uses the fast interface" in found.stdout


# What is said ---------------------------------------------------------------------------------------------------------------------


def said(host: Host, *command: str, **variables: str) -> str:
    done = host.rayllp(*command, check=False, **variables)
    assert done.returncode != 0
    found = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("to fix", "ClusterError", "RendezvousError"))]
    print(*found, sep="\n")
    return "\n".join(found)


@pytest.mark.hosts
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_wish_that_fits_no_interface(pair, command):
    one, other = pair
    one.join(cpus=1)
    other.join(cpus=1, GLOO_SOCKET_IFNAME="eth9")
    found = said(one, *(write(one) if command == "train" else ["doctor"]))
    assert "GLOO_SOCKET_IFNAME=eth9 on host2 fits none of its interfaces (astray, cable, lo, nowhere): unset it" in found


@pytest.mark.hosts
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_firewall(pair, command):
    """Only Ray's own ports are open: enough for a cluster, but not for a process group."""
    one, other = pair
    fixed = ["--min-worker-port=20000", "--max-worker-port=20099", "--node-manager-port=20100", "--object-manager-port=20101"]
    agents = ["--dashboard-agent-grpc-port=20102", "--dashboard-agent-listen-port=20103", "--metrics-export-port=20104"]
    for host, ports in ((one, "50000-59000"), (other, "40000-49000")):
        host.run("sh", "-c", f"echo '{ports.replace('-', ' ')}' > /proc/sys/net/ipv4/ip_local_port_range")
        host.join(*fixed, *agents, cpus=1)
    one.ip("rule", "add", "ipproto", "tcp", "sport", "50000-59000", "dport", "40000-49000", "blackhole")
    found = said(one, *(write(one) if command == "train" else ["doctor"]))
    assert "does not reach 10.77.0." in found
    assert "open TCP between all nodes on all ports" in found


@pytest.mark.hosts
def test_what_the_doctor_says_of_storage_that_is_not_shared(cluster):
    one, _ = cluster
    found = said(one, "doctor", "--path", one.own)
    assert "host2 cannot use the shared path (FileNotFoundError: No such file or directory): mount it there" in found


@pytest.mark.hosts
def test_what_the_doctor_says_of_other_versions_and_clocks(pair):
    """The other host's Python finds another version of safetensors, and a clock that is a minute ahead."""
    one, other = pair
    odd = f"{other.own}/odd"
    facts = f"{odd}/safetensors-0.0.9.dist-info"
    other.run("sh", "-c", f"mkdir -p {facts}; printf 'Name: safetensors\\nVersion: 0.0.9\\n' > {facts}/METADATA")
    other.run("sh", "-c", f"printf 'import time\\nnow = time.time\\ntime.time = lambda: now() + 60\\n' > {odd}/sitecustomize.py")
    one.join(cpus=1)
    other.join(cpus=1, PYTHONPATH=f"{odd}:{ROOT}")
    found = said(one, "doctor")
    assert "safetensors differs (" in found
    assert "host2 0.0.9" in found
    assert "the clock of host2 is +6" in found
    assert "run a time service (chrony, ntpd) on every node" in found


@pytest.mark.hosts
def test_a_full_disk_on_the_other_host(cluster):
    """There is no room for the other host's part of a checkpoint."""
    one, other = cluster
    one.run("mkdir", "-p", f"{one.shared}/full")
    other.run("sh", "-c", f"mount -t tmpfs -o size=4k,nr_inodes=2 tmpfs {one.shared}/full")
    try:
        found = said(one, "doctor", "--path", f"{one.shared}/full")
    finally:
        other.run("umount", f"{one.shared}/full")
    assert "host2 cannot use the shared path" in found
