"""Builds the charts of a report from the records of its runs."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from rayllp.report.page.charts import MARK_KINDS, Band, Chart, Curve, Floats, Mark, Rule, thin
from rayllp.report.page.records import RunRecord

STEP_TIME = "Peaks: probes, which run several solves, and the first steps of new workers or of a new mode."

Place = Callable[[RunRecord, Floats], Floats]
"""Function that maps numbers of steps done to positions on a chart's horizontal axis."""


def build_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return all charts for which there are data, in the order of the page."""
    charts = [
        _loss(runs, "loss_tokens", "Loss against tokens", "tokens (or patches of images)", "count", _tokens),
        _loss(runs, "loss_time", "Loss against time", "time of the steps", "time", _seconds),
        *_metrics(runs),
        _rho(runs),
        _rho_by_point(runs),
        _bias(runs),
        _of_probes(
            runs, "cosine", "Direction of the gradient", "Cosine between the gradient in use and the better one; 1: the same direction.",
            "cosine", {"cosine": "cosine"},
        ),
        _loss_gap(runs),
        _iterations(runs),
        _penalty(runs),
        _dense(runs, "step_time", "Time of a step", STEP_TIME, "seconds", "step_time_s", log=True),
        _workers(runs),
        _dense(runs, "grad_norm", "Gradient norm", "Over all workers, before clipping.", "norm", "grad_norm", log=True),
        _dense(runs, "lr", "Learning rate", "Warm-up and decay.", "learning rate", "lr"),
        _lipschitz(runs),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


# Horizontal axes ------------------------------------------------------------------------------------------------------------------


def _tokens(run: RunRecord, steps: Floats) -> Floats:
    return np.array([run.total_after(run.tokens, step) for step in steps])


def _seconds(run: RunRecord, steps: Floats) -> Floats:
    return np.array([run.total_after(run.seconds, step) for step in steps])


def _plainly(run: RunRecord, steps: Floats) -> Floats:
    return np.asarray(steps, dtype=float)


# What all charts over steps have --------------------------------------------------------------------------------------------------


def _chart(runs: Sequence[RunRecord], key: str, title: str, curves: Sequence[Curve], place: Place = _plainly, **more: Any) -> Chart | None:
    if not curves:
        return None
    marks, bands = [], []
    for number, run in enumerate(runs):
        kept = run.events_of(*MARK_KINDS)
        places = place(run, np.array([max(0, event["step"]) for event in kept], dtype=float))
        marks += [
            Mark(x=float(x), run=number, kind=event["kind"], text=f"{run.name}: {describe_event(event)}")
            for x, event in zip(places, kept, strict=True)
        ]
        edges = [place(run, np.array([phase.begin, phase.end], dtype=float)) for phase in run.phases]
        bands += [
            Band(begin=float(begin), end=float(end), run=number, mode=phase.mode)
            for (begin, end), phase in zip(edges, run.phases, strict=True)
        ]
    more = {"x_label": "steps", **more}
    return Chart(key=key, title=title, curves=tuple(curves), marks=tuple(marks), bands=tuple(bands), **more)


def _thinned(name: str, number: int, x: Floats, y: Floats) -> Curve:
    found = thin(x, y)
    return Curve(name=name, run=number, x=found.x, y=found.y, low=found.low, high=found.high)


def describe_gain(event: dict[str, Any]) -> str:
    """Return in words how much faster a session was than with exact steps alone."""
    speedup, over_one = event["speedup"], event["speedup_over_one"]
    if speedup is None:
        return "no exact step was timed to compare with"
    one = "" if over_one is None else f", {over_one:.2f} times as fast as one worker"
    return f"{speedup:.2f} times as fast as exact steps on the same workers{one}"


def describe_event(event: dict[str, Any]) -> str:
    """Return an event in words."""
    step, kind = event["step"], event["kind"]
    if kind == "switch":
        trying = f", trying {event['trying']}" if event.get("trying") else ""
        return f"step {step}: to {event['to']}, {event['rung']}{trying}: {event['reason']}"
    if kind == "resize":
        return f"step {step}: {event['workers_before']} workers became {event['workers']}"
    if kind == "fault":
        return f"step {step}: fault: {event.get('where') or event.get('reason', '')}"
    if kind == "deepen":
        return f"step {step}: {event['layers_before']} layers became {event['layers']}"
    if kind == "restore":
        source = event.get("source") or event.get("path", "")
        return f"step {step}: restored from {source}" + (f", {event['steps_lost']} steps lost" if "steps_lost" in event else "")
    if kind == "gain":
        return f"step {step}: {describe_gain(event)}"
    if kind == "stop":
        return f"step {step}: stopped early: {event['reason']}"
    if kind == "settings":
        return "settings changed: " + ", ".join(event.get("changed", {}))
    return f"step {step}: {kind}"


# Loss -----------------------------------------------------------------------------------------------------------------------------


def _loss(runs: Sequence[RunRecord], key: str, title: str, label: str, scale: Any, place: Place) -> Chart | None:
    curves: list[Curve] = []
    for number, run in enumerate(runs):
        curves.append(_thinned("training", number, place(run, run.steps + 1), run.column("loss")))
        if run.evaluations:
            curves.append(_evaluated(run, number, "loss", "validation", place))
    losses = np.concatenate([run.column("loss") for run in runs])
    losses = losses[np.isfinite(losses) & (losses > 0)]
    log = bool(len(losses)) and float(losses.max()) > 3 * float(np.quantile(losses, 0.99))  # a spike must not flatten all else
    more: dict[str, Any] = {"x_label": label, "y_label": "loss", "scale": scale, "log": log, "lanes": True}
    if scale == "time":
        caption = "The same losses. Time is that of the steps: without evaluations, recoveries, and steps that were lost and done again."
        return _chart(runs, key, title, curves, place, caption=caption, **more)
    caption = "Training loss as the step's own solve sees it; validation loss (points) always by the exact forward."
    if any(curve.low is not None for curve in curves):
        caption += " Where a line stands for many steps it is their mean, and the shading about it goes from the smallest to the largest."
    return _chart(runs, key, title, curves, place, caption=caption, **more)


def _evaluated(run: RunRecord, number: int, metric: str, name: str, place: Place) -> Curve:
    found = [(line["step"], line[metric]) for line in run.evaluations if line.get(metric) is not None]
    steps, values = np.array([step for step, _ in found], dtype=float), np.array([value for _, value in found], dtype=float)
    return Curve(name=name, run=number, x=place(run, steps), y=values, kind="points")


def _metrics(runs: Sequence[RunRecord]) -> Iterator[Chart | None]:
    """Yield a chart of each of the task's metrics, except perplexity, which only repeats the loss."""
    names = dict.fromkeys(name for run in runs for line in run.evaluations for name in line)
    for name in names:
        if name in ("step", "split", "loss", "perplexity"):
            continue
        curves = [
            _evaluated(run, number, name, name, _plainly)
            for number, run in enumerate(runs)
            if any(name in line for line in run.evaluations)
        ]
        caption = "On held-out data, by the exact forward."
        yield _chart(runs, f"metric_{name}", name.replace("_", " ").capitalize(), curves, caption=caption, y_label=name)


