"""Plots of a sweep: Pareto front, parallel coordinates, importance of settings, and ρ over the steps with switches to serial mode."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayllp.report import read_lines
from rayllp.tuning.reporter import WORST
from rayllp.tuning.sweep import Sweep

Row = dict[str, Any]
LEAST_BIAS = 1e-4
"""Smaller biases are drawn at this value, since the axis is logarithmic."""
MOST_NAMED = 12
"""At most this many points of the Pareto front are labelled with their settings."""


def complete_rows(rows: Sequence[Row], *metrics: str) -> list[Row]:
    """Return the rows that have a value for all of these metrics."""
    return [row for row in rows if all(row[name] is not None and row[name] < WORST for name in metrics)]


def pareto_front(rows: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Return the rows on the Pareto front, sorted by the first metric.

    No other row is at least as good in all metrics and better in one. Smaller values are better.
    """
    complete = complete_rows(rows, *metrics)

    def beats(one: Row, other: Row) -> bool:
        return all(one[name] <= other[name] for name in metrics) and any(one[name] < other[name] for name in metrics)

    return sorted((row for row in complete if not any(beats(other, row) for other in complete)), key=lambda row: row[metrics[0]])


def draw_all(rows: list[Row], sweep: Sweep, folder: Path) -> list[tuple[str, Path]]:
    """Draw all plots for which there are enough data; return the caption and file of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images = folder / "images"
    images.mkdir(exist_ok=True)
    drawn = []
    for caption, name, draw in (
        ("Step time against gradient bias", "pareto", _pareto),
        ("Settings and objective (parallel coordinates)", "coordinates", _coordinates),
        ("How much each setting matters (fANOVA)", "importance", _importance),
        ("Largest convergence factor over steps; a mark where a trial went serial", "rho", _rho),
    ):
        figure = draw(plt, rows, sweep, folder)
        if figure is not None:
            figure.savefig(images / f"{name}.png", dpi=120)
            plt.close(figure)
            drawn.append((caption, images / f"{name}.png"))
    return drawn


def _pareto(plt: Any, rows: list[Row], sweep: Sweep, folder: Path) -> Any:
    metrics = ("step_time", "bias")
    complete = complete_rows(rows, *metrics)
    if len(complete) < 2:
        return None
    figure, axis = plt.subplots(figsize=(10, 4.2), layout="constrained")

    def place(row: Row) -> tuple[float, float]:
        return row["step_time"], max(row["bias"], LEAST_BIAS)

    losses = [math.nan if row["validation_loss"] is None else row["validation_loss"] for row in complete]
    points = axis.scatter(*zip(*map(place, complete), strict=True), c=losses, cmap="viridis_r", zorder=2)
    front = pareto_front(complete, metrics)
    axis.step(*zip(*map(place, front), strict=True), where="post", color="#d62728", lw=1, label="front")
    base = next((row for row in complete if not row["settings"]), None)
    if base is not None:
        axis.scatter(*place(base), s=110, facecolors="none", edgecolors="black", label="base config", zorder=3)
    names = _short([parameter.name for parameter in sweep.search_space.varying])
    lines = []
    for number, row in enumerate(front[:MOST_NAMED], 1):
        axis.annotate(str(number), place(row), fontsize=8, xytext=(5, 4), textcoords="offset points")
        chosen = ", ".join(f"{short} {row['settings'][name]}" for name, short in names.items() if name in row["settings"])
        lines.append(f"{number}  {chosen or 'base config'}")
    axis.set(xlabel="step time, s" + (" (predicted)" if sweep.objective.cluster else ""), ylabel="largest gradient bias", yscale="log")
    axis.legend(frameon=False)
    figure.colorbar(points, label="validation loss")
    figure.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=7)
    return figure


def _short(names: Sequence[str]) -> dict[str, str]:
    """Return the shortest endings of dotted names that distinguish them, by name."""
    short_names = {}
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [other for other in names if other != name]
        short_names[name] = next((end for end in ends if not any(other.endswith("." + end) or other == end for other in others)), name)
    return short_names


def _coordinates(plt: Any, rows: list[Row], sweep: Sweep, folder: Path) -> Any:
    metric = sweep.objective.metrics[0]
    complete = complete_rows(rows, metric)
    names = [parameter.name for parameter in sweep.search_space.varying]
    if len(complete) < 2 or not names:
        return None
    base = sweep.base_values()
    columns = {name: [(base | row["settings"])[name] for row in complete] for name in names} | {metric: [row[metric] for row in complete]}
    figure, axis = plt.subplots(figsize=(max(6, 1.5 * len(columns)), 4.2), layout="constrained")
    heights = {name: _ranks(values) if name == metric else _scale(values) for name, values in columns.items()}
    for n in sorted(range(len(complete)), key=lambda n: -columns[metric][n]):  # draw the best ones last, on top
        colour = plt.cm.viridis(heights[metric][0][n])
        axis.plot(range(len(columns)), [heights[name][0][n] for name in columns], color=colour, lw=1, alpha=0.8)
    for place, name in enumerate(columns):
        for height, label in heights[name][1]:
            axis.annotate(label, (place, height), fontsize=7, xytext=(3, 0), textcoords="offset points")
        axis.axvline(place, color="grey", lw=0.5)
    axis.set_xticks(range(len(columns)), list(columns), rotation=20, fontsize=8, ha="right")
    axis.set_yticks([])
    return figure


def _scale(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return a height in [0, 1] for each value, and labels at some heights. Numbers are scaled; other values are evenly spaced."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        marks = sorted(set(values)) if len(set(values)) <= 6 else [low, high]
        return [_between(value, low, high) for value in values], [(_between(mark, low, high), f"{mark:.3g}") for mark in marks]
    kinds = sorted({json.dumps(value) for value in values})
    places = {kind: _between(n, 0, len(kinds) - 1) for n, kind in enumerate(kinds)}
    return [places[json.dumps(value)] for value in values], [(place, kind) for kind, place in places.items()]


def _ranks(values: list[float]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return heights and labels like `_scale`, but by the values' ranks, so that a few bad trials do not hide how the good ones differ."""
    order = sorted(set(values))
    places = {value: _between(n, 0, len(order) - 1) for n, value in enumerate(order)}
    return [places[value] for value in values], [(places[v], f"{v:.4g}") for v in (order[0], order[len(order) // 2], order[-1])]


def _between(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)


def _importance(plt: Any, rows: list[Row], sweep: Sweep, folder: Path) -> Any:
    """Draw the importances that Optuna computes from the trials; None if there are too few trials, or a package is missing."""
    metric = sweep.objective.metrics[0]
    usable = complete_rows(rows, metric)
    if len(usable) < 4:
        return None
    try:
        import optuna
        from optuna.importance import get_param_importances
    except ImportError:
        return None
    base = sweep.base_values()
    parameters = sweep.search_space.varying
    study = optuna.create_study()
    for row in usable:
        values = base | row["settings"]
        if not all(parameter.has(values[parameter.name]) for parameter in parameters):
            continue
        distributions = {parameter.name: _distribution(optuna, parameter) for parameter in parameters}
        chosen = {parameter.name: parameter.encode(values[parameter.name]) for parameter in parameters}
        study.add_trial(optuna.trial.create_trial(params=chosen, distributions=distributions, value=row[metric]))
    try:
        importances = get_param_importances(study)
    except (ImportError, ValueError, RuntimeError):  # scikit-learn is missing, or no setting varies
        return None
    if not importances:
        return None
    figure, axis = plt.subplots(figsize=(7, 0.5 + 0.4 * len(importances)), layout="constrained")
    names = list(importances)[::-1]
    axis.barh(names, [importances[name] for name in names], color="#1f77b4")
    axis.set(xlabel=f"share of the variance of {metric}")
    return figure


def _distribution(optuna: Any, parameter: Any) -> Any:
    kinds = optuna.distributions
    if parameter.kind == "choice":
        return kinds.CategoricalDistribution([json.dumps(value) for value in parameter.values])
    if parameter.kind == "int":
        return kinds.IntDistribution(*parameter.values)
    return kinds.FloatDistribution(*parameter.values, log=parameter.kind == "log")


def _rho(plt: Any, rows: list[Row], sweep: Sweep, folder: Path) -> Any:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    drawn = 0
    for row in rows:
        metrics = read_lines(folder / "trials" / str(row["trial"]) / "metrics.jsonl")
        points = [(m["step"], max(rho)) for m in metrics if (rho := [m[k] for k in ("rho_forward", "rho_backward") if m[k] is not None])]
        if len(points) < 2:
            continue
        (line,) = axis.plot(*zip(*points, strict=True), lw=1, alpha=0.8)
        drawn += 1
        if row["switched_at"] is not None:
            kind = "v" if row["forced_serial"] else "x"
            axis.plot(
                [row["switched_at"]], [min(points, key=lambda point: abs(point[0] - row["switched_at"]))[1]], kind, color=line.get_color()
            )
    if not drawn:
        plt.close(figure)
        return None
    axis.axhline(1, color="grey", ls="--", lw=0.8)
    axis.set(xlabel="step", ylabel="ρ, the larger of forward and backward", yscale="log")
    return figure
