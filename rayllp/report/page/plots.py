"""Draws charts and bars as Bokeh figures.

All curves of a chart share one renderer, so that the pointer finds all of them at once, and so do all its marks and so on. Each data source
has a column `run`, by which the page's script hides runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    BooleanFilter,
    CDSView,
    ColumnDataSource,
    Glyph,
    HBar,
    HoverTool,
    Label,
    MultiLine,
    Node,
    Patches,
    PrintfTickFormatter,
    Quad,
    Range1d,
    Scatter,
    Span,
    Text,
    VSpan,
    VStrip,
)
from bokeh.plotting import figure
from bokeh.themes import Theme

from rayllp.report.page.charts import COLOURS, MARK_KINDS, Chart, Floats, write_number
from rayllp.report.page.records import RunRecord

SOFT, SERIAL = "#5a6472", "#e7e3f3"
MANY = 60
"""The points of a curve with more than this many are drawn small."""
HEIGHT, LANE, MARK = 280, 8, 20
"""Heights in pixels: of a chart, from one lane to the next, and of a mark."""

_FONT = {"text_font": "system-ui, sans-serif", "text_font_size": "12px", "text_color": SOFT, "text_font_style": "normal"}
THEME = Theme(
    json={
        "attrs": {
            "Plot": {"background_fill_color": None, "border_fill_color": None, "outline_line_color": None, "min_border": 6},
            "Axis": {
                "axis_line_color": "#b5bcc5", "major_tick_line_color": "#b5bcc5", "minor_tick_line_color": None, "major_tick_in": 0,
                **{f"{part}_{name}": value for part in ("axis_label", "major_label") for name, value in _FONT.items()},
            },
            "Grid": {"grid_line_color": "#e6e9ed"},
            "Label": _FONT,
        }
    }
)  # fmt: skip


def colour_of(chart: Chart, number: int, runs: Sequence[RunRecord]) -> str:
    """Return a curve's colour: that of its run, or one of its own if there is only one run."""
    return COLOURS[(number if len(runs) == 1 else chart.curves[number].run) % len(COLOURS)]


# Charts ---------------------------------------------------------------------------------------------------------------------------


def plot_chart(chart: Chart, runs: Sequence[RunRecord]) -> figure:
    """Return a figure of a chart of these runs. Dragging zooms, and values are shown under the pointer."""
    size, unit = chart.unit
    lanes = sorted({band.run for band in chart.bands}) if chart.lanes and len(runs) > 1 else []
    plot = _figure(
        height=HEIGHT,
        x_range=_range(chart.x_range[0] / size, chart.x_range[1] / size, 0.01, 0.01),
        y_range=_range(*chart.y_range, LANE * (len(lanes) + chart.log) / HEIGHT, MARK / HEIGHT, chart.log),
        y_axis_type="log" if chart.log else "linear",
        x_axis_label=f"{chart.x_label}, {unit}" if unit else chart.x_label,
    )
    plot.xaxis.formatter.use_scientific = False
    plot.yaxis.formatter = PrintfTickFormatter(format="%.6g")
    if chart.log:
        plot.yaxis.ticker.desired_num_ticks = 6
    if chart.whole:
        plot.yaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    _bands(plot, chart, lanes, size, alone=len(runs) == 1)
    _curves(plot, chart, runs, size)
    _marks(plot, chart, runs, size)
    for rule in chart.rules:
        plot.add_layout(Span(location=rule.y, dimension="width", line_color=SOFT, line_dash="dashed", line_width=1))
        place = {"x": Node(target="frame", symbol="right", offset=-4), "y": rule.y, "text_align": "right"}
        plot.add_layout(Label(text=rule.text, text_baseline="top", y_offset=-2, **place))
    return plot


def _range(low: float, high: float, below: float, above: float, log: bool = False) -> Range1d:
    """Return the range from `low` to `high`, padded by the fractions `below` and `above` of its length (if `log`, on that scale)."""
    if log:
        return Range1d(low / (high / low) ** below, high * (high / low) ** above)
    return Range1d(low - below * (high - low), high + above * (high - low))


