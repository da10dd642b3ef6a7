"""What a trial tells Tune at each evaluation: made of its metrics, as they come."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rayllp.tuning.sweep import Objective

WORST = 1e6
"""Of a trial that diverged, or did not get to its target: every other is better."""
WARM_STEPS = 3


class Reporter:
    """A listener of a run's journal.

    Args:
        predicted: seconds of a layer-parallel step on the cluster that the sweep is for; None: as measured.
    """

    def __init__(self, objective: Objective, predicted: float | None = None) -> None:
        self.objective, self.predicted = objective, predicted
        self.steps = self.parallel = self.tokens = 0
        self.seconds = 0.0
        self.times: list[float] = []
        self.mode = self.rung = ""
        self.bias: float | None = None
        self.rho: dict[str, float | None] = {"rho_forward": None, "rho_backward": None}
        self.largest_rho: float | None = None
        self.switches: list[tuple[int, str]] = []
        self.found: dict[str, float] = {}
        self.reached: float | None = None
        self._warm = WARM_STEPS

    def resume(self, metrics: list[dict[str, Any]], events: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
        """Take in what the trial did before it was interrupted: lines of its files."""
        waiting = list(evaluations)
        for metric in metrics:
            self.step(metric)
            while waiting and waiting[0]["step"] <= self.steps:
                found = waiting.pop(0)
                self.evaluation(found["step"], {name: value for name, value in found.items() if name not in ("step", "split")})
        for event in events:
            self.event(event["step"], event["kind"], event)
        self._warm = WARM_STEPS  # the first steps of each sitting are slow

    def step(self, metric: Mapping[str, Any]) -> None:
        """Add a step to what the trial has done."""
        self.steps = metric["step"] + 1
        self.tokens += metric["tokens"]
        self.seconds += metric["step_time_s"]
        self.mode = metric["mode"]
        self.parallel += metric["mode"] == "parallel"
        if self._warm:
            self._warm -= 1
        else:
            self.times.append(metric["step_time_s"])
        if metric["bias"] is not None and metric["mode"] == "parallel":
            self.bias = max(self.bias or 0.0, metric["bias"])
        for name in self.rho:
            if metric[name] is not None:
                self.rho[name] = metric[name]
                self.largest_rho = max(self.largest_rho or 0.0, metric[name])

    def event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Note switches."""
        if kind == "switch":
            self.rung = details["rung"]
            self.switches.append((step, details["rung"]))

    def evaluation(self, step: int, found: Mapping[str, float]) -> None:
        """Note what an evaluation found, and whether the target is reached."""
        self.found = dict(found)
        target = self.objective.target
        if target is not None and self.reached is None and found["loss"] <= target:
            self.reached = self.seconds

    @property
    def is_exhausted(self) -> bool:
        """Whether the trial has used its budget, or has what it was to get."""
        seconds = self.objective.seconds
        return (seconds is not None and self.seconds >= seconds) or (self.objective.kind == "time_to_loss" and self.reached is not None)

    def report(self, *, diverged: bool = False) -> dict[str, Any]:
        """A result for Tune. What was not measured is None; but all of the objective's metrics are there, and finite."""
        measured = fmean(self.times) if self.times else (self.seconds / self.steps if self.steps else None)
        step_time = measured if self.predicted is None else self.predicted
        share = self.parallel / self.steps if self.steps else 0.0
        others = {name: value for name, value in self.found.items() if name != "loss"}
        result = {
            "step": self.steps, "tokens": self.tokens, "seconds": round(self.seconds, 3), "step_time": step_time,
            "measured_step_time": measured, "bias": self.bias, **self.rho, "largest_rho": self.largest_rho, "last_mode": self.mode,
            "rung": self.rung, "parallel_share": round(share, 4), "switches": len(self.switches),
            "switched_at": next((step for step, rung in self.switches if rung == "serial"), None),
            "validation_loss": self.found.get("loss"), "diverged": diverged, **others, "seconds_to_target": self.reached,
        }  # fmt: skip
        wanted = {name: result.get(name) for name in self.objective.metrics}
        bias = 0.0 if self.bias is None and share == 0 else self.bias  # exact steps have none
        if "bias" in wanted:
            wanted["bias"] = bias
        if "constrained_step_time" in wanted and step_time is not None:
            wanted["constrained_step_time"] = self._constrained(step_time, WORST if bias is None else bias)
        return result | {name: WORST if diverged or value is None else value for name, value in wanted.items()}

    def _constrained(self, step_time: float, bias: float) -> float:
        """What is over the bound is worse than what is not, and the more the worse: a searcher can tell where to go."""
        bound = self.objective.bias
        return step_time if bound is None or bias <= bound else min(WORST, 1e3 * (1 + bias / bound))
