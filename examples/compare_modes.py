"""Train the same network serially and layer-parallel from the same seed, and show both curves.

    python examples/compare_modes.py examples/gpt2_shakespeare.yaml --set data.path=input.txt --output runs/compare

Prints validation losses side by side (both measured with the exact forward) and their gap, and draws both curves.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import ray

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import rayllp


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def smooth(values: list[float], window: int = 10) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / (i - max(0, i - window + 1) + 1) for i in range(len(values))]


def draw(runs: dict[str, Path], picture: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    colours = dict(zip(runs, ("#1f77b4", "#d62728", "#2ca02c", "#9467bd"), strict=False))
    for name, run in runs.items():
        metrics, evaluations = read(run / "metrics.jsonl"), read(run / "evals.jsonl")
        # The curves usually lie on each other: the first run is drawn wide and its marks hollow, so that both can be seen.
        first = name == next(iter(runs))
        left.plot(
            [m["step"] for m in metrics], smooth([m["loss"] for m in metrics]), color=colours[name], lw=3.5 if first else 1, alpha=0.6
        )
        mark = {"ms": 9, "mfc": "none"} if first else {"ms": 4}
        steps, losses = [e["step"] for e in evaluations], [e["loss"] for e in evaluations]
        left.plot(steps, losses, "o", color=colours[name], label=f"{name}: validation", **mark)
        probes = [m for m in metrics if m["rho_forward"] is not None]
        if probes:
            right.plot([m["step"] for m in probes], [m["rho_forward"] for m in probes], "o-", ms=3, label="forward")
            right.plot([m["step"] for m in probes], [m["rho_backward"] for m in probes], "s-", ms=3, label="backward")
    left.set(xlabel="step", ylabel="nats per token", title="Loss (lines: training, dots: held out, exact forward)")
    left.legend(frameon=False)
    right.axhline(1, color="grey", ls="--", lw=1)
    right.set(xlabel="step", ylabel="ρ", title="MGRIT convergence factor (1: no longer converges)", yscale="log")
    right.legend(frameon=False)
    figure.savefig(picture, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", default=["serial", "parallel"])
    arguments = parser.parse_args()
    configs = {mode: rayllp.load_config(arguments.config, [*arguments.overrides, f"mode={mode}"]) for mode in arguments.modes}
    ray.init(address="local", num_cpus=max(config.world for config in configs.values()), include_dashboard=False)
    runs = {mode: rayllp.train(config, output=arguments.output / mode).directory for mode, config in configs.items()}
    tables = {mode: {e["step"]: e["loss"] for e in read(run / "evals.jsonl")} for mode, run in runs.items()}
    first = next(iter(tables))
    print("step  " + "  ".join(f"{mode:>10}" for mode in tables) + "  gap of the last to the first")
    for step in tables[first]:
        row = [table[step] for table in tables.values()]
        print(f"{step:4}  " + "  ".join(f"{loss:10.4f}" for loss in row) + f"  {100 * (row[-1] / row[0] - 1):+.2f} %")
    draw(runs, arguments.output / "compare.png")
    print(f"picture: {arguments.output / 'compare.png'}")


if __name__ == "__main__":
    main()