# What probes measure --------------------------------------------------------------------------------------------------------------


def _probed(runs: Sequence[RunRecord], names: dict[str, str]) -> list[Curve]:
    """Return the points of metrics that probes measure.

    Args:
        names: for each metric, its name on the chart.
    """
    dashes = ("solid", "dashed", "dotted")
    curves = []
    for number, run in enumerate(runs):
        for order, (name, shown) in enumerate(names.items()):
            x, y = run.measured(name)
            if len(x):
                curves.append(Curve(name=shown, run=number, x=x, y=y, kind="points", dash=dashes[order]))  # type: ignore[arg-type]
    return curves


def _of_probes(
    runs: Sequence[RunRecord], key: str, title: str, caption: str, label: str, names: dict[str, str], **more: Any
) -> Chart | None:
    return _chart(runs, key, title, _probed(runs, names), caption=caption, y_label=label, **more)


def _values(runs: Sequence[RunRecord], read: Callable[[RunRecord], float | None]) -> list[float]:
    return sorted({value for run in runs if (value := read(run)) is not None})


def _rho(runs: Sequence[RunRecord]) -> Chart | None:
    watched = _values(runs, lambda run: run.config.adaptive.threshold if run.config.adaptive.rule != "bias" else None)
    others = [value for value in _values(runs, lambda run: run.config.adaptive.threshold) if value not in watched]
    rules = [Rule(y=value, text=f"threshold {value:g}") for value in watched]
    rules += [Rule(y=value, text=f"threshold {value:g} (not watched: rule bias)") for value in others]
    caption = "Convergence factor ρ of the forward and the adjoint solve, where probed: the share of the error that an iteration leaves."
    names = {"rho_forward": "forward", "rho_backward": "backward"}
    return _of_probes(runs, "rho", "Convergence factor", caption, "ρ", names, rules=tuple(rules), log=True)


