"""Seconds of real work to the loss that exact training ends at: `mode: adaptive`, exact steps on as many workers, and one process.

    python examples/benchmarks/time_to_loss.py [CONFIG.yaml] [--set KEY=VALUE …] [--runs 3]

Without a config it is the embedded default. One process has as many threads as all workers together. Seconds are those of the steps alone,
as the workers tell them: starts and evaluations are left out. Each way is run in turn, several times.
"""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import rayllp
from rayllp.config import load_config
from rayllp.report import read_lines

WAYS = {
    "one process, exact": ["workers=1", "mode=serial"],
    "workers, exact": ["mode=serial"],
    "workers, adaptive": ["mode=adaptive"],
}


def curve(settings: rayllp.TrainConfig) -> list[tuple[float, float]]:
    """Seconds of steps and validation loss, at each evaluation of a training."""
    with tempfile.TemporaryDirectory() as folder:
        run = rayllp.train(settings, output=Path(folder) / "run").directory
        times = [metric["step_time_s"] for metric in read_lines(run / "metrics.jsonl")]
        return [(sum(times[: found["step"]]), found["loss"]) for found in read_lines(run / "evals.jsonl")]


def seconds_to(loss: float, points: Iterable[tuple[float, float]]) -> float | None:
    """When a training's validation loss is that low for the first time, between evaluations in proportion; None: never."""
    before: tuple[float, float] | None = None
    for now, found in points:
        if found <= loss:
            return now if before is None else before[0] + (now - before[0]) * (before[1] - loss) / (before[1] - found)
        before = now, found
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--within", type=float, default=0.1, help="per cent above that loss that count as having reached it")
    arguments = parser.parse_args()
    always = ["eval.every=20", "eval.sample=0", "checkpoint.best=false", "spare_workers=false", *arguments.set]
    found: dict[str, list[list[tuple[float, float]]]] = {way: [] for way in WAYS}
    workers = load_config(arguments.config, always).world
    with rayllp.keep_workers(workers):
        for _ in range(arguments.runs):
            for way, changes in WAYS.items():
                found[way].append(curve(load_config(arguments.config, [*always, *changes])))
    target = (1 + arguments.within / 100) * median(points[-1][1] for points in found["workers, exact"])
    print(f"\nto a validation loss of {target:.4f}, within {arguments.within:g} % of what exact training ends at, on {workers} workers:\n")
    print("| way | seconds, median (all) | last loss |\n|---|---|---|")
    for way, curves in found.items():
        reached = [second for points in curves if (second := seconds_to(target, points)) is not None]
        shown = f"{median(reached):.1f} ({', '.join(f'{second:.1f}' for second in reached)})" if reached else "never"
        print(f"| {way} | {shown} | {', '.join(f'{points[-1][1]:.4f}' for points in curves)} |")


if __name__ == "__main__":
    main()
