"""A chart as data, independent of what draws it (plots.py for the page, png.py for PNG files)."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Floats = np.ndarray
BUCKETS = 400
"""A curve with more than twice this many points is reduced to this many buckets, each with its smallest and largest value."""

COLOURS = ("#0072b2", "#d55e00", "#00865f", "#b8548a", "#9a7400", "#2f9bd6", "#6f4bb8", "#5c5c5c")
"""Colours of runs, or of the curves of a single run, in order; reused if there are more. The colour-blind can distinguish them (after Okabe
and Ito)."""
COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line, or points, of one run.

    Attributes:
        name: what it is, without the run's name.
        run: the run's number on the page, which is its colour.
        x, y: shape (n,); y may have infinite values or NaN, which are marked at the chart's upper edge.
        low, high: smallest and largest value about each x, shape (n,), where a point stands for several; else None.
        kind: "line", "points" (joined by a thin line) or "steps" (constant up to the next x).
        dash: distinguishes the curves of one run.
    """

    name: str
    run: int
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    kind: Literal["line", "points", "steps"] = "line"
    dash: Literal["solid", "dashed", "dotted"] = "solid"


@dataclass(frozen=True)
class MarkKind:
    """How a kind of event is marked.

    Attributes:
        name: its name in the legend.
        glyph: its symbol on the page.
        marker: matplotlib's name of that symbol.
        colour: the symbol's colour on the page of a single run; among several runs, a mark has its run's colour.
    """

    name: str
    glyph: str
    marker: str
    colour: str


MARK_KINDS = {
    "switch": MarkKind("switch", "◆", "D", "#6a3fa0"),
    "fault": MarkKind("fault", "✕", "X", "#c62828"),
    "resize": MarkKind("resize", "▲", "^", "#00796b"),
    "deepen": MarkKind("deepening", "▼", "v", "#1b1f24"),
    "settings": MarkKind("other settings", "●", "o", "#1b1f24"),
}
"""How events are marked, by their kind in events.jsonl; other kinds are not marked."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An event at one x; `kind` is a key of `MARK_KINDS`."""

    x: float
    run: int
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Band:
    """A stretch of x in one mode."""

    begin: float
    end: float
    run: int
    mode: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A labelled horizontal line, such as a threshold."""

    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture.

    Attributes:
        key: its name in file names and links.
        log: True if the vertical axis is logarithmic.
        scale: how x is written: "plain", "count" (in k, M, G) or "time" (x is in seconds).
        zero: True if the vertical axis begins at 0.
        whole: True if its values are whole numbers.
        lanes: True to show the bands of several runs as lanes below the chart, one per run; False to leave them out.
    """

    key: str
    title: str
    caption: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...] = ()
    bands: tuple[Band, ...] = ()
    rules: tuple[Rule, ...] = ()
    log: bool = False
    zero: bool = False
    whole: bool = False
    lanes: bool = False
    scale: Literal["plain", "count", "time"] = "plain"
    x_range: tuple[float, float] = field(init=False)
    y_range: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "x_range", self._find_x_range())
        object.__setattr__(self, "y_range", self._find_y_range())

    @property
    def unit(self) -> tuple[float, str]:
        """The unit of the horizontal axis: its size in units of x, and its name, which is empty where x is written as it is."""
        if self.scale == "time":
            return time_unit(self.x_range[1])
        return next((found for found in COUNTS if self.scale == "count" and self.x_range[1] >= found[0]), (1.0, ""))

    def _find_x_range(self) -> tuple[float, float]:
        found = np.concatenate([*(curve.x for curve in self.curves), *([band.begin, band.end] for band in self.bands)])
        low, high = float(found.min()), float(found.max())
        return (low, high) if high > low else (low - 0.5, high + 0.5)

    def _find_y_range(self) -> tuple[float, float]:
        edges = [edge for curve in self.curves for edge in (curve.y, curve.low, curve.high) if edge is not None]
        found = np.concatenate([*edges, [rule.y for rule in self.rules]])
        found = found[np.isfinite(found) & ((found > 0) if self.log else True)]
        if not len(found):
            return (0.1, 1.0) if self.log else (0.0, 1.0)
        low, high = float(found.min()), float(found.max())
        if self.log:
            room = max((high / low) ** 0.06, 1.05)
            return low / room, high * room
        low = min(low, 0.0) if self.zero else low
        room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        return (low if self.zero else low - room), high + room


@dataclass(frozen=True)
class Thinned:
    """Points that each stand for several, with the smallest and largest value of these; shapes (m,)."""

    x: Floats
    y: Floats
    low: Floats | None
    high: Floats | None


def thin(x: Floats, y: Floats, buckets: int = BUCKETS) -> Thinned:
    """Reduce a curve to `buckets` points: the mean of each bucket, with its smallest and largest value, so that no spike is lost.

    Args:
        x: increasing, shape (n,).
        y: shape (n,). A bucket with a value that is not finite has infinity as its largest value.

    Returns: the points; x and y themselves, without low and high, if they are no more than twice as many.
    """
    if len(x) <= 2 * buckets:
        return Thinned(x, y, None, None)
    starts = np.linspace(0, len(x), buckets, endpoint=False).astype(int)
    sizes = np.diff([*starts, len(x)])
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite.astype(float), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, y, 0.0), starts) / counts
    low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    high = np.where(counts < sizes, np.inf, high)
    return Thinned(np.add.reduceat(x.astype(float), starts) / sizes, mean, low, high)


def write_number(value: float, digits: int = 4) -> str:
    """Return a number as people read it, with a real minus sign; "not finite" for NaN."""
    if np.isnan(value):
        return "not finite"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def write_count(value: float) -> str:
    """Return a number with three significant digits and k, M, G or T."""
    for size, letter in COUNTS:
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:g}"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit in which a time of this length is best written: its seconds and its name."""
    return (1.0, "s") if seconds < 300 else (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")


def write_time(seconds: float) -> str:
    """Return a time in the unit that suits it, such as "1.5 min"."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    size, unit = time_unit(seconds)
    return f"{seconds / size:.3g} {unit}"