def _rho_by_point(runs: Sequence[RunRecord]) -> Chart | None:
    """Return a chart of ρ by layer, on the finest level at the last probe; coarse levels are in TensorBoard."""
    curves = []
    for number, run in enumerate(runs):
        step, found = next(((m["step"], m["rho_by_point"]) for m in reversed(run.metrics) if m.get("rho_by_point")), (0, {}))
        for direction, (factors, *_) in found.items():
            x = run.config.buffers.open + run.config.fine_coarsening * np.arange(1, len(factors) + 1, dtype=float)
            y = np.array(factors, dtype=float)
            known = ~np.isnan(y)
            dash = "solid" if direction == "forward" else "dashed"
            if known.any():
                curves.append(Curve(name=f"{direction}, step {step}", run=number, x=x[known], y=y[known], kind="points", dash=dash))  # type: ignore[arg-type]
    if not curves:
        return None
    caption = (
        "What an iteration leaves of the residual at each boundary between coarse intervals, at the last probe. Where it is large, "
        "layers belong in buffers, or intervals are too long."
    )
    return Chart(
        key="rho_by_layer",
        title="Convergence factor by layer",
        caption=caption,
        x_label="layer",
        y_label="ρ",
        curves=tuple(curves),
        log=True,
    )


def _bias(runs: Sequence[RunRecord]) -> Chart | None:
    watched = [run for run in runs if run.config.adaptive.rule != "convergence"]
    rules = tuple(Rule(y=value, text=f"limit {value:g}") for value in _values(watched, lambda run: run.config.adaptive.bias_limit))
    caption = (
        "Relative error of the gradient that layer-parallel steps use, beside the gradient's own noise from batch to batch. "
        "An error well below the noise moves the weights less than another batch would."
    )
    names = {"bias": "bias", "noise": "noise"}
    return _of_probes(runs, "bias", "Bias of the gradient", caption, "relative to the gradient", names, rules=rules, log=True)


def _loss_gap(runs: Sequence[RunRecord]) -> Chart | None:
    caption = (
        "How far the loss of the solve in use is off on the same batch. Layer-parallel steps train the network as it is solved, so this is "
        "what the run would lose if it ended here."
    )
    return _of_probes(runs, "loss_gap", "Loss of the solve", caption, "relative to the loss", {"loss_gap": "difference"})


def _penalty(runs: Sequence[RunRecord]) -> Chart | None:
    if not any(run.config.consistency for run in runs):
        return None
    curves = [
        _thinned("weight μ", number, run.steps[there], weight[there])
        for number, run in enumerate(runs)
        if (there := np.isfinite(weight := run.column("consistency_weight"))).any()
    ]
    caption = (
        "Weight of the consistency penalty, which keeps layers solvable by few iterations; probes move it, and a switch to serial ends it."
    )
    return _chart(runs, "consistency", "Consistency penalty", curves, caption=caption, y_label="μ", log=True)


