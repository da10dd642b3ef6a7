"""Whole trainings in `mode: adaptive` beside exact ones and beside every fixed solve, on workers whose layers take a fixed time.

    python examples/benchmarks/never_slower.py [--workers 2] [--steps 300] [--layers 20] [--times 1ms 10ms]

Two kinds of device: one that takes as long for a part of the batch as for the whole (nothing is gained by microbatches), and one that takes
its share. Seconds are those of the steps alone, as the workers tell them: starts and evaluations are left out.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import rayllp
from rayllp.bench.emulated import Emulation, RandomBatches, emulated_stack
from rayllp.config import make_config
from rayllp.report import read_lines


def config(arguments: argparse.Namespace, **changes: Any) -> rayllp.TrainConfig:
    base = {
        "model": {"layers": arguments.layers, "width": 16}, "sequence_length": 16, "batch_size": 8, "steps": arguments.steps,
        "workers": arguments.workers, "snapshot_every": 0, "spare_workers": False, "timeline_every": 50,
        "eval": {"every": 0, "batches": 1, "sample": 0}, "checkpoint": {"best": False}, "optimizer": {"lr": 1e-4},
    }  # fmt: skip
    return make_config(base | changes)


def seconds(settings: rayllp.TrainConfig, times: Emulation, splits: bool) -> tuple[float, dict[str, int]]:
    """Of all steps together, and how many steps took which solve."""
    model = emulated_stack(settings, times, batch=settings.batch_size if splits else None)
    with tempfile.TemporaryDirectory() as folder:
        found = rayllp.train(settings, model=model, batches=RandomBatches(settings), output=Path(folder) / "run")
        metrics = list(read_lines(found.directory / "metrics.jsonl"))
    counts: dict[str, int] = {}
    for metric in metrics:
        name = metric["solve"] if metric["probed"] is None else "probes"
        counts[name] = counts.get(name, 0) + 1
    return sum(metric["step_time_s"] for metric in metrics), counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--times", nargs="+", default=["1ms", "10ms"])
    arguments = parser.parse_args()
    with rayllp.keep_workers(arguments.workers):
        for text in arguments.times:
            for splits in (False, True):
                times = Emulation.parse(text)
                parts = {} if splits else {"microbatches": 1}
                exact, _ = seconds(config(arguments, adaptive={"switch_at": 0}, **parts), times, splits)
                adaptive, counts = seconds(config(arguments, **parts), times, splits)
                fixed = {}
                for sweeps in ((1, 1), (2, 1)):
                    iterations = {"forward": sweeps[0], "backward": sweeps[1]}
                    solve = {"mode": "parallel", "windows": {"sweeps": iterations}}
                    solve["adaptive"] = {"probe_every": 0}
                    fixed["{}+{}".format(*sweeps)] = seconds(config(arguments, **solve, **parts), times, splits)[0]
                shown = ", ".join(f"{name} {value:.1f} s" for name, value in fixed.items())
                kind = "splits well" if splits else "cannot be split"
                over = f"{adaptive / exact:.3f} of exact, {adaptive / min(fixed.values()):.3f} of the fastest fixed solve"
                print(
                    f"layers of {text}, a batch that {kind}: exact {exact:.1f} s, {shown}, adaptive {adaptive:.1f} s {counts}: {over}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
