"""Collects what a trial reports to Ray Tune at each evaluation, from the metrics of its run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rayllp.control.records import ROLLING
from rayllp.report import Listener
from rayllp.tuning.sweep import Objective

WORST = 1e6
"""Stands for a value that a trial does not have, because it diverged or did not reach its target; all real values are better."""
WARM_STEPS = 3


@dataclass(frozen=True)
class Step:
    """A kind of step whose time is to be predicted.

    Attributes:
        exact: an exact one.
        sweeps: of a rolling window, mean numbers forward and adjoint; None if none were counted.
    """

    exact: bool
    sweeps: tuple[float, float] | None = None


class Reporter(Listener):
    """A listener of a run that collects the values of a trial's reports.

    Args:
        objective: the sweep's objective.
        predict: predicts the seconds of a step on the cluster that the sweep is for: of a layer-parallel one, with the mean numbers of
            sweeps if a rolling window has taken any, or of an exact one. None: use the measured time.
    """

    def __init__(self, objective: Objective, predict: Callable[[Step], float] | None = None) -> None:
        self.objective, self.predict = objective, predict
        self.steps = self.parallel = self.tokens = 0
        self.seconds = 0.0
        self.times: list[float] = []
        self.sweeps: list[tuple[int, int]] = []
        self.mode = self.rung = ""
        self.bias: float | None = None
        self.rho: dict[str, float | None] = {"rho_forward": None, "rho_backward": None}
        self.largest_rho: float | None = None
        self.switches: list[tuple[int, str]] = []
        self.metrics: dict[str, float] = {}
        self.reached: float | None = None
        self._warm = WARM_STEPS

    def resume(self, metrics: list[dict[str, Any]], events: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
        """Take in what the trial did before it was interrupted.

        Args:
            metrics, events, evaluations: the lines of its files.
        """
        waiting = list(evaluations)
        for metric in metrics:
            self.on_step(metric)
            while waiting and waiting[0]["step"] <= self.steps:
                evaluation = waiting.pop(0)
                self.on_evaluation(evaluation["step"], {name: value for name, value in evaluation.items() if name not in ("step", "split")})
        for event in events:
            self.on_event(event["step"], event["kind"], event)
        self._warm = WARM_STEPS  # the first steps of each session are slow

    def on_step(self, metric: Mapping[str, Any]) -> None:
        """Add a training step."""
        self.steps = metric["step"] + 1
        self.tokens += metric["tokens"]
        self.seconds += metric["step_time_s"]
        self.mode = metric["mode"]
        self.parallel += metric["mode"] == "parallel"
        if self._warm:
            self._warm -= 1
        else:
            self.times.append(metric["step_time_s"])
        if metric.get("solve") == ROLLING and metric["probed"] is None:
            self.sweeps.append((metric["iterations_forward"], metric["iterations_backward"]))
        if metric["bias"] is not None and metric["mode"] == "parallel":
            self.bias = max(self.bias or 0.0, metric["bias"])
        for name in self.rho:
            if metric[name] is not None:
                self.rho[name] = metric[name]
                self.largest_rho = max(self.largest_rho or 0.0, metric[name])

    def on_event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Remember switches of the controller; other events do not count."""
        if kind == "switch":
            self.rung = details["rung"]
            self.switches.append((step, details["rung"]))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remember the results of an evaluation, and after how many seconds of training the target loss was first reached."""
        self.metrics = dict(metrics)
        target = self.objective.target
        if target is not None and self.reached is None and metrics["loss"] <= target:
            self.reached = self.seconds

    @property
    def is_exhausted(self) -> bool:
        """True if the trial has used up its budget of time, or has reached its target loss."""
        seconds = self.objective.seconds
        return (seconds is not None and self.seconds >= seconds) or (self.objective.kind == "time_to_loss" and self.reached is not None)

    def report(self, *, diverged: bool = False) -> dict[str, Any]:
        """Return a result for Tune.

        Values that were not measured are None, but the metrics of the objective are always finite numbers: a missing value becomes `WORST`.

        Args:
            diverged: True if training has diverged; all metrics of the objective are then `WORST`.
        """
        measured = fmean(self.times) if self.times else (self.seconds / self.steps if self.steps else None)
        share = self.parallel / self.steps if self.steps else 0.0
        step_time = measured if self.predict is None else self._predicted(share)
        others = {name: value for name, value in self.metrics.items() if name != "loss"}
        result = {
            "step": self.steps, "tokens": self.tokens, "seconds": round(self.seconds, 3), "step_time": step_time,
            "measured_step_time": measured, "bias": self.bias, **self.rho, "largest_rho": self.largest_rho, "last_mode": self.mode,
            "rung": self.rung, "parallel_share": round(share, 4), "switches": len(self.switches),
            "switched_at": next((step for step, rung in self.switches if rung == "serial"), None),
            "validation_loss": self.metrics.get("loss"), "diverged": diverged, **others, "seconds_to_target": self.reached,
        }  # fmt: skip
        wanted = {name: result.get(name) for name in self.objective.metrics}
        bias = 0.0 if self.bias is None and share == 0 else self.bias  # exact steps have no bias
        if "bias" in wanted:
            wanted["bias"] = bias
        if "constrained_step_time" in wanted and step_time is not None:
            wanted["constrained_step_time"] = self._constrained(step_time, WORST if bias is None else bias)
        return result | {name: WORST if diverged or value is None else value for name, value in wanted.items()}

    def _predicted(self, share: float) -> float:
        """Return the predicted mean time of a step.

        Args:
            share: of the layer-parallel ones.
        """
        assert self.predict is not None
        forward, adjoint = zip(*self.sweeps, strict=True) if self.sweeps else ((), ())
        kinds = {Step(exact=False, sweeps=(fmean(forward), fmean(adjoint)) if forward else None): share, Step(exact=True): 1 - share}
        return sum(part * self.predict(kind) for kind, part in kinds.items() if part)

    def _constrained(self, step_time: float, bias: float) -> float:
        """Return the step time, or if the bias exceeds its bound a penalty, which grows with the bias to guide the searcher."""
        bound = self.objective.bias
        return step_time if bound is None or bias <= bound else min(WORST, 1e3 * (1 + bias / bound))
