"""How long can training stay layer-parallel, and what does it cost in loss? Serial, parallel, the paper's switch, and ours.

    python examples/fidelity.py run --data DATA --output runs/fidelity --results docs/fidelity.json [--networks …] [--ways …] [--seeds …]
    python examples/fidelity.py report --results docs/fidelity.json --docs docs

`run` trains what RESULTS does not have yet, each run on one worker and one core (the number of workers changes nothing but the time:
tests/test_engine.py), `--jobs` at a time, and adds to RESULTS. `report` writes the table and the pictures. DATA holds
tinyshakespeare/input.txt.gz and ud_english_gum/ (see NETWORKS). Validation losses are those of the exact forward. The ways in
ABLATIONS (`--ways ablations`) are layer-parallel without a controller, with one thing changed in each.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).parent
SHAKESPEARE = {"data.path": "tinyshakespeare/input.txt.gz"}
GUM = "ud_english_gum/en_gum-ud-"
TREEBANK = {"data.path": GUM + "train.slim.conllu.gz", "data.validation_path": GUM + "dev.slim.conllu.gz"}
STEPS = 2000
STOPS = (500, 1000, 2000)


@dataclass(frozen=True)
class Network:
    """A config of this folder, the files it reads below DATA, settings, and what is asked of its runs."""

    title: str
    config: str
    files: dict[str, str]
    settings: tuple[str, ...]
    ours: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)


# With intervals of two layers little of the penalty is needed, and one iteration of each goes far. All else is the default: a bias
# below 0.4 of the gradient's noise is let be, the penalty holds it there, and the last fifth of the steps is exact.
FINE = ("mgrit.coarsening=2", "adaptive.ladder=[1+1,2+1,2+2,3+3]")
WITHOUT = ("buffers.open=0", "buffers.close=0")
NETWORKS = {
    "buffered": Network(
        "GPT-2, 2 + 16 + 2, h = 1/N",
        "gpt2_shakespeare",
        SHAKESPEARE,
        ("model.layers=20",),
        ("mgrit.coarsening=2", "adaptive.ladder=[1+1,2+1,2+2]"),
        (0, 1, 2),
    ),
    "standard": Network("GPT-2, 16, h = 1", "gpt2_shakespeare", SHAKESPEARE, ("step.middle=1", *WITHOUT), FINE, (0, 1, 2)),
    "unbuffered": Network("GPT-2, 16, h = 1/N", "gpt2_shakespeare", SHAKESPEARE, WITHOUT, FINE, (0, 1, 2)),
    "deep": Network("GPT-2, 2 + 64 + 2, h = 1/N", "gpt2_shakespeare", SHAKESPEARE, ("model.layers=68",), FINE),
    "bert": Network("BERT, 16, h = 1/N", "bert_shakespeare", SHAKESPEARE, ("model.layers=16",), FINE),
    "mc": Network("word classification, 16, h = 1/N", "mc_gum", TREEBANK, ("model.layers=16",), FINE),
}
CHEAP = ("mgrit.iterations.forward=1", "mgrit.iterations.backward=1", "adaptive.probe_every=50", "adaptive.exact_every=2")
BY_RHO = ("adaptive.rule=convergence", "adaptive.switch_at=1.0")
WAYS = {
    "serial": ("mode=serial",),
    "parallel": ("mode=parallel", *CHEAP, *BY_RHO),
    "paper": ("mode=adaptive", *CHEAP, *BY_RHO, "adaptive.ladder=[1+1]", "adaptive.return_below=null"),
    "default": ("mode=adaptive", "mgrit.iterations.forward=2", "mgrit.iterations.backward=1", "adaptive.probe_every=100"),
    "ours": ("mode=adaptive", *CHEAP),
}
TWICE, THRICE = (
    ("mgrit.iterations.forward=2", "mgrit.iterations.backward=2"),
    ("mgrit.iterations.forward=3", "mgrit.iterations.backward=3"),
)
ABLATIONS = {
    "1+1": (),
    "1+1, μ = 1": ("adaptive.consistency=1",),
    "1+1, μ = 10": ("adaptive.consistency=10",),
    "1+1, ω = 0.5": ("mgrit.coarse_step_weight=0.5",),
    "1+1, smoothness 1e-4": ("adaptive.smoothness=1e-4",),
    "1+1, μ = 1, smoothness 1e-4": ("adaptive.consistency=1", "adaptive.smoothness=1e-4"),
    "2+2": TWICE,
    "2+2, μ = 1": (*TWICE, "adaptive.consistency=1"),
    "2+2, FCF": (*TWICE, "mgrit.relaxation.fine=FCF"),
    "3+3": THRICE,
}
# Measured, then taken out of rayllp: none earned its place. RESULTS has their runs.
DROPPED = (
    "1+1, μ = 1, noise 0.1",
    "1+1, ω fitted",
    "1+1, μ = 1, ω fitted",
    "2+2, FCF, C-relaxation 0.7",
    "3+3, Anderson 2",
)


def overrides(name: str, way: str, seed: int, data: Path, steps: int) -> list[str]:
    network = NETWORKS[name]
    files = [f"{setting}={data / path}" for setting, path in network.files.items()]
    always = [
        f"steps={steps}",
        f"seed={seed}",
        "workers=1",
        "checkpoint.best=false",
        "snapshot_every=0",
        "eval.every=250",
        "eval.sample=0",
        "eval.batches=40",
    ]
    chosen = WAYS[way] if way in WAYS else (*WAYS["parallel"], *ABLATIONS[way])
    return [*files, *always, *network.settings, *chosen, *(network.ours if way == "ours" else ())]


# Running ----------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(name: str, way: str, seed: int, data: Path, output: Path, steps: int) -> dict[str, Any]:
    """One run in a process of its own; what the study keeps of it."""
    run = output / re.sub(r"\W+", "_", f"{name}_{way}_{seed}_{steps}")
    if not (run / "evals.jsonl").exists() or read(run / "evals.jsonl")[-1]["step"] < steps:
        command = [sys.executable, "-m", "rayllp", "train", str(HERE / f"{NETWORKS[name].config}.yaml"), "--output", str(run)]
        for setting in overrides(name, way, seed, data, steps):
            command += ["--set", setting]
        log = output / f"{run.name}.log"
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if code:
            raise SystemExit(f"{run.name} failed: {log.read_text(encoding='utf-8')[-800:]}")
    return summary(run) | {"network": name, "way": way, "seed": seed, "steps": steps}


def summary(run: Path) -> dict[str, Any]:
    metrics, evaluations = read(run / "metrics.jsonl"), read(run / "evals.jsonl")
    probes = [m for m in metrics if m["rho_backward"] is not None or m["bias"] is not None]
    kept = ("step", "rho_forward", "rho_backward", "bias", "bias_against", "cosine", "noise", "consistency", "consistency_weight")
    switches = [e for e in read(run / "events.jsonl") if e["kind"] == "switch"]
    return {
        "loss": evaluations[-1]["loss"],
        "curve": [(e["step"], round(e["loss"], 5)) for e in evaluations],
        "training": [(m["step"], round(m["loss"], 4)) for m in metrics[::10]],
        "parallel": sum(m["mode"] == "parallel" for m in metrics) / len(metrics),
        "rungs": rung_shares(metrics),
        "probes": [{key: rounded(probe[key]) for key in kept if probe.get(key) is not None} for probe in probes],
        "switches": [{"step": e["step"], "rung": e["rung"], "reason": e["reason"]} for e in switches],
        "metrics": {key: value for key, value in evaluations[-1].items() if isinstance(value, float) and key != "loss"},
    }


def rung_shares(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the steps at each pair of iterations; probes count as the step before them."""
    shares: dict[str, float] = {}
    rung = None
    for m in metrics:
        if rung is None or m["rho_backward"] is None:
            rung = "serial" if m["mode"] == "serial" else f"{m['iterations_forward']}+{m['iterations_backward']}"
        shares[rung] = shares.get(rung, 0) + 1 / len(metrics)
    return {name: round(share, 4) for name, share in shares.items()}


