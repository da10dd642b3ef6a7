"""One GPU: what a step costs, and when sweeping the intervals side by side pays.

    python examples/benchmarks/gpu.py [--sizes small medium large] [--rounds 10] [--json FILE] [--device cpu]

64 layers of GPT-2 on one worker. A bare PyTorch loop over transformers' GPT-2; the engine in serial mode; layer-parallel with c_f = 8
and 1+1 or 2+1 iterations, interval after interval or side by side (`mgrit.batched`), each also with `compile`. Time a step (median, the
device synchronised around it), peak memory, and how far the losses of two ways that must agree are apart. At the small size a kernel's
launch takes longer than its work; at the large one the device is busy.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from plain import plain_gpt2, plain_step
from step import make_engine

import rayllp
from rayllp.channel import LocalChannel
from rayllp.config import TrainConfig
from rayllp.control import Controller
from rayllp.data import load_data

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"model": {"layers": 16, "width": 32, "heads": 2}, "sequence_length": 32, "batch_size": 2},
    "small": {"model": {"layers": 64, "width": 256, "heads": 4}, "sequence_length": 128, "batch_size": 2},
    "medium": {"model": {"layers": 64, "width": 768, "heads": 12}, "sequence_length": 512, "batch_size": 4, "dtype": "bfloat16"},
    "large": {"model": {"layers": 64, "width": 1280, "heads": 20}, "sequence_length": 1024, "batch_size": 4, "dtype": "bfloat16"},
}
SERIAL: dict[str, Any] = {"mode": "serial"}


def parallel(forward: int, backward: int, *, batched: bool = False) -> dict[str, Any]:
    mgrit = {"coarsening": 8, "iterations": {"forward": forward, "backward": backward}, "batched": batched}
    return {"mode": "parallel", "solver": "mgrit", "mgrit": mgrit}


WAYS: dict[str, dict[str, Any]] = {
    "bare loop": {},
    "serial": SERIAL,
    "1+1": parallel(1, 1),
    "1+1, side by side": parallel(1, 1, batched=True),
    "2+1": parallel(2, 1),
    "2+1, side by side": parallel(2, 1, batched=True),
    "bare loop, compiled": {"compile": True},
    "serial, compiled": SERIAL | {"compile": True},
    "1+1, side by side, compiled": parallel(1, 1, batched=True) | {"compile": True},
}
AGREE = [("1+1", "1+1, side by side"), ("2+1", "2+1, side by side"), ("serial", "serial, compiled")]


def settings(size: str, **changes: Any) -> TrainConfig:
    alone = {"workers": 1, "buffers": {"open": 0, "close": 0}, "adaptive": {"probe_every": 0}}
    return rayllp.make_config({**alone, "mode": "serial", **SIZES[size], **changes})


def ours(config: TrainConfig, device: torch.device) -> Callable[[int], float]:
    engine, accuracy = make_engine(config, LocalChannel.alone(), device), Controller(config).chosen
    return lambda step: engine.train_step(step, accuracy).loss


def bare(config: TrainConfig, device: torch.device) -> Callable[[int], float]:
    text = load_data(config)
    model = plain_gpt2(config, text.tokenizer.vocabulary).to(device)
    if config.compile:
        for layer in model.transformer.h:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reduced = torch.autocast(device.type, torch.bfloat16) if config.dtype == "bfloat16" else nullcontext()

    def step(n: int) -> float:
        inputs, targets = text.batch("train", n, config.batch_size)
        with reduced:
            return plain_step(model, optimizer, config, n, inputs.to(device), targets.to(device))

    return step


def clocked(step: Callable[[int], float], n: int, device: torch.device) -> tuple[float, float]:
    """Seconds of step n, and its loss."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    loss = step(n)
    wait()
    return time.perf_counter() - started, loss


def measure(size: str, way: str, rounds: int, device: torch.device) -> dict[str, Any]:
    config = settings(size, **WAYS[way])
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = (bare if way.startswith("bare") else ours)(config, device)
    found = [clocked(step, n, device) for n in range(rounds + 3)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    seconds = [taken for taken, _ in found[3:]]
    return {
        "size": size, "way": way, "seconds": statistics.median(seconds), "spread": max(seconds) - min(seconds), "first": found[0][0],
        "peak_bytes": peak, "losses": [loss for _, loss in found],
    }  # fmt: skip


def serial_over_bare(size: str, rounds: int, device: torch.device) -> float:
    """Median ratio of neighbouring steps."""
    a, b = ours(settings(size), device), bare(settings(size), device)
    ratios = []
    for n in range(rounds + 3):
        pair = [clocked(step, n, device)[0] for step in ((a, b) if n % 2 else (b, a))]
        mine, theirs = pair if n % 2 else pair[::-1]
        ratios.append(mine / theirs)
    return statistics.median(ratios[3:])


def rows(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| size | way | step, ms | of the bare loop | peak memory, GB | first step, s |"
    yield "|---|---|---|---|---|---|"
    bares = {r["size"]: r["seconds"] for r in results if r["way"] == "bare loop"}
    for r in results:
        share = f"{r['seconds'] / bares[r['size']]:.3f}" if r["size"] in bares else ""
        cells = (r["size"], r["way"], f"{1e3 * r['seconds']:.2f}", share, f"{r['peak_bytes'] / 1e9:.2f}", f"{r['first']:.1f}")
        yield "| " + " | ".join(cells) + " |"


def apart(results: list[dict[str, Any]]) -> Iterator[str]:
    losses = {(r["size"], r["way"]): r["losses"] for r in results}
    for size in dict.fromkeys(r["size"] for r in results):
        for one, other in AGREE:
            if (size, one) in losses and (size, other) in losses:
                pairs = list(zip(losses[size, one], losses[size, other], strict=True))
                most = max(abs(a - b) for a, b in pairs)
                yield f"{size}: losses of {one!r} and {other!r} over {len(pairs)} steps at most {most:.1e} apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "medium", "large"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: --device cpu runs the same, for what that tells")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch", torch.__version__, flush=True)
    results: list[dict[str, Any]] = []
    for size in arguments.sizes:
        ratio = serial_over_bare(size, 2 * arguments.rounds, device)
        print(f"{size}: serial over the bare loop, step by step in turn: {ratio:.3f}", flush=True)
        for way in arguments.ways:
            try:
                results.append(measure(size, way, arguments.rounds, device))
                print(f"{size}, {way}: {1e3 * results[-1]['seconds']:.2f} ms", flush=True)
            except torch.OutOfMemoryError as error:
                print(f"{size}, {way}: out of memory: {error}", flush=True)
    for line in (*rows(results), *apart(results)):
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
