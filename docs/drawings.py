"""The drawings of docs/how.md, made from the hierarchy and the schedule that train.

    python docs/drawings.py        # writes docs/images/{levels,vcycle,buffers,schedule}.svg

Plain SVG with two sets of colours: a page's light or dark scheme picks one. Where a C-point is, who owns it, and what a worker does when
are asked of `rayllp.mgrit` and `rayllp.plan`, so that a picture cannot say other than the code.
"""

from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

from rayllp.config import make_config
from rayllp.control import Controller
from rayllp.mgrit import Hierarchy, build_hierarchy
from rayllp.plan import Costs, Prediction, predict

WORKERS, LAYERS, COARSENING = 4, 16, 4
FOLDER = Path(__file__).parent / "images"

STYLE = """
svg { --ink: #1f2933; --soft: #52606d; --line: #9aa5b1; --band: #eef2f6; --band2: #dfe6ee; --paper: #ffffff; --c: #c2410c; --f: #2563eb;
      --coarse: #9a3412; --sweep: #3b82f6; --adjoint: #ea8a3a; --extra: #7c8794; font: 14px system-ui, "Segoe UI", Roboto, sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e4e7eb; --soft: #a9b4c0; --line: #66717d; --band: #262c38; --band2: #323a49; --paper: #1e2129; --c: #fb923c; --f: #60a5fa;
        --coarse: #fdba74; --sweep: #3b7de0; --adjoint: #c96f22; --extra: #6b7683 }
}
text { fill: var(--ink) } .soft { fill: var(--soft); font-size: 13px } .bold { font-weight: 600 } .mid { text-anchor: middle }
.band { fill: var(--band) } .band2 { fill: var(--band2) } .line { stroke: var(--line); stroke-width: 1.2; fill: none }
.dash { stroke: var(--line); stroke-width: 1.2; stroke-dasharray: 3 4; fill: none }
.c { fill: var(--c) } .f { fill: var(--paper); stroke: var(--f); stroke-width: 2 }
.idle { fill: var(--paper); stroke: var(--line); stroke-width: 1.5 }
.go { stroke: var(--f); stroke-width: 2; fill: none } .go2 { stroke: var(--c); stroke-width: 2.4; fill: none }
.tip { fill: var(--f) } .tip2 { fill: var(--c) }
.coarse { fill: var(--coarse) } .sweep { fill: var(--sweep) } .adjoint { fill: var(--adjoint) } .extra { fill: var(--extra) }
"""


