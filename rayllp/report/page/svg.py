"""Charts as inline SVG with HTML about it.

The SVG holds curves alone and is stretched to whatever width the page has; its strokes are not. Ticks, marks and names are HTML, placed in
percent, so that they have one size on a phone, on a desk and on paper.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayllp.report.page.charts import Chart, Curve, Floats, log_ticks, nice_ticks, time_unit, write_count, write_number, write_time
from rayllp.report.page.figures import MARKED
from rayllp.report.page.records import RunRecord
from rayllp.report.page.workers import StepTimeline
from rayllp.timeline import Span

WIDTH, HEIGHT = 1000.0, 300.0
TABLE_ROWS = 24
"""Of a curve with more points the table has means, over so many stretches of it."""
MANY = 60
"""Points beyond this are drawn small."""
GLYPHS = {"switch": "◆", "fault": "✕", "resize": "▲", "deepen": "▼", "settings": "●"}


@dataclass(frozen=True, kw_only=True)
class Tick:
    """At so many percent of the axis; a minor one is left out on narrow pages."""

    at: float
    text: str
    minor: bool = False


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Something at so many percent of the width."""

    at: float
    run: int
    kind: str
    glyph: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """From and over so many percent of the width."""

    at: float
    width: float
    run: int
    mode: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What the page's template makes a figure of.

    Attributes:
        paths: SVG paths: how it is drawn, classes of its colour, `d`.
        data: the curves' values, for the script that shows them under the pointer.
        summary: the picture in words.
        rows: of the table behind the picture.
        styles: names of curves, each once, with how they are drawn and, where there is one run, classes of their colour.
    """

    chart: Chart
    paths: Sequence[tuple[str, str, str]]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    rules: Sequence[Tick]
    marks: Sequence[Placed]
    bands: Sequence[Stretch]
    lanes: Sequence[tuple[int, Sequence[Stretch]]]
    x_label: str
    data: dict[str, Any]
    summary: str
    rows: Sequence[Sequence[str]]
    styles: Sequence[tuple[str, str, str]]


def draw(chart: Chart, runs: Sequence[RunRecord]) -> Drawing:
    """A chart, of these runs."""
    size, unit = time_unit(chart.x_range[1]) if chart.scale == "time" else (1.0, "")
    bands = [
        Stretch(at=_x(chart, band.begin), width=_x(chart, band.end) - _x(chart, band.begin), run=band.run, mode=band.mode)
        for band in chart.bands
    ]
    alone = len(runs) == 1
    colours = [f"r0 k{n}" if alone else f"r{curve.run}" for n, curve in enumerate(chart.curves)]  # of one run curves have one each
    return Drawing(
        chart=chart,
        paths=[(style, colours[n], d) for n, curve in enumerate(chart.curves) for style, d in _paths(chart, curve)],
        x_ticks=_x_ticks(chart, size),
        y_ticks=[Tick(at=_y(chart, tick), text=write_number(tick, 3)) for tick in _y_ticks(chart)],
        rules=[Tick(at=_y(chart, rule.y), text=rule.text) for rule in chart.rules],
        marks=[
            Placed(at=_x(chart, mark.x), run=mark.run, kind=mark.kind, glyph=GLYPHS.get(mark.kind, "●"), text=mark.text)
            for mark in chart.marks
        ],
        bands=bands if alone else [],
        lanes=[] if alone or not chart.lanes else _lanes(bands),
        x_label=f"{chart.x_label}, {unit}" if unit else chart.x_label,
        data=_data(chart, colours),
        summary=_summary(chart, runs),
        rows=list(_rows(chart, runs)),
        styles=list(dict.fromkeys((c.name, _style(c), colours[n] if alone else "") for n, c in enumerate(chart.curves))),
    )


def _x(chart: Chart, value: float) -> float:
    low, high = chart.x_range
    return 100 * (value - low) / (high - low)


def _y(chart: Chart, value: float) -> float:
    """Percent from the top; what is not finite, or has no logarithm, at the edge."""
    low, high = chart.y_range
    if not math.isfinite(value):
        return 0.0
    if chart.log and value <= 0:
        return 100.0
    share = math.log(value / low) / math.log(high / low) if chart.log else (value - low) / (high - low)
    return 100 * (1 - min(1.0, max(0.0, share)))


def _x_ticks(chart: Chart, size: float) -> list[Tick]:
    low, high = chart.x_range
    places = [size * tick for tick in nice_ticks(low / size, high / size)]
    write = write_count if chart.scale == "count" or high >= 10_000 else lambda value: f"{value:g}"
    return [Tick(at=_x(chart, place), text=write(place / size), minor=n % 2 == 1) for n, place in enumerate(places)]


def _lanes(bands: Sequence[Stretch]) -> list[tuple[int, list[Stretch]]]:
    return [(run, [band for band in bands if band.run == run]) for run in sorted({band.run for band in bands})]


def _y_ticks(chart: Chart) -> list[float]:
    ticks = log_ticks(*chart.y_range) if chart.log else nice_ticks(*chart.y_range)
    return [tick for tick in ticks if tick.is_integer()] if chart.whole else ticks


def _style(curve: Curve) -> str:
    return f"{curve.kind} {curve.dash}"


def _paths(chart: Chart, curve: Curve) -> list[tuple[str, str]]:
    points = [(10 * _x(chart, x), 3 * _y(chart, y)) for x, y in zip(curve.x.tolist(), curve.y.tolist(), strict=True)]
    style, found = _style(curve), []
    if curve.low is not None and curve.high is not None:
        xs = [10 * _x(chart, x) for x in curve.x.tolist()]
        upper = list(zip(xs, (3 * _y(chart, y) for y in curve.high.tolist()), strict=True))
        lower = list(zip(xs, (3 * _y(chart, y) for y in curve.low.tolist()), strict=True))
        found.append(("shade", _line([*upper, *reversed(lower)]) + "Z"))
    if curve.kind == "steps":
        corners = [corner for (x, y), (after, _) in zip(points, [*points[1:], points[-1]], strict=True) for corner in ((x, y), (after, y))]
        return [*found, (f"curve {style}", _line(corners))]
    if len(points) > 1:
        found.append((f"curve {style}", _line(points)))
    if curve.kind == "points" or len(points) == 1:
        many = " many" if len(points) > MANY else ""
        found.append((f"dots {curve.dash}{many}", "".join(f"M{x:.1f} {y:.1f}h.1" for x, y in points)))
    return found


def _line(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


# What else is said of a chart -----------------------------------------------------------------------------------------------------


def _data(chart: Chart, colours: Sequence[str]) -> dict[str, Any]:
    curves = []
    for curve, colour in zip(chart.curves, colours, strict=True):
        entry: dict[str, Any] = {
            "name": curve.name,
            "run": curve.run,
            "colour": colour,
            "x": _short(curve.x),
            "y": _short(curve.y),
            "steps": curve.kind == "steps",
        }
        if curve.low is not None and curve.high is not None:
            entry |= {"low": _short(curve.low), "high": _short(curve.high)}
        curves.append(entry)
    return {"range": list(chart.x_range), "scale": chart.scale, "label": chart.x_label, "curves": curves}


def _short(values: Floats) -> list[float | None]:
    """Six digits are enough to read; None is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _summary(chart: Chart, runs: Sequence[RunRecord]) -> str:
    parts = []
    for curve in chart.curves:
        finite = curve.y[np.isfinite(curve.y)]
        if len(finite):
            first, last, least, most = (write_number(float(v)) for v in (finite[0], finite[-1], finite.min(), finite.max()))
            parts.append(f"{runs[curve.run].name}, {curve.name}: first {first}, last {last}, least {least}, largest {most}")
    marks = [mark.text for mark in chart.marks]
    return f"{chart.title} over {chart.x_label}. " + "; ".join(parts) + (f". Marked: {'; '.join(marks[:12])}" if marks else "")