def _lipschitz(runs: Sequence[RunRecord]) -> Chart | None:
    curves = []
    for number, run in enumerate(runs):
        found = [(metric["step"], metric["lipschitz"]) for metric in run.metrics if metric.get("lipschitz")]
        for dash, (step, constants) in zip(("dotted", "solid"), found[:: max(1, len(found) - 1)], strict=False):
            x, y = np.arange(len(constants), dtype=float), np.array(constants, dtype=float)
            curves.append(Curve(name=f"step {step}", run=number, x=x, y=y, kind="points", dash=dash))  # type: ignore[arg-type]
    if not curves:
        return None
    caption = (
        "Largest singular value of each layer's Jacobian, at the first and the last estimate. Steep layers at the ends belong in buffers."
    )
    return Chart(
        key="lipschitz", title="Lipschitz constants of the layers", caption=caption, x_label="layer", y_label="constant",
        curves=tuple(curves), log=True,
    )  # fmt: skip


# Steps ----------------------------------------------------------------------------------------------------------------------------


def is_probe(metric: dict[str, Any]) -> bool:
    """True if a step was a probe, which takes other iterations than the steps about it."""
    return any(metric.get(name) is not None for name in ("bias", "rho_forward", "rho_backward", "lipschitz"))


def _iterations(runs: Sequence[RunRecord]) -> Chart | None:
    curves: list[Curve] = []
    for number, run in enumerate(runs):
        for dash, name in (("solid", "forward"), ("dashed", "backward")):
            x, y = _in_use(run, f"iterations_{name}")
            if len(x):
                curves.append(Curve(name=name, run=number, x=x, y=y, kind="steps", dash=dash))  # type: ignore[arg-type]
    caption = (
        "Of the forward and the adjoint solve; 0 is serial, and exact. Of a rolling window it is the number of sweeps. "
        "Probes, which do more of them, are left out."
    )
    return _chart(runs, "iterations", "Iterations in use", curves, caption=caption, y_label="iterations", zero=True, whole=True)


def _in_use(run: RunRecord, name: str) -> tuple[Floats, Floats]:
    """Return x and y of a staircase: the steps at which the number of iterations changes, and the new number. Probes are left out."""
    plain = [metric for metric in run.metrics if not is_probe(metric)]
    points: list[tuple[float, float]] = []
    for value, group in groupby(plain, key=lambda metric: metric[name] or 0):
        points.append((next(group)["step"], value))
    if points:
        points.append((run.done, points[-1][1]))
    return np.array([x for x, _ in points], dtype=float), np.array([y for _, y in points], dtype=float)


def _dense(runs: Sequence[RunRecord], key: str, title: str, caption: str, label: str, column: str, *, log: bool = False) -> Chart | None:
    curves = [_thinned(title.lower(), number, run.steps, run.column(column)) for number, run in enumerate(runs)]
    finite = np.concatenate([curve.y for curve in curves])
    finite = finite[np.isfinite(finite) & (finite > 0)]
    wide = len(finite) > 0 and float(finite.max()) > 8 * float(np.median(finite))
    return _chart(runs, key, title, curves, caption=caption, y_label=label, log=log and wide, zero=not (log and wide))


def _workers(runs: Sequence[RunRecord]) -> Chart | None:
    curves = []
    for number, run in enumerate(runs):
        points = [(next(group)["step"], workers) for workers, group in groupby(run.metrics, key=lambda metric: metric["workers"])]
        points.append((run.done, points[-1][1]))
        x, y = (np.array(values, dtype=float) for values in zip(*points, strict=True))
        curves.append(Curve(name="workers", run=number, x=x, y=y, kind="steps"))
    if all(len(curve.x) == 2 for curve in curves):  # nothing ever changed
        return None
    return _chart(runs, "workers", "Workers", curves, caption="At work, by step.", y_label="workers", zero=True, whole=True)


def last_loss(run: RunRecord) -> float:
    """Return the mean training loss of the last twentieth of the steps."""
    losses = run.column("loss")[-max(1, math.ceil(len(run.metrics) / 20)) :]
    return float(losses.mean())
