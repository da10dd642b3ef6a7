"""Reads run directories into arrays, for the charts of a report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rayllp.config import TrainConfig, load_run_config
from rayllp.errors import SettingsError
from rayllp.report.run_directory import read_lines

Line = dict[str, Any]
Floats = np.ndarray
"""A one-dimensional array of float64."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of successive steps in one mode.

    Attributes:
        mode: "parallel" or "serial".
        begin, end: first step, and the step after the last.
    """

    mode: str
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What one run has recorded.

    Attributes:
        name: distinguishes it from the other runs of the page.
        metrics, evaluations, events, timelines: the lines of its files, in order of steps.
        steps: the step of each line of `metrics`, shape (n,).
        tokens, seconds: totals from the run's beginning to the end of each step, shape (n,). Seconds are those of steps alone: without
            evaluations, checkpoints, recoveries, and steps that were lost and done again.
        sample: generated text; empty where there is none.
        translations: the held-out sentences' translations; empty where there are none.
    """

    name: str
    path: Path
    config: TrainConfig
    metrics: Sequence[Line]
    evaluations: Sequence[Line]
    events: Sequence[Line]
    timelines: Sequence[Line]
    steps: Floats
    tokens: Floats
    seconds: Floats
    sample: str
    translations: str

    def column(self, name: str) -> Floats:
        """Return a metric over all steps, NaN where it was not measured; shape (n,)."""
        return np.array([np.nan if (value := metric.get(name)) is None else float(value) for metric in self.metrics])

    def measured(self, name: str) -> tuple[Floats, Floats]:
        """Return the steps at which a metric was measured, and its values there, which may be infinite or NaN."""
        found = [(metric["step"], metric[name]) for metric in self.metrics if metric.get(name) is not None]
        return np.array([step for step, _ in found], dtype=float), np.array([value for _, value in found], dtype=float)

    def total_after(self, totals: Floats, step: float) -> float:
        """Return how many tokens or seconds (`totals` is one of these attributes) a run had after `step` steps."""
        done = int(np.searchsorted(self.steps, step))  # metrics of steps before it
        return float(totals[done - 1]) if done else 0.0

    @property
    def done(self) -> int:
        """Number of steps done."""
        return int(self.steps[-1]) + 1

    @cached_property
    def phases(self) -> list[Phase]:
        """The phases of the run, in order: how its mode changed."""
        found = []
        for mode, group in groupby(self.metrics, key=lambda metric: metric["mode"]):
            steps = [metric["step"] for metric in group]
            found.append(Phase(mode=mode, begin=steps[0], end=steps[-1] + 1))
        return found

    @property
    def parallel_share(self) -> float:
        """Share of the steps that were layer-parallel."""
        return sum(metric["mode"] == "parallel" for metric in self.metrics) / len(self.metrics)

    def events_of(self, *kinds: str) -> list[Line]:
        """Return the events of these kinds, in the order in which they happened."""
        return [event for event in self.events if event["kind"] in kinds]


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read several runs from their directories, and give them names that differ.

    Raises:
        SettingsError: no directory is given, or one is given twice; otherwise as `read_run`.
    """
    if not paths:
        raise SettingsError("no run given: give the directories of one or more runs")
    places = [path.resolve() for path in paths]
    twice = next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise SettingsError(f"{twice} is given twice: give each run once")
    return [read_run(path, name) for path, name in zip(paths, _names(places), strict=True)]


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Read one run from its directory.

    Raises:
        NotARunError: the directory holds no run.
        SettingsError: the run has done no step yet, or a file of it cannot be read.
    """
    config = load_run_config(path)
    metrics = _by_step(_read(path / "metrics.jsonl"))
    if not metrics:
        raise SettingsError(
            f"{path} has no step in metrics.jsonl, and a report needs at least one: wait for the run's first step, or leave the run out"
        )
    sample, translations = path / "sample.txt", path / "translations.txt"
    return RunRecord(
        name=name or path.resolve().name,
        path=path,
        config=config,
        metrics=metrics,
        evaluations=_by_step([line for line in _read(path / "evals.jsonl") if line.get("split", "validation") == "validation"]),
        events=_read(path / "events.jsonl"),
        timelines=_by_step(_read(path / "timeline.jsonl")),
        steps=np.array([metric["step"] for metric in metrics], dtype=float),
        tokens=np.cumsum([float(metric["tokens"]) for metric in metrics]),
        seconds=np.cumsum([float(metric["step_time_s"]) for metric in metrics]),
        sample=sample.read_text(errors="replace", encoding="utf-8") if sample.is_file() else "",
        translations=translations.read_text(errors="replace", encoding="utf-8") if translations.is_file() else "",
    )


def _read(path: Path) -> list[Line]:
    try:
        return read_lines(path)
    except json.JSONDecodeError:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                json.loads(line)
            except json.JSONDecodeError as error:
                raise SettingsError(f"{path}, line {number}: not JSON ({error.msg}); every line must be: remove or fix it") from None
        raise


def _by_step(lines: Sequence[Line]) -> list[Line]:
    """Return the lines in order of steps; only the last line of a step that was done twice."""
    last = {line["step"]: line for line in lines}
    return [last[step] for step in sorted(last)]


def _names(places: Sequence[Path]) -> list[str]:
    """Return the shortest ends of these paths by which they differ."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]