def rounded(value: float | str) -> float | str:
    return value if isinstance(value, str) else float(f"{value:.4g}")


def load(results: Path) -> list[dict[str, Any]]:
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else []


def key_of(result: dict[str, Any]) -> tuple[str, str, int, int]:
    return result["network"], result["way"], result["seed"], result["steps"]


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    for name in arguments.networks:
        seeds = NETWORKS[name].seeds if arguments.seeds is None else arguments.seeds
        ways = [way for way in arguments.ways if way != "ablations"]
        if "ablations" in arguments.ways:
            ways += list(ABLATIONS)[1:]  # the first is "parallel"
        yield from ((name, way, seed, arguments.steps) for seed in seeds for way in ways)


def run(arguments: argparse.Namespace) -> None:
    data, output = arguments.data.absolute(), arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    done = {key_of(result) for result in load(arguments.results)}
    missing = [key for key in wanted(arguments) if key not in done]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(lambda key: train(*key[:3], data, output, key[3]), missing):
            keep(arguments.results, result)
            print(f"{result['network']} {result['way']} seed {result['seed']}: loss {result['loss']:.4f}", flush=True)


def keep(results: Path, result: dict[str, Any]) -> None:
    """Add to the file, in place of an earlier result of the same run."""
    others = [other for other in load(results) if key_of(other) != key_of(result)]
    lines = [json.dumps(r) for r in sorted([*others, result], key=key_of)]
    results.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