class Drawing:
    """An SVG in the making; all lengths in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def add(self, tag: str, content: str | None = None, **attributes: float | str) -> None:
        """An element; a trailing underscore of a name is dropped, other ones become hyphens."""
        values = " ".join(f'{name.rstrip("_").replace("_", "-")}="{_short(value)}"' for name, value in attributes.items())
        self.parts.append(f"<{tag} {values}/>" if content is None else f"<{tag} {values}>{escape(content)}</{tag}>")

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Words; `kind` are classes of STYLE."""
        self.add("text", words, x=x, y=y, class_=kind)

    def box(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 4) -> None:
        """A rectangle."""
        self.add("rect", x=x, y=y, width=width, height=height, rx=radius, class_=kind)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line", tip: str = "") -> None:
        """A line, with an arrow's tip at its end."""
        marker = {"marker-end": f"url(#{tip})"} if tip else {}
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind, **marker)

    def arc(self, x1: float, x2: float, y: float, rise: float, kind: str, tip: str) -> None:
        """An arrow over the points between its ends."""
        self.add(
            "path",
            d=f"M{_short(x1)} {_short(y)} Q{_short((x1 + x2) / 2)} {_short(y - rise)} {_short(x2)} {_short(y)}",
            class_=kind,
            marker_end=f"url(#{tip})",
        )

    def point(self, x: float, y: float, is_c: bool, kind: str | None = None) -> None:
        """A C-point (a square) or an F-point (a circle)."""
        if is_c:
            self.box(x - 7, y - 7, 14, 14, kind or "c", 2)
        else:
            self.add("circle", cx=x, cy=y, r=6, class_=kind or "f")

    def __str__(self) -> str:
        tips = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse" '
            f'orient="auto"><path d="M0 0 8 4 0 8z" class="{name}"/></marker>'
            for name in ("tip", "tip2")
        )
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        return "\n".join(
            [head, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>", f"<defs>{tips}</defs>", *self.parts, "</svg>\n"]
        )


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


# Where things are on levels.svg and vcycle.svg --------------------------------------------------------------------------------------

LEFT, GAP = 150, 34


def place(layer: int) -> float:
    """The abscissa of a layer's input."""
    return LEFT + 26 + layer * GAP


def bands(drawing: Drawing, hierarchy: Hierarchy, top: float, bottom: float) -> None:
    """A band for each worker's layers, with its name."""
    owners = hierarchy.levels[0].owners
    for worker in range(WORKERS):
        mine = [layer for layer, owner in enumerate(owners) if owner == worker]
        left, right = place(mine[0]) - GAP / 2, place(mine[-1]) + GAP / 2
        drawing.box(left + 2, top, right - left - 4, bottom - top, "band", 8)
        drawing.text((left + right) / 2, top - 8, f"worker {worker}", "soft mid")


def steps(drawing: Drawing, y: float, pairs: Iterable[tuple[int, int]], kind: str = "go", tip: str = "tip") -> None:
    """Arrows from point to point."""
    for start, end in pairs:
        drawing.line(place(start) + 8, y, place(end) - 8, y, kind, tip)


def levels() -> Drawing:
    """Three levels over 16 layers: C-points go down, F-points stay."""
    hierarchy = build_hierarchy(blocks=[LAYERS // WORKERS] * WORKERS, levels=3, coarsening=[COARSENING, 2])
    drawing = Drawing(740, 320, "Three levels over 16 layers on 4 workers: squares are C-points, circles F-points")
    bands(drawing, hierarchy, 34, 262)
    for depth, level in enumerate(hierarchy.levels):
        y = 74 + depth * 84
        size = len(level.layers)
        step = "Δt" if depth == 0 else f"{round(level.ratios[0])} Δt"
        drawing.text(8, y - 1, f"level {depth}", "bold")
        drawing.text(8, y + 17, f"{size} steps of {step}", "soft")
        reach = level.layers[1] - level.layers[0]
        if depth == 0:
            steps(drawing, y, ((n, n + 1) for n in range(size - 1)))
        else:
            for start in level.layers[:-1]:
                drawing.arc(
                    place(start) + 9,
                    place(start + reach) - 9,
                    y - 3,
                    14 + 7 * depth,
                    "go2" if depth == 2 else "go",
                    "tip2" if depth == 2 else "tip",
                )
        coarser = hierarchy.levels[depth + 1].layers if depth + 1 < len(hierarchy.levels) else ()
        for layer in level.layers:
            if layer in coarser:
                drawing.line(place(layer), y + 12, place(layer), y + 70, "dash")
            drawing.point(place(layer), y, layer in coarser or depth == 2)
            if depth == 0:
                drawing.text(place(layer), y + 28, str(layer), "soft mid") if layer not in coarser else drawing.text(
                    place(layer) + 11, y + 28, str(layer), "soft mid"
                )
    drawing.point(LEFT + 20, 292, True)
    drawing.text(LEFT + 34, 297, "C-point: also on the next level", "soft")
    drawing.point(LEFT + 274, 292, False)
    drawing.text(LEFT + 288, 297, "F-point: on this level alone", "soft")
    return drawing


def vcycle() -> Drawing:
    """The five phases of a two-level V-cycle, from top to bottom."""
    hierarchy = build_hierarchy(blocks=[LAYERS // WORKERS] * WORKERS, levels=2, coarsening=COARSENING)
    fine, coarse = hierarchy.levels
    last = {end - 1 for end in (*fine.c_points[1:], LAYERS)}
    inside = [(n, n + 1) for n in range(LAYERS - 1) if n not in last]
    drawing = Drawing(930, 470, "A V-cycle over 4 workers: relax, restrict, solve coarsely, correct, sweep")
    bands(drawing, hierarchy, 34, 424)
    rows = {
        "relax": (66, "each interval from its C-point", "all at once"),
        "restrict": (146, "C-points' residuals go down", "all at once"),
        "coarse solve": (236, f"{len(coarse.layers) - 1} steps of {COARSENING} Δt", "one by one"),
        "correct": (306, "C-points take the result", "all at once"),
        "last sweep": (396, "every layer, with its graph", "all at once"),
    }
    right = place(LAYERS - 1) + GAP / 2 + 16
    for number, (name, (y, what, order)) in enumerate(rows.items(), 1):
        drawing.text(8, y, f"{number} {name}", "bold")
        drawing.text(right, y, what, "soft")
        drawing.text(right, y + 19, order, "bold" if order == "one by one" else "soft")
    for name in ("relax", "last sweep"):
        y = rows[name][0]
        steps(drawing, y, inside)
        if name == "last sweep":  # the interval's last layer too, towards the next worker
            for n in last:
                drawing.line(place(n) + 8, y, place(n) + 18, y, "go", "tip")
        for n in range(LAYERS):
            drawing.point(place(n), y, n in fine.c_points)
    for name, is_down in (("restrict", True), ("correct", False)):
        y = rows[name][0]
        for n in range(LAYERS):
            if n in fine.c_points:
                top, bottom = (y + 9, y + 33) if is_down else (y + 33, y + 9)
                drawing.line(place(n), top, place(n), bottom, "go2", "tip2")
            drawing.point(place(n), y, n in fine.c_points, None if n in fine.c_points else "idle")
    y = rows["coarse solve"][0]
    steps(drawing, y, zip(coarse.layers, coarse.layers[1:], strict=False), "go2", "tip2")
    for number, n in enumerate(coarse.layers):
        drawing.point(place(n), y, True)
        if number:
            middle = (place(n) + place(coarse.layers[number - 1])) / 2
            drawing.text(middle, y - 10, f"step {number}", "soft mid")
    drawing.text(
        place(0) - 24,
        452,
        "Only states cross from worker to worker. The first iteration is 3, 4 and 5; phase 5 comes once, at the end.",
        "soft",
    )
    return drawing


def buffers() -> Drawing:
    """2 + 16 + 2 layers, by number and by time."""
    config = make_config({"model": {"layers": 20}, "workers": WORKERS, "buffers": {"open": 2, "close": 2}, "step": {"middle": "1/N"}})
    drawing = Drawing(760, 300, "Buffer layers: two at each end with a step of 1, sixteen in the middle with a step of 1/16")
    count, left, width = config.model.layers, 20.0, 36.0
    opening, middle = config.buffers.open, config.middle_layers
    sizes = [config.step.buffer if n < opening or n >= opening + middle else config.middle_step for n in range(count)]
    owners = (
        [0] * opening + [worker for worker, block in enumerate(config.blocks) for _ in range(block)] + [WORKERS - 1] * config.buffers.close
    )
    scale = count * width / sum(sizes)
    drawing.text(left, 24, "layers, by worker", "bold")
    drawing.text(left, 216, "the same layers, by time: Δt = 1 each in the buffers, 1/16 in the middle", "bold")
    time = 0.0
    for n in range(count):
        is_buffer = sizes[n] == config.step.buffer
        x = left + n * width
        drawing.box(x + 1, 62, width - 2, 40, "extra" if is_buffer else ("sweep" if owners[n] % 2 == 0 else "coarse"))
        begin, end = left + time * scale, left + (time + sizes[n]) * scale
        drawing.line(x + width / 2, 104, (begin + end) / 2, 152, "dash" if is_buffer else "line")
        drawing.box(begin + 0.5, 154, end - begin - 1, 40, "extra" if is_buffer else ("sweep" if owners[n] % 2 == 0 else "coarse"), 1)
        time += sizes[n]
    for worker in range(WORKERS):
        mine = [n for n in range(count) if owners[n] == worker]
        middle_x = left + (mine[0] + mine[-1] + 1) / 2 * width
        drawing.text(middle_x, 52, f"worker {worker}", "soft mid")
    drawing.box(left, 246, 14, 14, "extra", 2)
    drawing.text(left + 22, 258, "buffers: serial, on the first and the last worker", "soft")
    drawing.box(left + 350, 246, 7, 14, "sweep", 1)
    drawing.box(left + 358, 246, 7, 14, "coarse", 1)
    drawing.text(left + 374, 258, "the middle: solved by MGRIT, a block a worker", "soft")
    return drawing


def schedule() -> Drawing:
    """Who does what when in one step, by the planner's logical clocks."""
    settings = {
        "model": {"layers": 32}, "workers": WORKERS, "mode": "parallel", "buffers": {"open": 0, "close": 0},
        "solver": "mgrit", "mgrit": {"coarsening": COARSENING, "iterations": {"forward": 1, "backward": 1}},
    }  # fmt: skip
    config = make_config(settings)
    costs = Costs(forward=1.0, record=1.0, input_gradient=1.0, full_gradient=2.0)
    found: Prediction = predict(config, Controller(config).accuracy, costs)
    serial = 32 * (costs.record + costs.full_gradient)
    drawing = Drawing(760, 300, "A step of 32 layers on 4 workers, by worker and time")
    left, top, height, scale = 90.0, 40.0, 34.0, 650 / found.step_s
    drawing.text(
        left,
        24,
        f"one step, 32 layers, c_f = 4, 1+1 iterations: {found.step_s:.0f} units of time; one worker, serially: {serial:.0f}",
        "soft",
    )
    for worker, spans in enumerate(found.spans):
        y = top + worker * (height + 8)
        drawing.text(8, y + 22, f"worker {worker}", "bold")
        drawing.box(left, y, 650, height, "band", 3)
        for span in spans:
            if span.kind != "compute":
                continue
            kind = "coarse" if span.phase == "coarse solve" else "sweep" if span.solve == "forward" else "adjoint"
            drawing.box(left + span.begin * scale + 0.5, y + 2, span.seconds * scale - 1, height - 4, kind, 2)
    y = top + WORKERS * (height + 8) + 22
    for x, kind, words in (
        (0, "coarse", "coarse chain, forward and adjoint"),
        (250, "sweep", "last forward sweep"),
        (410, "adjoint", "last adjoint sweep"),
        (570, "band2", "waiting"),
    ):
        drawing.box(left + x, y, 14, 14, kind, 2)
        drawing.text(left + x + 22, y + 12, words, "soft")
    drawing.text(left, y + 44, "Time goes to the right. A box is a layer; a gradient takes twice a forward.", "soft")
    return drawing


def drawings() -> dict[str, str]:
    """All of them, by the file's name."""
    return {f"{make.__name__}.svg": str(make()) for make in (levels, vcycle, buffers, schedule)}


if __name__ == "__main__":
    for name, text in drawings().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