def _figure(**more: Any) -> figure:
    look = {"sizing_mode": "stretch_width", "output_backend": "svg", "toolbar_location": "above"}
    plot = figure(tools="box_zoom,pan,reset", active_drag="box_zoom", **look, **more)
    plot.toolbar.update(logo=None, autohide=True)
    return plot


class _Rows:
    """The columns of a Bokeh data source, filled row by row."""

    def __init__(self, *names: str) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in names}

    def add(self, *values: Any) -> None:
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def draw(self, plot: figure, glyph: Glyph, text: str = "", **hover: Any) -> None:
        """Draw the rows on a figure, with this text under the pointer; draw nothing if there are no rows."""
        columns = list(self.columns.values())
        if not columns[0]:
            return
        more = {"view": CDSView(filter=BooleanFilter())} if len(set(self.columns.get("run", ()))) > 1 else {}
        renderer = plot.add_glyph(ColumnDataSource(self.columns), glyph, **more)
        if text:
            box = f'<div style="font-size:12px;max-width:min(20rem,45vw);white-space:normal">{text}</div>'
            plot.add_tools(HoverTool(renderers=[renderer], tooltips=box, visible=False, **hover))


def _curves(plot: figure, chart: Chart, runs: Sequence[RunRecord], size: float) -> None:
    columns = ("xs", "ys", "name", "run", "colour", "dash", "width")
    curves, points, shades = _Rows(*columns), _Rows("x", "y", "run", "colour", "size"), _Rows("xs", "ys", "run", "colour")
    beyond = _Rows("x", "y", "text", "run", "colour", "marker")
    for number, curve in enumerate(chart.curves):
        colour, x = colour_of(chart, number, runs), curve.x / size
        name = curve.name if len(runs) == 1 else f"{runs[curve.run].name}, {curve.name}"
        drawn = _can_be_drawn(chart, curve.y)
        y = np.where(drawn, curve.y, np.nan)
        if curve.low is not None and curve.high is not None:
            edges = [np.clip(np.nan_to_num(edge, nan=np.inf), plot.y_range.start, plot.y_range.end) for edge in (curve.high, curve.low)]
            outline = np.concatenate([x, x[::-1]]), np.concatenate([edges[0], edges[1][::-1]])
            shades.add(*(_short(part) for part in outline), curve.run, colour)
            for part, edge in (("largest", curve.high), ("least", curve.low)):  # lines of width 0: not seen, but the pointer finds them
                seen = _short(np.where(_can_be_drawn(chart, edge), edge, np.nan))
                curves.add(_short(x), seen, f"{name}, {part}", curve.run, colour, "solid", 0)
        line = (np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]) if curve.kind == "steps" else (x, y)
        curves.add(*(_short(part) for part in line), name, curve.run, colour, curve.dash, 1.1 if curve.kind == "points" else 1.6)
        if curve.kind == "points" or len(x) == 1:
            dots = 4 if len(x) > MANY else 6
            for at, value in zip(_short(x[drawn]), _short(y[drawn]), strict=True):
                points.add(at, value, curve.run, colour, dots)
        for at, value in zip(x[~drawn], curve.y[~drawn], strict=True):
            low = chart.log and -np.inf < value <= 0
            text = f"{name}: {write_number(float(value))}"
            beyond.add(float(at), chart.y_range[0 if low else 1], text, curve.run, colour, "inverted_triangle" if low else "triangle")
    shades.draw(plot, Patches(xs="xs", ys="ys", fill_color="colour", fill_alpha=0.18, line_color=None))
    values = '<span style="color:@colour">■</span> @name: <b>$snap_y</b> at $snap_x{0,0.[00]}'
    policy = "prev" if any(curve.kind == "steps" for curve in chart.curves) else "nearest"
    lines = MultiLine(xs="xs", ys="ys", line_color="colour", line_dash="dash", line_width="width")
    curves.draw(plot, lines, values, mode="vline", line_policy=policy)
    points.draw(plot, Scatter(x="x", y="y", fill_color="colour", line_color="colour", size="size"))
    beyond.draw(plot, Scatter(x="x", y="y", fill_color="colour", line_color="colour", marker="marker", size=9), "@text")


