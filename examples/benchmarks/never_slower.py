"""Whole trainings in `mode: adaptive` beside exact ones and beside fixed solves, on workers whose layers take a fixed time.

    python examples/benchmarks/never_slower.py [--workers 2] [--steps 300] [--layers 20] [--times 1ms 10ms]

Two kinds of device: one that takes as long for a part of the batch as for the whole (nothing is gained by microbatches), and one that takes
its share. Seconds are those of the steps alone, as the workers tell them: starts and evaluations are left out. Steps of a fixed solve take
equally long, so fewer of them are timed. A probe among them says whether the solve is accurate enough for `mode: adaptive`.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import rayllp
from rayllp.bench.emulated import Emulation, RandomBatches, emulated_stack
from rayllp.config import make_config
from rayllp.control.judgement import tolerated_bias
from rayllp.control.records import Probe
from rayllp.report import read_lines

FIXED: dict[str, dict[str, Any]] = {
    "1+1": {"sweeps": {"forward": 1, "backward": 1}},
    "2+1": {"sweeps": {"forward": 2, "backward": 1}},
    "rolling 0.03": {"tolerance": 0.03},
    "rolling 0.1": {"tolerance": 0.1},
    "rolling 0.3": {"tolerance": 0.3},
}
FIXED_STEPS = 60


def config(arguments: argparse.Namespace, **changes: Any) -> rayllp.TrainConfig:
    base = {
        "model": {"layers": arguments.layers, "width": 16}, "sequence_length": 16, "batch_size": 8, "steps": arguments.steps,
        "workers": arguments.workers, "snapshot_every": 0, "spare_workers": False, "timeline_every": 50,
        "eval": {"every": 0, "batches": 1, "sample": 0}, "checkpoint": {"best": False}, "optimizer": {"lr": 1e-4},
    }  # fmt: skip
    return make_config(base | changes)


def metrics_of(settings: rayllp.TrainConfig, times: Emulation, splits: bool) -> list[dict[str, Any]]:
    """What a run notes of its steps."""
    model = emulated_stack(settings, times, batch=settings.batch_size if splits else None)
    with tempfile.TemporaryDirectory() as folder:
        found = rayllp.train(settings, model=model, batches=RandomBatches(settings), output=Path(folder) / "run")
        return list(read_lines(found.directory / "metrics.jsonl"))


def seconds(metrics: list[dict[str, Any]]) -> float:
    """Of all steps together."""
    return sum(float(metric["step_time_s"]) for metric in metrics)


def fixed(
    arguments: argparse.Namespace, windows: dict[str, Any], parts: dict[str, Any], times: Emulation, splits: bool
) -> tuple[float, bool]:
    """Seconds of as many steps by a fixed solve, and whether it is accurate enough."""
    probes = {"probe_every": FIXED_STEPS - 1, "exact_every": 1}
    settings = config(arguments, mode="parallel", steps=FIXED_STEPS, windows=windows, adaptive=probes, **parts)
    metrics = metrics_of(settings, times, splits)
    plain = [float(metric["step_time_s"]) for metric in metrics[3:] if metric["probed"] is None]
    probe = next(metric for metric in reversed(metrics) if metric["bias"] is not None)
    found = Probe(bias=probe["bias"], noise=probe["noise"])
    return arguments.steps * sum(plain) / len(plain), probe["bias"] <= tolerated_bias(found, config(arguments), 0)


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
                exact = seconds(metrics_of(config(arguments, adaptive={"switch_at": 0}, **parts), times, splits))
                metrics = metrics_of(config(arguments, **parts), times, splits)
                adaptive = seconds(metrics)
                counts = Counter(metric["solve"] if metric["probed"] is None else "probes" for metric in metrics)
                others = {name: fixed(arguments, windows, parts, times, splits) for name, windows in FIXED.items()}
                shown = ", ".join(
                    f"{name} {value:.1f} s{'' if accurate else ' (inaccurate)'}" for name, (value, accurate) in others.items()
                )
                fastest = min(value for value, accurate in others.values() if accurate)
                kind = "splits well" if splits else "cannot be split"
                print(
                    f"layers of {text}, a batch that {kind}: exact {exact:.1f} s, {shown}, adaptive {adaptive:.1f} s {dict(counts)}: "
                    f"{adaptive / exact:.3f} of exact, {adaptive / fastest:.3f} of the fastest accurate fixed solve",
                    flush=True,
                )


if __name__ == "__main__":
    main()
