"""Peak memory of a step with and without recomputation from C-points.

    python examples/benchmarks/memory.py

A block of 64 GPT-2 layers on one worker, layer-parallel with c_f = 8, 1+1 iterations; each figure from a fresh process, above what that
process held before it built the network.
"""

import argparse
import json
import statistics
import subprocess
import sys

import torch
from peak import peak_bytes, reset_peak

import rayllp
from rayllp.channel import LocalChannel
from rayllp.control import Controller
from rayllp.data import load_data
from rayllp.engine import Engine
from rayllp.models import build_architecture

torch.set_num_threads(1)


def measure(recompute: bool) -> None:
    config = rayllp.make_config(
        {
            "workers": 1, "mode": "parallel", "model": {"layers": 64, "width": 128, "heads": 4}, "buffers": {"open": 0, "close": 0},
            "solver": "mgrit", "mgrit": {"coarsening": 8, "iterations": {"forward": 1, "backward": 1}}, "recompute": recompute,
            "sequence_length": 128, "batch_size": 16,
        }
    )  # fmt: skip
    text = load_data(config)
    reset_peak()
    before = peak_bytes()
    architecture = build_architecture(config, text.facts)
    engine = Engine(architecture, config, text, LocalChannel.alone(), LocalChannel.alone(), torch.device("cpu"))
    times = [engine.train_step(step, Controller(config).chosen).time_s for step in range(4)]
    print(json.dumps([peak_bytes() - before, statistics.median(times)]))


def run(kind: str) -> list[float]:
    return json.loads(subprocess.run([sys.executable, __file__, "--measure", kind], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=["keep", "recompute"], help=argparse.SUPPRESS)
    kind = parser.parse_args().measure
    if kind:
        measure(kind == "recompute")
    else:
        kept = None
        for kind in ("keep", "recompute"):
            peak, seconds = (statistics.median(column) for column in zip(*(run(kind) for _ in range(3)), strict=True))
            kept = kept or (peak, seconds)
            times = f"step {seconds:.3f} s ({seconds / kept[1]:.2f} x)"
            print(f"{kind:9} peak {peak / 2**20:5.0f} MiB ({kept[0] / peak:.2f} x less), {times}")
