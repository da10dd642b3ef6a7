"""Charts as PNG files, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayllp.errors import SettingsError
from rayllp.report.gantt import draw_timeline
from rayllp.report.page.charts import COLOURS, MARK_KINDS, Chart, Curve
from rayllp.report.page.plots import colour_of
from rayllp.report.page.records import RunRecord
from rayllp.report.page.workers import step_timelines

DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}


def write_pngs(charts: Sequence[Chart], runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Write one file per chart, and one per timeline; return their paths.

    Raises:
        SettingsError: the folder cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            written.append(_write(chart, runs, folder / f"{chart.key}.png"))
        for run_number, run in enumerate(runs):
            for number, timeline in enumerate(step_timelines(run)):
                path = folder / f"timeline_{run_number}_{number}.png"
                draw_timeline(timeline.workers, path, f"{run.name}, step {timeline.step}: {timeline.kind}")
                written.append(path)
    except OSError as error:
        raise SettingsError(f"--png {folder} cannot be written: {error.strerror or error}; choose another folder") from None
    return written


def _write(chart: Chart, runs: Sequence[RunRecord], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size, unit = chart.unit
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    if len(runs) == 1:
        for band in chart.bands:
            if band.mode == "serial":
                axis.axvspan(band.begin / size, band.end / size, color="#888888", alpha=0.15, lw=0, label="serial")
    for number, curve in enumerate(chart.curves):
        _draw(axis, curve, runs, size, colour_of(chart, number, runs))
    for rule in chart.rules:
        axis.axhline(rule.y, color="#888888", lw=0.8, ls="-.")
        axis.annotate(rule.text, (1, rule.y), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom")
    for mark in chart.marks:
        kind = MARK_KINDS[mark.kind]
        colour = kind.colour if len(runs) == 1 else COLOURS[mark.run % len(COLOURS)]
        axis.axvline(mark.x / size, color=colour, lw=0.5, alpha=0.5)
        style = {"marker": kind.marker, "ms": 6, "color": colour, "ls": "", "label": kind.name}
        axis.plot([mark.x / size], [1.0], transform=axis.get_xaxis_transform(), clip_on=False, **style)
    axis.set(xlabel=f"{chart.x_label}{unit and f', {unit}'}", ylabel=chart.y_label, title=chart.title, ylim=chart.y_range)
    axis.set_xlim(chart.x_range[0] / size, chart.x_range[1] / size)
    if chart.log:
        axis.set_yscale("log")
        axis.set_ylim(*chart.y_range)
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw(axis: Any, curve: Curve, runs: Sequence[RunRecord], size: float, colour: str) -> None:
    x = curve.x / size
    label = curve.name if len(runs) == 1 else f"{runs[curve.run].name}, {curve.name}"
    if curve.low is not None and curve.high is not None:
        axis.fill_between(x, curve.low, np.where(np.isfinite(curve.high), curve.high, np.nanmax(curve.y)), color=colour, alpha=0.2, lw=0)
    style: dict[str, Any] = {"color": colour, "ls": DASHES[curve.dash], "label": label, "lw": 1.2}
    if curve.kind == "points":
        style |= {"marker": "o", "ms": 3.5, "lw": 0.9}
    axis.plot(x, curve.y, drawstyle="steps-post" if curve.kind == "steps" else "default", **style)
