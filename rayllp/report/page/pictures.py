"""The page's pictures: what Bokeh draws, with its legend, a summary in words, and a table of its values."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.plotting import figure

from rayllp.quantities import write_size
from rayllp.report.gantt import COLOURS as SPAN_COLOURS
from rayllp.report.page.charts import MARK_KINDS, Chart, write_number, write_time
from rayllp.report.page.plots import SOFT, THEME, Bar, colour_of, plot_bars, plot_chart
from rayllp.report.page.records import RunRecord
from rayllp.report.page.workers import PARTS, StepTimeline, TimeSplit, WorkerMemory

TABLE_ROWS = 24
"""Rows of a picture's table for one curve. A curve with more points is divided into this many parts, and the table has their means."""
PART_COLOURS = {"compute": "#3182bd", "send": "#dd1c77", "wait": "#d3d9e0", "other": "#a39bb8"}
MEMORY_COLOURS = {"main memory": "#5b8db8", "GPU": "#6a9f58"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of a legend. `style` is that of a line, or "block" for an area."""

    name: str
    colour: str
    style: str = "block"
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of the page.

    Attributes:
        key: its id on the page, unless it is empty.
        above: what the vertical axis shows.
        summary: the picture in words.
        head, rows: the table of its values.
        plot: what Bokeh draws, in the element of the page that has the plot's id.
    """

    title: str
    caption: str
    keys: Sequence[Key]
    summary: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    plot: figure
    key: str = ""
    above: str = ""


def embed(pictures: Iterable[Picture]) -> dict[str, Any]:
    """Return all plots as the JSON document that Bokeh's script takes."""
    document = Document(theme=THEME)
    with document.models.freeze():  # otherwise Bokeh would recompute its models after each picture
        for picture in pictures:
            document.add_root(picture.plot)
    return document.to_json(deferred=False)  # type: ignore[return-value]


# Charts ---------------------------------------------------------------------------------------------------------------------------


def picture_chart(chart: Chart, runs: Sequence[RunRecord]) -> Picture:
    """Return the picture of a chart of these runs."""
    alone = len(runs) == 1
    keys = [
        Key(name=c.name, style=c.dash, dots=c.kind == "points", colour=colour_of(chart, n, runs) if alone else SOFT)
        for n, c in enumerate(chart.curves)
    ]
    head = ["Run", "Curve", chart.x_label, chart.y_label, "least to largest"]
    return Picture(
        key=chart.key,
        title=chart.title,
        caption=chart.caption,
        above=chart.y_label,
        keys=list(dict.fromkeys(keys)),
        summary=_summary(chart, runs),
        head=head[alone:],
        rows=[row[alone:] for row in _rows(chart, runs)],
        plot=plot_chart(chart, runs),
    )


def _summary(chart: Chart, runs: Sequence[RunRecord]) -> str:
    parts = []
    for curve in chart.curves:
        finite = curve.y[np.isfinite(curve.y)]
        if len(finite):
            first, last, least, most = (write_number(float(v)) for v in (finite[0], finite[-1], finite.min(), finite.max()))
            parts.append(f"{runs[curve.run].name}, {curve.name}: first {first}, last {last}, least {least}, largest {most}")
    marks = [mark.text for mark in chart.marks]
    return f"{chart.title} over {chart.x_label}. " + "; ".join(parts) + (f". Marked: {'; '.join(marks[:12])}" if marks else "")


def _rows(chart: Chart, runs: Sequence[RunRecord]) -> Iterator[list[str]]:
    write = {"count": lambda x: f"{x:,.0f}", "time": write_time, "plain": lambda x: f"{x:g}"}[chart.scale]
    for curve in chart.curves:
        low, high = (curve.y if edge is None else edge for edge in (curve.low, curve.high))
        whole = curve.low is None and len(curve.x) <= (TABLE_ROWS if curve.kind == "line" else 8 * TABLE_ROWS)
        for part in np.array_split(np.arange(len(curve.x)), len(curve.x) if whole else TABLE_ROWS):
            bounds = "" if whole else f"{write_number(float(low[part].min()), 6)} to {write_number(float(high[part].max()), 6)}"
            x, y = float(curve.x[part[-1]]), float(curve.y[part].mean())
            yield [runs[curve.run].name, curve.name, write(x), write_number(y, 6), bounds]


def describe_glyphs(charts: Sequence[Chart]) -> list[tuple[str, str, str]]:
    """Return glyph, name and colour of each kind of mark that occurs in these charts."""
    kinds = {mark.kind for chart in charts for mark in chart.marks}
    return [(look.glyph, look.name, look.colour) for kind, look in MARK_KINDS.items() if kind in kinds]


# Workers --------------------------------------------------------------------------------------------------------------------------


def picture_split(split: TimeSplit) -> Picture:
    """Return a picture of where the time of one kind of step goes, by worker."""
    bars = []
    for rank, worker in enumerate(split.workers):
        ends = np.cumsum([1e3 * worker[part] for part in PARTS])
        for part, begin, end in zip(PARTS, [0.0, *ends], ends, strict=False):
            text = f"worker {rank}, {part}: {write_time(worker[part])}"
            bars.append(Bar(row=str(rank), begin=begin, end=end, name=part, colour=PART_COLOURS[part], text=text))
    return Picture(
        title=f"Where a step's time goes: {split.kind}",
        caption=f"{write_time(split.step_s)} a step; median of {split.steps} timed step{'' if split.steps == 1 else 's'}.",
        keys=[Key(name=part, colour=PART_COLOURS[part]) for part in PARTS],
        summary="Time of a step by worker; the table below has the figures",
        head=["Worker", *PARTS],
        rows=[[str(rank), *(f"{1e3 * worker[part]:.2f}" for part in PARTS)] for rank, worker in enumerate(split.workers)],
        plot=plot_bars(bars, "ms"),
        above="worker",
    )


def picture_memory(workers: Sequence[WorkerMemory]) -> Picture:
    """Return a picture of the peak memory of each worker."""
    gpus = any(worker.cuda is not None for worker in workers)
    bars, rows = [], []
    for worker in workers:
        found = {"main memory": worker.resident} | ({} if worker.cuda is None else {"GPU": worker.cuda})
        rows.append([str(worker.rank), *(write_size(size) for size in found.values())])
        for name, size in found.items():
            row = f"{worker.rank}, GPU" if name == "GPU" else str(worker.rank)
            text = f"worker {worker.rank}, {name}: {write_size(size)}"
            bars.append(Bar(row=row, begin=0.0, end=size / 2**20, name=name, colour=MEMORY_COLOURS[name], text=text))
    return Picture(
        title="Memory by worker",
        caption="The most memory that each process had used up to the last timed step." + ("" if gpus else " Resident, in main memory."),
        keys=[Key(name=name, colour=colour) for name, colour in MEMORY_COLOURS.items()] if gpus else [],
        summary="Memory by worker: " + "; ".join(bar.text for bar in bars),
        head=["Worker", "main memory", *(["GPU"] if gpus else [])],
        rows=rows,
        plot=plot_bars(bars, "MiB"),
        above="worker",
    )


def picture_timeline(timeline: StepTimeline, gpus: bool) -> Picture:
    """Return a picture of what each worker does when in one step."""
    names = list(dict.fromkeys(span.name for spans in timeline.workers for span in spans))
    bars = [
        Bar(
            row=str(rank), begin=1e3 * span.begin, end=1e3 * span.end, name=span.name, colour=SPAN_COLOURS.get(span.name, SOFT),
            text=f"worker {rank}, {span.name}: {write_time(span.seconds)}",
        )
        for rank, spans in enumerate(timeline.workers)
        for span in sorted(spans, key=lambda span: span.name != "wait")  # waiting lies below
    ]  # fmt: skip
    sums = {name: [sum(span.seconds for span in spans if span.name == name) for spans in timeline.workers] for name in names}
    return Picture(
        title=f"Timeline of step {timeline.step}: {timeline.kind}",
        caption="One row per worker; times by each node's clock."
        + (" A GPU's work may go on after the host's span that started it." if gpus else ""),
        keys=[Key(name=name, colour=SPAN_COLOURS.get(name, SOFT)) for name in names],
        summary="Who does what when; the table below has the sums",
        head=["Phase", *(f"worker {rank}" for rank in range(len(timeline.workers)))],
        rows=[[name, *(f"{1e3 * seconds:.2f}" for seconds in sums[name])] for name in names],
        plot=plot_bars(bars, "ms"),
        above="worker",
    )
