"""Two hosts on one machine: each is a network namespace with a name, files and processes of its own; a cable (veth) joins them.

Needs root, iproute2 and util-linux. Nothing of a host is left once its processes have ended.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOKEN = secrets.token_hex(32)
PYTHON = sys.executable
RAY_PORT = 6379


def why_not() -> str | None:
    """Return why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"there is no {tool} (iproute2, util-linux)"
    name = f"rayllp{os.getpid()}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be had: {error.stderr.strip()}"
    return None


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


class Host:
    """A network, mount and UTS namespace, held by a process that sleeps.

    Its name resolves to 127.0.1.1, as on stock Debian and Ubuntu; a second interface leads nowhere.

    Attributes:
        address: its address on the cable.
        shared: a folder that both hosts see.
        own: the host's own folder, for temporary files and the home directory.
    """

    def __init__(self, number: int, base: Path) -> None:
        self.number, self.name, self.address = number, f"host{number}", f"10.77.0.{number}"
        self.shared, self.own = str(base / "shared"), str(base / "own")
        script = f"""
            set -e
            hostname {self.name}
            mount --make-rprivate /
            mount -t tmpfs tmpfs {self.own}
            mount -t tmpfs tmpfs /dev/shm
            mkdir {self.own}/home
            printf '127.0.0.1 localhost\\n127.0.1.1 {self.name}\\n' > {self.own}/hosts
            mount --bind {self.own}/hosts /etc/hosts
            ip link set lo up
            echo ready
            exec sleep infinity
        """
        self._holder = subprocess.Popen(["unshare", "--net", "--mount", "--uts", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n", f"{self.name} cannot be had"

    @property
    def pid(self) -> int:
        return self._holder.pid

    def command(self, *command: str) -> list[str]:
        """Return the command that runs the given one on this host."""
        return ["nsenter", "-t", str(self.pid), "--net", "--mount", "--uts", f"--wd={ROOT}", *command]

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_", "NCCL_", "PYTEST_"))}
        own = {
            "HOME": f"{self.own}/home", "TMPDIR": self.own, "RAY_TMPDIR": self.own, "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_raylet_start_wait_time_s": "120",
        }  # fmt: skip
        return kept | own | variables

    def run(self, *command: str, timeout_s: float = 120, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*command), env=self.environment(**variables), capture_output=True, text=True, timeout=timeout_s
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command} on {self.name}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def write(self, path: str, text: str) -> None:
        """Write a file on this host."""
        subprocess.run(self.command("tee", path), input=text, text=True, check=True, stdout=subprocess.DEVNULL, timeout=30)

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*command), env=self.environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )  # fmt: skip

    def rayllp(self, *arguments: str, timeout_s: float = 400, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `rayllp …` on this host, in the cluster of both hosts."""
        return self.run(PYTHON, "-m", "rayllp", *arguments, timeout_s=timeout_s, check=check, **_cluster(), **variables)

    def start_rayllp(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return self.start(PYTHON, "-m", "rayllp", *arguments, **_cluster(), **variables)

    def ray(self, *arguments: str, timeout_s: float = 120, **variables: str) -> None:
        """Run `ray …` on this host, by Python, since the environment's scripts may not be on its path."""
        self.run(PYTHON, "-c", "from ray.scripts.scripts import main; main()", *arguments, timeout_s=timeout_s, **variables)

    def ip(self, *arguments: str) -> None:
        self.run("ip", *arguments)

    def slow_down(self, rate: int) -> None:
        """Let no more than so many MB/s leave this host through the cable (tc's tbf, with the handle 1:)."""
        limits = ("rate", f"{8 * rate}mbit", "burst", "256kb", "latency", "50ms")
        self.run("tc", "qdisc", "add", "dev", "cable", "root", "handle", "1:", "tbf", *limits)

    def join(self, *options: str, cpus: int = 2, dashboard: bool = False, **variables: str) -> None:
        """Start Ray: the head on the first host; the others join it."""
        head = ["--head", f"--port={RAY_PORT}", f"--include-dashboard={dashboard}"]
        place = head if self.number == 1 else [f"--address=10.77.0.1:{RAY_PORT}"]
        here = [f"--node-ip-address={self.address}", f"--num-cpus={cpus}", "--object-store-memory=200000000", "--disable-usage-stats"]
        self.ray("start", *place, *here, *options, **variables)

    def cut(self) -> None:
        """Pull out the cable: whoever talks to this host gets no answer, not even that it is gone."""
        self.ip("link", "set", "cable", "down")

    def mend(self) -> None:
        """Plug in the cable again."""
        self.ip("link", "set", "cable", "up")

    def processes(self) -> list[int]:
        """Return all processes in this host's network, except the one that holds it."""
        mine, found = os.stat(f"/proc/{self.pid}/ns/net").st_ino, []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.stat(entry / "ns/net").st_ino == mine and int(entry.name) != self.pid:
                    found.append(int(entry.name))
        return found

    def leave(self) -> None:
        """End all processes of this host at once, as a power failure would."""
        for _ in range(50):
            found = self.processes()
            if not found:
                return
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def close(self) -> None:
        self.leave()
        self._holder.kill()
        self._holder.wait()


def _cluster() -> dict[str, str]:
    return {"RAY_ADDRESS": f"10.77.0.1:{RAY_PORT}"}


@contextlib.contextmanager
def hosts(count: int = 2) -> Iterator[Sequence[Host]]:
    """Two hosts with a cable between them; nothing runs on them yet."""
    with tempfile.TemporaryDirectory(prefix="h") as folder:  # a short name: sockets below it may have 107 bytes
        base = Path(folder)
        (base / "shared").mkdir()
        (base / "own").mkdir()
        found = [Host(number, base) for number in range(1, count + 1)]
        try:
            one, other = (str(host.pid) for host in found)
            ends = ("cable", "netns", one), ("cable", "netns", other)
            _run("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
            for host in found:
                host.ip("link", "add", "astray", "type", "veth", "peer", "name", "nowhere")
                for interface, address in (("astray", f"192.168.{host.number}.1/24"), ("cable", f"{host.address}/24")):
                    host.ip("addr", "add", address, "dev", interface)
                    host.ip("link", "set", interface, "up")
                host.ip("link", "set", "nowhere", "up")
            yield found
        finally:
            for host in found:
                host.close()