def _rows(chart: Chart, runs: Sequence[RunRecord]) -> Iterable[list[str]]:
    write = {"count": lambda x: f"{x:,.0f}", "time": write_time, "plain": lambda x: f"{x:g}"}[chart.scale]
    for curve in chart.curves:
        low, high = (curve.y if edge is None else edge for edge in (curve.low, curve.high))
        whole = curve.low is None and len(curve.x) <= (TABLE_ROWS if curve.kind == "line" else 8 * TABLE_ROWS)
        for part in np.array_split(np.arange(len(curve.x)), len(curve.x) if whole else TABLE_ROWS):
            bounds = "" if whole else f"{write_number(float(low[part].min()), 6)} to {write_number(float(high[part].max()), 6)}"
            x, y = float(curve.x[part[-1]]), float(curve.y[part].mean())
            yield [runs[curve.run].name, curve.name, write(x), write_number(y, 6), bounds]


def describe_glyphs(charts: Sequence[Chart]) -> list[tuple[str, str, str]]:
    """Kind, glyph and name of the marks that there are."""
    kinds = {mark.kind for chart in charts for mark in chart.marks}
    return [(kind, GLYPHS[kind], name) for kind, name in MARKED.items() if kind in kinds]


# A step's timeline ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GanttRow:
    """One worker: of each kind of span a path, its name and seconds."""

    rank: int
    bars: Sequence[tuple[str, str, float]]


@dataclass(frozen=True, kw_only=True)
class Gantt:
    """A row a worker, time to the right.

    Attributes:
        names: of spans, in their order of appearance, each with all workers' seconds.
    """

    timeline: StepTimeline
    rows: Sequence[GanttRow]
    ticks: Sequence[Tick]
    names: Sequence[tuple[str, tuple[float, ...]]]


def draw_gantt(timeline: StepTimeline) -> Gantt:
    """A step's timeline; spans of one kind that touch at the page's resolution become one."""
    scale = WIDTH / timeline.seconds
    rows = []
    for rank, spans in enumerate(timeline.workers):
        names = sorted(dict.fromkeys(span.name for span in spans), key=lambda name: name != "wait")  # waiting lies below
        bars = [(name, _bars([span for span in spans if span.name == name], scale), _total(spans, name)) for name in names]
        rows.append(GanttRow(rank=rank, bars=bars))
    seen = dict.fromkeys(span.name for spans in timeline.workers for span in spans)
    return Gantt(
        timeline=timeline,
        rows=rows,
        ticks=[
            Tick(at=100 * tick / (1e3 * timeline.seconds), text=f"{tick:g}", minor=n % 2 == 1)
            for n, tick in enumerate(nice_ticks(0.0, 1e3 * timeline.seconds))
        ],
        names=[(name, tuple(_total(spans, name) for spans in timeline.workers)) for name in seen],
    )


def _total(spans: Sequence[Span], name: str) -> float:
    return sum(span.seconds for span in spans if span.name == name)


def _bars(spans: Sequence[Span], scale: float) -> str:
    merged: list[list[float]] = []
    for span in sorted(spans):
        begin, end = scale * span.begin, scale * span.end
        if merged and begin - merged[-1][1] < 0.4:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([begin, end])
    return "".join(f"M{begin:.1f} 0h{max(end - begin, 0.3):.1f}v10h{-max(end - begin, 0.3):.1f}z" for begin, end in merged)
