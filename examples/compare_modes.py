"""Train the same network in several ways from the same seed, and show the curves: by default serially and layer-parallel.

    python examples/compare_modes.py examples/gpt2_shakespeare.yaml --set data.path=input.txt --output runs/compare
    python examples/compare_modes.py examples/gpt2_shakespeare.yaml --set data.path=input.txt --set steps=1500 \
        --set solver=mgrit --set mgrit.iterations.forward=1 --set adaptive.rule=bias --output runs/penalty \
        --run serial:mode=serial --run plain:mode=parallel --run penalty:mode=parallel,adaptive.consistency=10 --run adaptive:mode=adaptive

Prints validation losses side by side (all measured with the exact forward), the gap of each to the first, and what probes found, and draws
the curves.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import ray

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import rayllp

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def smooth(values: list[float], window: int = 10) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / (i - max(0, i - window + 1) + 1) for i in range(len(values))]


def draw(runs: dict[str, Path], picture: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        metrics, evaluations = read(run / "metrics.jsonl"), read(run / "evals.jsonl")
        # The curves often lie on each other: the first run is drawn wide and its marks hollow, so that both can be seen.
        first = name == next(iter(runs))
        training = smooth([m["loss"] for m in metrics])
        left.plot([m["step"] for m in metrics], training, color=colour, lw=3.5 if first else 1, alpha=0.6)
        mark = {"ms": 9, "mfc": "none"} if first else {"ms": 4}
        steps, losses = [e["step"] for e in evaluations], [e["loss"] for e in evaluations]
        left.plot(steps, losses, "o", color=colour, label=f"{name}: validation", **mark)
        probes = [m for m in metrics if m["rho_backward"] is not None]
        for kind, line in (("rho_forward", "o-"), ("rho_backward", "s--"), ("bias", "^:")):
            shown = [(m["step"], m[kind]) for m in probes if m.get(kind) is not None]
            if shown:
                label = {"rho_forward": "ρ forward", "rho_backward": "ρ backward", "bias": "gradient bias"}[kind]
                right.plot(*zip(*shown, strict=True), line, ms=3, lw=1, color=colour, label=f"{name}: {label}")
        for event in read(run / "events.jsonl"):
            if event["kind"] == "switch":
                left.axvline(event["step"], color=colour, lw=0.6, ls=":")
    left.set(xlabel="step", ylabel="nats per token", title="Loss (lines: training, dots: held out, exact forward)")
    left.legend(frameon=False)
    right.axhline(1, color="grey", ls="--", lw=1)
    right.set(xlabel="step", title="What probes found (ρ of 1: no longer converges)", yscale="log")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(picture, dpi=150)


def last_probe(run: Path) -> str:
    probes = [m for m in read(run / "metrics.jsonl") if m["rho_backward"] is not None]
    if not probes:
        return "–"
    names = ("rho_forward", "rho_backward", "bias", "cosine", "noise", "consistency")
    return ", ".join(f"{name} {probes[-1][name]:.3g}" for name in names if probes[-1].get(name) is not None)


def table(runs: dict[str, Path]) -> str:
    losses = {name: {e["step"]: e["loss"] for e in read(run / "evals.jsonl")} for name, run in runs.items()}
    first = next(iter(losses.values()))
    lines = ["| step | " + " | ".join(losses) + " |", "|---" * (len(losses) + 1) + "|"]
    for step in first:
        row = [found[step] for found in losses.values()]
        shown = [f"{loss:.4f}" + (f" ({100 * (loss / row[0] - 1):+.2f} %)" if k else "") for k, loss in enumerate(row)]
        lines.append(f"| {step} | " + " | ".join(shown) + " |")
    lines.append("| parallel steps | " + " | ".join(f"{parallel_share(run):.0%}" for run in runs.values()) + " |")
    return "\n".join([*lines, "| last probe | " + " | ".join(last_probe(run) for run in runs.values()) + " |"])


def parallel_share(run: Path) -> float:
    modes = [m["mode"] for m in read(run / "metrics.jsonl")]
    return modes.count("parallel") / len(modes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--run", action="append", help="NAME:key=value,key=value …; the first is what the others are compared with")
    arguments = parser.parse_args()
    configs = {}
    for run in arguments.run or ["serial:mode=serial", "parallel:mode=parallel"]:
        name, _, changes = run.partition(":")
        configs[name] = rayllp.load_config(arguments.config, [*arguments.overrides, *(change for change in changes.split(",") if change)])
    ray.init(address="local", num_cpus=max(config.world for config in configs.values()), include_dashboard=False)
    runs = {name: rayllp.train(config, output=arguments.output / name).directory for name, config in configs.items()}
    print(table(runs))
    draw(runs, arguments.output / "compare.png")
    print(f"picture: {arguments.output / 'compare.png'}")


if __name__ == "__main__":
    main()
