"""Compare the final losses of runs with those of another mode (`rayllp report --compare`), with a confidence interval over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from scipy.special import stdtrit

from rayllp.config import MAY_DIFFER
from rayllp.errors import SettingsError
from rayllp.report.page.records import RunRecord
from rayllp.report.run_directory import flatten

CONFIDENCE = 0.95
INDIFFERENT = MAY_DIFFER | {"seed"}
"""Settings in which runs of the same kind may differ."""
TASK = "model data sequence_length batch_size steps dtype step nested optimizer".split()
"""Settings in which compared runs should agree: the network, its data, and how long it is trained."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How one kind of runs compares with the baseline.

    Attributes:
        kind: the settings that distinguish it from the other kinds, in words.
        runs, baseline_runs: names of the runs that were used.
        seeds: number of seeds that the interval is over; 1: there is no interval.
        step: number of steps after which both were evaluated.
        loss, baseline_loss: mean validation loss over seeds.
        percent: how far the loss is above the baseline's, in per cent; negative if it is below.
        half_width: half the width of the 95 % t-interval about `percent`; None with one seed.
        way: "paired" (the gap of each seed that both have), "unpaired" (Welch's interval) or "one seed".
        differs: settings of the task in which the two do not agree.
    """

    kind: str
    runs: tuple[str, ...]
    baseline_runs: tuple[str, ...]
    seeds: int
    step: int
    loss: float
    baseline_loss: float
    percent: float
    half_width: float | None
    way: Literal["paired", "unpaired", "one seed"]
    differs: tuple[str, ...]

    def sentence(self, baseline: str) -> str:
        """Return the result in words; `baseline` is the baseline's name."""
        where = "above" if self.percent >= 0 else "below"
        text = f"{self.kind}: validation loss {self.loss:.4f} after {self.step} steps, {abs(self.percent):.2f} % {where} {baseline}'s "
        text += f"{self.baseline_loss:.4f}"
        if self.half_width is None:
            return f"{text}. One seed only: how far another seed would end from this is not known."
        low, high = self.percent - self.half_width, self.percent + self.half_width
        pairs = "the same seeds in both" if self.way == "paired" else "seeds not paired: Welch's interval"
        text += f"; {100 * CONFIDENCE:.0f} % t-interval {low:+.2f} to {high:+.2f} % over {self.seeds} seeds ({pairs})."
        if low <= 0 <= high:
            return f"{text} It includes 0: no difference is shown."
        return f"{text} It does not include 0: the difference is larger than that between seeds."


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of all kinds of runs with the baseline."""

    baseline: str
    gaps: tuple[Gap, ...]


def compare(runs: Sequence[RunRecord], baseline: str) -> Comparison:
    """Compare final validation losses with those of the runs in mode `baseline`.

    Raises:
        SettingsError: an unknown mode, no run in it, none in another, or two that have no evaluation after as many steps.
    """
    if baseline not in ("parallel", "serial", "adaptive"):
        raise SettingsError(f"--compare {baseline}: give a mode: serial, parallel or adaptive")
    base = [run for run in runs if run.config.mode == baseline]
    others = [run for run in runs if run.config.mode != baseline]
    if not base or not others:
        modes = ", ".join(f"{run.name} ({run.config.mode})" for run in runs)
        lacking = f"none is in mode {baseline}" if not base else f"all are in mode {baseline}"
        raise SettingsError(f"--compare {baseline} needs a run in that mode and one in another; of {modes} {lacking}: add one")
    kinds: dict[str, list[RunRecord]] = {}
    for run in others:
        kinds.setdefault(repr(_kind(run)), []).append(run)
    labels = _labels([group[0] for group in kinds.values()])
    return Comparison(baseline=baseline, gaps=tuple(_gap(label, group, base) for label, group in zip(labels, kinds.values(), strict=True)))


def _kind(run: RunRecord) -> dict[str, Any]:
    return flatten({name: value for name, value in _settings(run).items() if name not in INDIFFERENT})


def _settings(run: RunRecord) -> dict[str, Any]:
    """Return a run's settings without `optimizer.sharded`, which changes no number."""
    values = run.config.model_dump(mode="json")
    del values["optimizer"]["sharded"]
    return values


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return a label for each kind: its mode, and the settings in which the kinds differ."""
    kinds = [_kind(run) for run in runs]
    names = [name for name in dict.fromkeys(name for kind in kinds for name in kind) if name != "mode"]
    telling = [name for name in names if len({repr(kind.get(name)) for kind in kinds}) > 1]
    return [", ".join([run.config.mode, *(f"{name} {kind.get(name)}" for name in telling)]) for run, kind in zip(runs, kinds, strict=True)]


def _gap(label: str, group: Sequence[RunRecord], base: Sequence[RunRecord]) -> Gap:
    alike = [run for run in base if not _differences(group[0], run)]
    base = alike or base
    step = _common_step([*group, *base])
    theirs, ours = _by_seed(base, step), _by_seed(group, step)
    shared = sorted(theirs.keys() & ours.keys())
    half: float | None = None
    way: Literal["paired", "unpaired", "one seed"] = "one seed"
    seeds = 1
    if len(shared) > 1:
        theirs, ours = ({seed: losses[seed] for seed in shared} for losses in (theirs, ours))
        gaps = [100 * (ours[seed] / theirs[seed] - 1) for seed in shared]
        percent, seeds, way = fmean(gaps), len(gaps), "paired"
        half = t_quantile(len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))
    elif len(theirs) > 1 and len(ours) > 1:
        percent, half = _welch(list(ours.values()), list(theirs.values()))
        seeds, way = min(len(theirs), len(ours)), "unpaired"
    else:
        if shared:
            theirs, ours = ({shared[0]: losses[shared[0]]} for losses in (theirs, ours))
        percent = 100 * (fmean(ours.values()) / fmean(theirs.values()) - 1)
    return Gap(
        kind=label,
        runs=tuple(run.name for run in group if run.config.seed in ours),
        baseline_runs=tuple(run.name for run in base if run.config.seed in theirs),
        seeds=seeds,
        step=step,
        loss=fmean(ours.values()),
        baseline_loss=fmean(theirs.values()),
        percent=percent,
        half_width=half,
        way=way,
        differs=tuple(_differences(group[0], base[0])),
    )


def _differences(one: RunRecord, other: RunRecord) -> list[str]:
    first, second = (flatten({name: _settings(run)[name] for name in TASK}) for run in (one, other))
    return [name for name in first | second if first.get(name) != second.get(name)]


def _common_step(runs: Sequence[RunRecord]) -> int:
    """Return the last step after which all runs were evaluated."""
    steps = set.intersection(*({int(line["step"]) for line in run.evaluations} for run in runs))
    if not steps:
        last = ", ".join(f"{run.name} {run.evaluations[-1]['step'] if run.evaluations else 'never'}" for run in runs)
        raise SettingsError(f"--compare needs a step after which all were evaluated; last evaluations: {last}: set eval.every alike")
    return max(steps)


def _by_seed(runs: Sequence[RunRecord], step: int) -> dict[int, float]:
    """Return the validation loss after `step` steps by seed; the mean, where several runs have the same seed."""
    found: dict[int, list[float]] = {}
    for run in runs:
        found.setdefault(run.config.seed, []).extend(line["loss"] for line in run.evaluations if line["step"] == step)
    return {seed: fmean(losses) for seed, losses in found.items()}


def _welch(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return the gap between two means in per cent, and half the width of its interval, with the ratio's error to first order."""
    ratio = fmean(ours) / fmean(theirs)
    parts = [stdev(ours) ** 2 / len(ours), (ratio * stdev(theirs)) ** 2 / len(theirs)]
    if sum(parts) == 0:
        return 100 * (ratio - 1), 0.0
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(ours) - 1) + parts[1] ** 2 / (len(theirs) - 1))
    return 100 * (ratio - 1), 100 * t_quantile(max(1, math.floor(freedom))) * math.sqrt(sum(parts)) / fmean(theirs)


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return the value that |t|, for Student's t-distribution, stays below with probability `confidence`.

    Args:
        freedom: degrees of freedom, at least 1.
    """
    return float(stdtrit(freedom, (1 + confidence) / 2))
