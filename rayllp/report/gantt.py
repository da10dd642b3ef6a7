"""The timeline of a step as a picture, and as a trace file for ui.perfetto.dev."""

import json
from collections.abc import Sequence
from pathlib import Path

from rayllp.timeline import Span

COLOURS = {
    "forward coarse solve": "#08519c", "forward relaxation": "#6baed6", "forward restriction": "#9ecae1", "forward last sweep": "#3182bd",
    "forward correction": "#9ecae1", "adjoint correction": "#fdd0a2",
    "adjoint coarse solve": "#a63603", "adjoint relaxation": "#fdae6b", "adjoint restriction": "#fdd0a2", "adjoint last sweep": "#e6550d",
    "forward": "#3182bd", "adjoint": "#e6550d", "forward microbatch": "#3182bd", "adjoint microbatch": "#e6550d",
    "enter": "#756bb1", "loss": "#636363", "update": "#31a354", "send": "#dd1c77", "wait": "#d3d9e0",
}  # fmt: skip
"""Colours by `Span.name`: blue for the forward solve, orange for the adjoint one; its coarse solve, which is serial, is dark."""


def draw_timeline(workers: Sequence[Sequence[Span]], picture: Path, title: str = "") -> None:
    """Draw a timeline as a picture file: one row per worker, milliseconds to the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, axis = plt.subplots(figsize=(11, 1.2 + 0.32 * len(workers)), layout="constrained")
    seen: dict[str, str] = {}
    for rank, spans in enumerate(workers):
        for name in sorted({span.name for span in spans}, key=lambda name: name != "wait"):  # draw waiting first, below the others
            colour = seen.setdefault(name, COLOURS.get(name, "#000000"))
            bars = [(1e3 * span.begin, 1e3 * span.seconds) for span in spans if span.name == name]
            axis.broken_barh(bars, (rank - 0.4, 0.8), facecolors=colour, edgecolors="white" if name != "wait" else "none", linewidth=0.3)
    axis.set(xlabel="ms", ylabel="worker", yticks=range(len(workers)), title=title)
    axis.invert_yaxis()
    handles = [Patch(color=seen[name], label=name) for name in COLOURS if name in seen]
    below = -0.18 - 0.6 / len(workers)
    axis.legend(handles=handles, fontsize="x-small", ncols=6, loc="upper center", bbox_to_anchor=(0.5, below), frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130, bbox_inches="tight")
    plt.close(figure)


def write_trace(workers: Sequence[Sequence[Span]], path: Path) -> None:
    """Write a trace in Chrome's trace event format, with one thread per worker and times in microseconds."""
    events: list[dict[str, object]] = []
    for rank, spans in enumerate(workers):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"worker {rank}"}})
        for span in spans:
            place = {name: value for name, value in (("level", span.level), ("layer", span.layer)) if span.phase and value is not None}
            events.append(
                {
                    "name": span.name, "cat": span.kind, "ph": "X", "ts": round(1e6 * span.begin, 1),
                    "dur": round(1e6 * span.seconds, 1), "pid": 0, "tid": rank, "args": place | {"phase": f"{span.solve} {span.phase}"},
                }
            )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
