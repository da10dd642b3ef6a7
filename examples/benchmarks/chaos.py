"""A run under `rayllp chaos`: does it reach its last step, and what does it leave behind?

    python examples/benchmarks/chaos.py [--for 15m] [--mtbf 20s] [--workers 3] [--steps 9000] [--output DIR]

A Ray cluster on this machine, a small GPT-2, and `rayllp chaos` in a process of its own, which kills workers at random. Figures are taken
of the cluster and of this process (the driver of the run) when training is under way, now and then, and after the last step.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import ray
from ray.util.placement_group import placement_group_table
from recovery import descendants, tail

import rayllp

SAMPLE_S = 30.0


def memory_mb(pid: int) -> float:
    """Resident and not shared with other processes, as Ray's object store is; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def listening(pids: set[int]) -> int:
    """TCP ports that these processes listen on."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(entry)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        fields = [line.split() for line in Path(table).read_text(encoding="utf-8").splitlines()[1:]]
        found += sum(field[3] == "0A" and field[9] in inodes for field in fields)
    return found


def figures(run: Path) -> dict[str, Any]:
    """What is there now: of the cluster, of this process, and of the run's workers."""
    actors = [actor for actor in ray._private.state.actors().values() if actor["State"] not in ("DEAD",)]
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    mine, below = os.getpid(), descendants(os.getpid())
    workers = {actor["Pid"] for actor in actors if actor["Pid"]}
    oldest = min(workers, key=lambda pid: Path(f"/proc/{pid}/stat").stat().st_ctime if Path(f"/proc/{pid}").exists() else 1e18, default=0)
    lines = tail(run / "metrics.jsonl")
    return {
        "step": lines[-1]["step"] + 1 if lines else 0, "actors": len(actors), "placement groups": len(groups),
        "processes": len(below), "listening ports": listening({mine, *below}),
        "driver files": len(list(Path("/proc/self/fd").iterdir())), "driver threads": threading.active_count(),
        "driver MB": round(memory_mb(mine)), "oldest worker": oldest, "oldest worker MB": round(memory_mb(oldest)) if oldest else 0,
        "files in the run": sum(1 for path in run.rglob("*") if path.is_file()),
        "cores": ray.available_resources().get("CPU", 0),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--for", default="15m", dest="length")
    parser.add_argument("--mtbf", default="20s")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    run = (arguments.output or Path(tempfile.mkdtemp(prefix="chaos_"))) / "run"
    config = rayllp.make_config(
        {
            "workers": arguments.workers, "steps": arguments.steps, "mode": "parallel", "max_failures": 1_000_000, "device": "cpu",
            "model": {"layers": 4 * arguments.workers + 4, "width": 64, "heads": 4}, "sequence_length": 64, "batch_size": 12,
            "eval": {"every": 0, "sample": 0}, "checkpoint": {"every": 200, "best": False}, "adaptive": {"probe_every": 0},
        }
    )  # fmt: skip
    context = ray.init(address="local", num_cpus=arguments.workers + 1, include_dashboard=False, logging_level="ERROR")
    before, over = figures(run), threading.Event()
    found: list[dict[str, Any]] = []

    def watch() -> None:
        while not over.is_set() and len(tail(run / "metrics.jsonl")) < 30:
            time.sleep(0.5)
        found.append(figures(run))
        environment = {**os.environ, "RAY_ADDRESS": context.address_info["address"]}
        command = [sys.executable, "-m", "rayllp", "chaos", str(run), "--mtbf", arguments.mtbf, "--seed", arguments.seed]
        chaos = subprocess.Popen([*command, "--for", arguments.length], env=environment, stdout=subprocess.DEVNULL)
        while not over.wait(SAMPLE_S):
            if chaos.poll() is None:
                found.append(figures(run))
        chaos.wait(60)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        result = rayllp.train(config, output=run)
    finally:
        over.set()
    took = time.monotonic() - began
    watcher.join()
    time.sleep(5)  # processes end
    after = figures(run)
    rows = [("before the run", before), ("training, before the first kill", found[0]), ("under chaos, last", found[-1]), ("after", after)]
    names = list(before)
    print("| | " + " | ".join(names) + " |\n" + "|---" * (1 + len(names)) + "|")
    for title, row in rows:
        print(f"| {title} | " + " | ".join(str(row[name]) for name in names) + " |")
    for name in ("driver files", "driver threads", "driver MB", "processes", "listening ports"):
        print(f"{name} while training: {[row[name] for row in found]}")
    struck = [json.loads(line) for line in (run / "chaos.jsonl").read_text(encoding="utf-8").splitlines()]
    restores = [
        event for event in map(json.loads, (run / "events.jsonl").read_text(encoding="utf-8").splitlines()) if event["kind"] == "restore"
    ]
    seconds = sorted(event["seconds"] for event in restores)
    sources = {source: sum(event["source"] == source for event in restores) for source in {event["source"] for event in restores}}
    print(
        f"{result.steps} steps in {took / 60:.1f} min; {len(struck)} killed; {len(restores)} recoveries {sources}, "
        f"median {median(seconds):.2f} s, longest {seconds[-1]:.2f} s; {sum(event['steps_lost'] for event in restores)} steps done again; "
        f"peak memory of the driver {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    )
    ray.shutdown()
    print("processes left:", len(descendants(os.getpid())))


if __name__ == "__main__":
    main()
