"""Writes the page of `rayllp report`: one HTML file that needs no other, made from a template, and PNG files beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rayllp.config import TrainConfig, to_yaml
from rayllp.errors import SettingsError
from rayllp.report.page.charts import COLOURS, write_count, write_number, write_time
from rayllp.report.page.compare import Comparison, compare
from rayllp.report.page.figures import build_charts, describe_event, describe_gain, last_loss
from rayllp.report.page.pictures import Picture, describe_glyphs, embed, picture_chart, picture_memory, picture_split, picture_timeline
from rayllp.report.page.png import write_pngs
from rayllp.report.page.records import RunRecord, read_runs
from rayllp.report.page.workers import memory, step_timelines, time_splits
from rayllp.report.run_directory import flatten

MOST_EVENTS = 300
"""Rows of the table of events at most; of a longer one, half of them are the first and half the last events."""
MOST_TEXT = 20_000
"""Characters of a sample at most; the page says how many it leaves out."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_report` has written.

    Attributes:
        page: the HTML file.
        pictures: the PNG files; empty if none were asked for.
        comparison: the comparison with a baseline; None if none was asked for.
    """

    page: Path
    pictures: tuple[Path, ...]
    comparison: Comparison | None


def write_report(
    paths: Sequence[Path],
    *,
    output: Path | None = None,
    png: Path | None = None,
    title: str | None = None,
    baseline: str | None = None,
) -> Written:
    """Write a report on one or more runs: one HTML page that needs no other file.

    Args:
        paths: run directories; a run may still be training.
        output: the HTML file; default: report.html, in the run's directory or, for several runs, in the working directory.
        png: folder to write the charts to as PNG files too.
        title: title of the page; default: the runs' names.
        baseline: "serial", "parallel" or "adaptive": compare the other runs' losses with those of the runs in that mode.

    Raises:
        NotARunError: a directory holds no run.
        SettingsError: a run has no step or cannot be read, the runs cannot be compared, or a file cannot be written.
    """
    runs = read_runs(paths)
    comparison = None if baseline is None else compare(runs, baseline)
    page = output or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    text = render(runs, title, comparison)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--output {page} cannot be written: {error.strerror or error}; choose another file") from None
    pictures = write_pngs(build_charts(runs), runs, png) if png is not None else []
    return Written(page=page, pictures=tuple(pictures), comparison=comparison)


def render(runs: Sequence[RunRecord], title: str | None = None, comparison: Comparison | None = None) -> str:
    """Return the page's HTML. Whatever comes from runs (names, samples, reasons) is escaped."""
    environment = Environment(
        loader=PackageLoader("rayllp.report.page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["time"] = write_time
    environment.policies["json.dumps_kwargs"] = {
        "sort_keys": False,
        "separators": (",", ":"),
    }  # Bokeh's references follow what they refer to
    charts, workers = build_charts(runs), [_workers(run) for run in runs]
    pictures = [picture_chart(chart, runs) for chart in charts]
    return environment.get_template("report.html.jinja").render(
        title=title or ", ".join(run.name for run in runs),
        runs=runs,
        alone=len(runs) == 1,
        colours=COLOURS,
        facts=[_facts(run) for run in runs],
        pictures=pictures,
        glyphs=describe_glyphs(charts),
        workers=workers,
        drawn=embed([*pictures, *(picture for found in workers for part in found for picture in part)]),
        bokeh=Markup(Resources(mode="inline", components=["bokeh"]).js_raw[0]),
        samples=[(_cut(run.sample), _cut(run.translations)) for run in runs],
        events=[_events(run) for run in runs],
        settings=_settings(runs),
        yamls=[to_yaml(run.config) for run in runs],
        comparison=comparison,
    )


def _workers(run: RunRecord) -> tuple[list[Picture], list[Picture]]:
    """Return pictures of a run's workers: those that are shown side by side, and those as wide as the page."""
    found, splits = memory(run), [picture_split(split) for split in time_splits(run)]
    gpus = any(worker.cuda is not None for worker in found)
    return [*splits, *([picture_memory(found)] if found else [])], [picture_timeline(timeline, gpus) for timeline in step_timelines(run)]


def _facts(run: RunRecord) -> dict[str, str]:
    """Return the main figures of a run, by name."""
    config, last = run.config, run.evaluations[-1] if run.evaluations else None
    facts = {"Mode": config.mode, "Steps": f"{run.done:,} of {config.steps:,}"}
    if last is not None:
        facts["Validation loss"] = f"{last['loss']:.4f} after {last['step']:,} steps"
        others = {name: value for name, value in last.items() if name not in ("step", "split", "loss")}
        facts |= {name.replace("_", " ").capitalize(): write_number(value) for name, value in others.items()}
        best = min(run.evaluations, key=lambda line: line["loss"])
        if best is not last:
            facts["Lowest"] = f"{best['loss']:.4f} after {best['step']:,} steps"
    facts["Training loss"] = f"{last_loss(run):.4f}, mean of the last twentieth"
    facts["In parallel"] = f"{run.parallel_share:.0%} of the steps".replace("%", " %")
    facts["Tokens"] = write_count(float(run.tokens[-1]))
    facts["Time of the steps"] = write_time(float(run.seconds[-1]))
    facts["Median step"] = write_time(median(metric["step_time_s"] for metric in run.metrics))
    if gains := run.events_of("gain"):
        facts["Gain"] = describe_gain(gains[-1])
    workers = sorted({metric["workers"] for metric in run.metrics})
    facts["Workers"] = str(workers[0]) if len(workers) == 1 else f"{workers[0]} to {workers[-1]}"
    counts = {name: len(run.events_of(kind)) for kind, name in (("switch", "switches"), ("fault", "faults"), ("resize", "resizes"))}
    facts["Events"] = ", ".join(f"{count} {name if count != 1 else _one(name)}" for name, count in counts.items())
    facts["Seed"] = str(config.seed)
    return facts


def _one(name: str) -> str:
    return name.removesuffix("es") if name == "switches" else name.removesuffix("s")


def _events(run: RunRecord) -> dict[str, Any]:
    """Return the rows of the table of events, and how many it leaves out. Checkpoints are only counted, since a run has many."""
    told = [event for event in run.events if event["kind"] != "checkpoint"]
    begin = run.events[0]["time"] if run.events else 0.0
    rows = [
        {
            "after": write_time(max(0.0, event["time"] - begin)),
            "kind": event["kind"],
            "text": describe_event(event),
            "seconds": event.get("seconds"),
        }
        for event in told
    ]
    left_out = max(0, len(rows) - MOST_EVENTS)
    if left_out:
        rows = rows[: MOST_EVENTS // 2] + rows[-MOST_EVENTS // 2 :]
    return {"rows": rows, "left_out": left_out, "checkpoints": len(run.events_of("checkpoint"))}


def _settings(runs: Sequence[RunRecord]) -> list[tuple[str, str, list[str]]]:
    """Return the settings that are not at their default in some run: name, default, and each run's value."""
    defaults = flatten(TrainConfig().model_dump(mode="json"))
    found = [flatten(run.config.model_dump(mode="json")) for run in runs]
    names = dict.fromkeys(name for values in (defaults, *found) for name in values)
    rows = [(name, _plain(defaults.get(name)), [_plain(values.get(name)) for values in found]) for name in names]
    return [row for row in rows if any(value != row[1] for value in row[2])]


def _cut(text: str) -> str:
    left_out = len(text) - MOST_TEXT
    return text if left_out <= 0 else f"{text[:MOST_TEXT]}\n… and {left_out:,} characters more"


def _plain(value: Any) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