def _can_be_drawn(chart: Chart, values: Floats) -> Floats:
    return np.isfinite(values) & (values > 0 if chart.log else True)


def _marks(plot: figure, chart: Chart, runs: Sequence[RunRecord], size: float) -> None:
    marks = _Rows("x", "y", "glyph", "text", "kind", "run", "colour")
    for mark in chart.marks:
        kind = MARK_KINDS[mark.kind]
        colour = kind.colour if len(runs) == 1 else COLOURS[mark.run % len(COLOURS)]
        marks.add(mark.x / size, plot.y_range.end, kind.glyph, mark.text, mark.kind, mark.run, colour)
    spans = VSpan(x="x", line_color="colour", line_dash="dotted", line_alpha=0.8)
    marks.draw(plot, spans, '<span style="color:@colour">@kind</span>, @text', attachment="vertical")
    middle = {"text_align": "center", "text_baseline": "top"}
    marks.draw(plot, Text(x="x", y="y", text="glyph", text_color="colour", text_font_size={"value": "13px"}, **middle))


def _bands(plot: figure, chart: Chart, lanes: Sequence[int], size: float, *, alone: bool) -> None:
    """Shade the chart where a single run is serial; give each of several runs a lane at the chart's foot, pale where it is serial."""
    bands = _Rows("left", "right", "bottom", "top", "run", "colour", "alpha")
    upper, lower = chart.y_range[0], plot.y_range.start
    for band in chart.bands:
        place = [band.begin / size, band.end / size]
        serial = band.mode == "serial"
        if band.run in lanes:
            edges = [(lanes.index(band.run) + share) / len(lanes) for share in (0.15, 0.85)]
            edges = [upper * (lower / upper) ** edge if chart.log else upper + edge * (lower - upper) for edge in edges]
            bands.add(*place, *edges[::-1], band.run, COLOURS[band.run % len(COLOURS)], 0.3 if serial else 1.0)
        elif alone and serial:
            bands.add(*place, 0, 0, band.run, SERIAL, 1.0)
    look = {"fill_color": "colour", "fill_alpha": "alpha", "line_color": None}
    if alone:
        bands.draw(plot, VStrip(x0="left", x1="right", **look))
    else:
        bands.draw(plot, Quad(left="left", right="right", bottom="bottom", top="top", **look))


# Bars -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A horizontal bar from one value to another.

    Attributes:
        row: label of its row.
        name: name of what it shows.
        text: what is shown under the pointer.
    """

    row: str
    begin: float
    end: float
    name: str
    colour: str
    text: str


def plot_bars(bars: Sequence[Bar], label: str) -> figure:
    """Return a figure of bars in rows, the first one at the top; `label` names the horizontal axis."""
    rows = list(dict.fromkeys(bar.row for bar in bars))
    plot = _figure(height=70 + 22 * len(rows), x_range=Range1d(0, max(bar.end for bar in bars)), y_range=rows[::-1], x_axis_label=label)
    plot.ygrid.visible = False
    source = _Rows("row", "begin", "end", "name", "colour", "text")
    for bar in bars:
        source.add(bar.row, *_short(np.array([bar.begin, bar.end])), bar.name, bar.colour, bar.text)
    drawn = HBar(y="row", left="begin", right="end", height=0.8, fill_color="colour", line_color=None)
    source.draw(plot, drawn, '<span style="color:@colour">■</span> @text', point_policy="follow_mouse")
    return plot


def _short(values: Floats) -> list[float]:
    """Return the values rounded to six significant digits, which keeps the page small."""
    return [float(f"{value:.6g}") for value in values.tolist()]
