"""A node leaves a running cluster and comes back: how long does training pause, and what does its loss do?

    python examples/benchmarks/resize.py [--output runs/resize] [--steps 400] [--leave 100] [--return 200] [--set key=value …]

Starts a cluster of two nodes with two CPUs each, trains with `workers: {min: 2, max: 4}`, takes the second node away after step LEAVE and
gives it back after step RETURN. Prints the seconds of each resize, as the run's events.jsonl has them and as its metrics.jsonl shows
them (the longest pause between two steps), and the losses beside those of the same run left alone.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

import rayllp

DEFAULTS = ["workers={min: 2, max: 4}", "snapshot_every=1", "resize_check_s=1", "eval.every=0", "eval.sample=0", "checkpoint.best=false"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


class Watcher:
    """Takes a node away and gives it back at given steps."""

    def __init__(self, cluster: Cluster, node: Any, run: Path, leave: int, come_back: int) -> None:
        self.cluster, self.node, self.run_directory = cluster, node, run
        self.leave, self.come_back = leave, come_back
        self.left_at = self.came_at = 0.0
        self.steps: dict[int, float] = {}
        """When each step was last seen done."""
        self._position = 0

    def look(self) -> None:
        path = self.run_directory / "metrics.jsonl"
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as file:
            size = path.stat().st_size
            file.seek(0 if size < self._position else self._position)  # a roll-back makes it shorter
            lines = file.readlines()
            self._position = file.tell()
        done = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        self.steps |= dict.fromkeys(done, time.monotonic())
        if done and done[-1] >= self.leave and not self.left_at:
            self.left_at = time.monotonic()
            self.cluster.remove_node(self.node, allow_graceful=False)
        elif done and done[-1] >= self.come_back and not self.came_at:
            self.came_at = time.monotonic()
            self.node = self.cluster.add_node(num_cpus=2)


def train(output: Path, settings: list[str], leave: int | None, come_back: int) -> tuple[Path, Watcher | None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    node = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address)
    watcher = None if leave is None else Watcher(cluster, node, output, leave, come_back)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            rayllp.train(rayllp.load_config(None, settings), output=output)
        except BaseException as error:
            failures.append(error)

    # Nodes are started from the main thread: Ray installs signal handlers then. So it is training that moves to another.
    training = threading.Thread(target=work, daemon=True)
    try:
        training.start()
        while training.is_alive():
            if watcher is not None:
                watcher.look()
            time.sleep(0.02)
        if failures:
            raise failures[0]
    finally:
        ray.shutdown()
        cluster.shutdown()
    return output, watcher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--leave", type=int, default=100)
    parser.add_argument("--return", type=int, default=200, dest="come_back")
    parser.add_argument("--alone", action="store_true", help="only the run whose node leaves, without the one left alone beside it")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    output = arguments.output or Path(tempfile.mkdtemp(prefix="resize_"))
    settings = [*DEFAULTS, f"steps={arguments.steps}", *arguments.overrides]
    run, watcher = train(output / "resized", settings, arguments.leave, arguments.come_back)
    assert watcher is not None
    metrics, events = read(run / "metrics.jsonl"), read(run / "events.jsonl")
    print("| what | workers | seconds, by the run | steps lost | seconds from the node's change to the next finished step |")
    print("|---|---|---|---|---|")
    restores = {e["step"]: e for e in events if e["kind"] == "restore"}
    for event in (e for e in events if e["kind"] == "resize"):
        shrunk = event["workers"] < event["workers_before"]
        since = watcher.left_at if shrunk else watcher.came_at
        first = min((t for step, t in watcher.steps.items() if t > since and step >= event["step"]), default=float("nan"))
        whole = restores.get(event["step"], event)
        print(
            f"| {'node removed' if shrunk else 'node added'} | {event['workers_before']} to {event['workers']} | "
            f"{whole['seconds']:.1f} | {whole.get('steps_lost', 0)} | {first - since:.1f} |"
        )
    print("\nworkers by step:", spans([m["workers"] for m in metrics]))
    if not arguments.alone:
        left_alone, _ = train(output / "alone", settings, None, 0)
        pairs = list(zip(metrics, read(left_alone / "metrics.jsonl"), strict=True))
        gaps = [abs(a["loss"] - b["loss"]) for a, b in pairs]
        shown = ", ".join(f"{m['step'] + 1}: {m['loss']:.4f}/{n['loss']:.4f}" for m, n in pairs[49::50])
        print(f"loss, resized/alone: {shown}\nlargest difference of a step's loss: {max(gaps):.1e}")


def spans(values: list[int]) -> str:
    found: list[list[int]] = []
    for step, value in enumerate(values):
        if found and found[-1][2] == value:
            found[-1][1] = step
        else:
            found.append([step, step, value])
    return ", ".join(f"{first}–{last}: {value}" for first, last, value in found)


if __name__ == "__main__":
    main()