# Reporting --------------------------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    heads = "network | way | seeds | validation loss | gap to serial, % | steps in parallel | rungs, share of steps | flips | largest bias"
    rows = ["| " + heads + " |", "|---" * 9 + "|"]
    for name, network in NETWORKS.items():
        for way in WAYS:
            mine = [r for r in results if (r["network"], r["way"]) == (name, way)]
            if mine:
                rows.append(row(network.title, way, mine, [r for r in results if (r["network"], r["way"]) == (name, "serial")]))
    return "\n".join(rows)


def row(title: str, way: str, mine: list[dict[str, Any]], serial: list[dict[str, Any]]) -> str:
    losses = [r["loss"] for r in mine]
    exact = {(r["seed"], r["steps"]): r["loss"] for r in serial}
    gaps = [100 * (r["loss"] / exact[r["seed"], r["steps"]] - 1) for r in mine if (r["seed"], r["steps"]) in exact]
    biases = [probe["bias"] for r in mine for probe in r["probes"] if probe.get("bias_against") == "exact"]
    names = sorted({name for r in mine for name in r["rungs"]}, key=lambda name: (name == "serial", name))
    rungs = ", ".join(f"{name} {mean(r['rungs'].get(name, 0) for r in mine):.0%}" for name in names)
    cells = [
        title, way, str(len(mine)), spread(losses, 4), "" if way == "serial" else spread(gaps, 2, sign=True),
        f"{mean(r['parallel'] for r in mine):.0%}", rungs, f"{mean(len(r['switches']) for r in mine):.1f}".removesuffix(".0"),
        f"{max(biases):.2f}" if biases else "–",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def ablation_table(results: list[dict[str, Any]], name: str) -> str:
    """ρ, bias and exact loss at STOPS of the ways in ABLATIONS, and of those that were."""
    mine = {r["way"]: r for r in results if r["network"] == name and r["seed"] == 0}
    exact = dict(mine["serial"]["curve"]) if "serial" in mine else {}
    rows = ["| | " + " | ".join(f"{what}, {stop}" for stop in STOPS for what in ("ρ", "bias (cosine)", "loss (gap, %)")) + " |"]
    rows.append("|---" * (1 + 3 * len(STOPS)) + "|")
    for way in ("serial", *ABLATIONS, *DROPPED):
        r = mine.get("parallel" if way == "1+1" else way)
        if r is not None:
            rows.append(f"| {way} | " + " | ".join(cell for stop in STOPS for cell in cells_at(r, stop, exact)) + " |")
    return "\n".join(rows)


def cells_at(result: dict[str, Any], stop: int, exact: dict[int, float]) -> tuple[str, str, str]:
    """ρ forward and backward, bias and cosine of the probe before step `stop`, validation loss at it."""
    probe = next((p for p in result["probes"] if p["step"] == stop - 1), {})
    rho = " / ".join(f"{probe[kind]:.2f}" for kind in ("rho_forward", "rho_backward") if kind in probe)
    bias = f"{probe['bias']:.2f} ({probe['cosine']:.2f})" if "bias" in probe else ""
    loss = dict(result["curve"]).get(stop)
    if loss is None:
        return rho, bias, ""
    gap = "" if result["way"] == "serial" or stop not in exact else f" ({100 * (loss / exact[stop] - 1):+.2f})"
    return rho, bias, f"{loss:.4f}{gap}"


def spread(values: list[float], digits: int, *, sign: bool = False) -> str:
    if not values:
        return "–"
    shown = f"{mean(values):{'+' if sign else ''}.{digits}f}"
    return shown + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


COLOURS = {"serial": "#1f77b4", "parallel": "#d62728", "paper": "#ff7f0e", "default": "#9467bd", "ours": "#2ca02c"}


def draw_curves(results: list[dict[str, Any]], picture: Path) -> None:
    """Gap to serial over the steps, one panel a network."""
    plt = pyplot()
    names = [name for name in NETWORKS if any(r["network"] == name and r["way"] != "serial" for r in results)]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.9 * rows), layout="constrained", squeeze=False)
    for name, axis in zip(names, axes.flat, strict=False):
        exact = {r["seed"]: dict(r["curve"]) for r in results if (r["network"], r["way"]) == (name, "serial")}
        for way in list(WAYS)[1:]:
            for r in results:
                if (r["network"], r["way"]) == (name, way) and r["seed"] in exact:
                    points = [(s, 100 * (loss / exact[r["seed"]][s] - 1)) for s, loss in r["curve"] if s in exact[r["seed"]]]
                    axis.plot(*zip(*points, strict=True), color=COLOURS[way], lw=1.2, label=way if r["seed"] == min(exact) else None)
        axis.axhline(0.5, color="grey", ls="--", lw=0.8)
        axis.axhline(0, color=COLOURS["serial"], lw=0.8)
        axis.set_yscale("symlog", linthresh=2)
        low, high = axis.get_ylim()
        axis.set_yticks([-2, -1, 0, 1, 2, 5, 10, 50], labels=["-2", "-1", "0", "1", "2", "5", "10", "50"])
        axis.minorticks_off()
        axis.set_ylim(min(low, -2.2), max(high, 2.2))
        axis.set(title=NETWORKS[name].title, xlabel="step", ylabel="gap to serial, %")
        axis.legend(frameon=False, fontsize="small")
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.savefig(picture, dpi=130)


def draw_transition(results: list[dict[str, Any]], picture: Path, name: str, seed: int = 0) -> None:
    """ρ and bias rising, the switch, and the loss meeting serial again."""
    plt = pyplot()
    runs = {r["way"]: r for r in results if (r["network"], r["seed"]) == (name, seed) and r["way"] in WAYS}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for way, r in runs.items():
        left.plot(*zip(*r["curve"], strict=True), "o-", ms=3, lw=1.2, color=COLOURS[way], label=way)
    for way in ("parallel", "paper", "ours"):
        if way not in runs:
            continue
        for kind, style, label in (("rho_forward", "-", "ρ forward"), ("rho_backward", "--", "ρ backward"), ("bias", ":", "gradient bias")):
            points = [(p["step"], p[kind]) for p in runs[way]["probes"] if p.get(kind)]
            if points:
                right.plot(*zip(*points, strict=True), style, color=COLOURS[way], lw=1.1, label=f"{way}: {label}")
        for switch in runs[way]["switches"]:
            for axis in (left, right):
                axis.axvline(switch["step"], color=COLOURS[way], lw=0.7, ls=":")
    left.set(xlabel="step", ylabel="validation loss, exact forward", title=NETWORKS[name].title + "; dotted: a change of rung")
    left.legend(frameon=False)
    right.axhline(1, color="grey", ls="--", lw=0.8)
    right.set(xlabel="step", yscale="log", title="What probes found")
    right.legend(frameon=False, fontsize="x-small", ncols=2)
    figure.savefig(picture, dpi=130)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def report(arguments: argparse.Namespace) -> None:
    results = load(arguments.results)
    print(table(results))
    print()
    print(ablation_table(results, arguments.ablation))
    if arguments.docs:
        images = arguments.docs / "images"
        images.mkdir(parents=True, exist_ok=True)
        draw_curves(results, images / "fidelity.png")
        draw_transition(results, images / "transition.png", arguments.transition)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    train_them = commands.add_parser("run")
    train_them.add_argument("--data", type=Path, required=True)
    train_them.add_argument("--output", type=Path, required=True)
    train_them.add_argument("--results", type=Path, required=True)
    train_them.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    train_them.add_argument("--ways", nargs="+", choices=[*WAYS, *ABLATIONS, "ablations"], default=list(WAYS))
    train_them.add_argument("--seeds", nargs="+", type=int)
    train_them.add_argument("--steps", type=int, default=STEPS)
    train_them.add_argument("--jobs", type=int, default=2)
    train_them.set_defaults(function=run)
    show = commands.add_parser("report")
    show.add_argument("--results", type=Path, required=True)
    show.add_argument("--docs", type=Path)
    show.add_argument("--transition", choices=list(NETWORKS), default="buffered")
    show.set_defaults(function=report)
    show.add_argument("--ablation", choices=list(NETWORKS), default="buffered")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
