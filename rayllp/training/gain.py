"""What a run has gained from layer-parallel training: the time of its steps, compared with that of exact (serial) steps."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rayllp.control.records import PROBES

KEPT = 30
"""The time per step of a solve is the median of this many recent steps."""
FEWEST = 3
"""Fewest timed steps from which a solve's time is known."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The times of a session's steps. A solve is named by its iterations ("1+1") or is "serial"; "probes" are steps that also measure.

    Attributes:
        seconds, steps: time and number of steps by solve; together they cover all steps.
        exact_step_s: seconds of an exact step on the same workers; None if too few were timed.
        one_worker_step_s: seconds of an exact step on one worker, estimated as the sum of all workers' compute time in an exact step; None
            if no exact step was recorded with a timeline.
    """

    seconds: Mapping[str, float]
    steps: Mapping[str, int]
    exact_step_s: float | None
    one_worker_step_s: float | None

    @property
    def speedup(self) -> float | None:
        """Speed relative to exact training on the same workers; 2.0 is twice as fast."""
        return self._over(self.exact_step_s)

    @property
    def speedup_over_one(self) -> float | None:
        """Speed relative to exact training on one worker."""
        return self._over(self.one_worker_step_s)

    def _over(self, step_s: float | None) -> float | None:
        total = sum(self.seconds.values())
        return step_s * sum(self.steps.values()) / total if step_s is not None and total > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of the event in events.jsonl."""
        return {
            "seconds_by_solve": {name: round(value, 3) for name, value in self.seconds.items()}, "steps_by_solve": dict(self.steps),
            "exact_step_s": self.exact_step_s, "one_worker_step_s": self.one_worker_step_s,
            "speedup": self.speedup, "speedup_over_one": self.speedup_over_one,
        }  # fmt: skip

    def sentence(self, why_exact: str | None) -> str:
        """Return a sentence for the user.

        Args:
            why_exact: the controller's reason for exact steps, if it chose them.
        """
        spent = ", ".join(f"{seconds:.3g} s in {_steps(name, self.steps[name])}" for name, seconds in self.seconds.items())
        if self.speedup is None:
            return f"trained {spent}; no exact step was timed to compare with"
        one = "" if self.speedup_over_one is None else f", {self.speedup_over_one:.2f} times as fast as one worker"
        if self.speedup < 1.02:
            reason = f": {why_exact}" if why_exact else ""
            return f"trained {spent}; layer-parallel steps gained nothing over exact ones on these workers{reason}{one}"
        return f"trained {spent}; {self.speedup:.2f} times as fast as exact training on these workers{one}"


def _steps(name: str, count: int) -> str:
    """Return a number of steps of a solve in words, such as "12 steps by 1+1"."""
    kind = {"serial": "exact step", PROBES: "probe"}.get(name, "step")
    by = "" if name in ("serial", PROBES) else f" by {name}"
    return f"{count} {kind}{'' if count == 1 else 's'}{by}"


class StepTimes:
    """Collects the times of steps by solve."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps: defaultdict[str, int] = defaultdict(int)
        self._recent: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._before = ""
        self._one_worker: float | None = None

    def take(self, name: str, seconds: float, computed: float | None = None) -> None:
        """Add one step.

        Args:
            name: the name of its solve, or "probes".
            seconds: its wall time.
            computed: compute time summed over all workers; None if no timeline was recorded.
        """
        self._seconds[name] += seconds
        self._steps[name] += 1
        # The first of a kind is slow: it allocates memory, and no receive was posted ahead. Probes come one by one.
        if name in (self._before, PROBES):
            self._recent[name].append(seconds)
        self._before = name
        if name == "serial" and computed is not None:
            self._one_worker = computed

    def forget_speed(self, but: Sequence[str] = ()) -> None:
        """Forget how long steps take, since the number of workers or how layers are solved has changed.

        Args:
            but: the solves whose steps take about as long as before.
        """
        for name in set(self._recent) - set(but):
            del self._recent[name]
        self._before = ""

    @property
    def step_s(self) -> dict[str, float]:
        """Seconds per step by solve, for solves with enough timed steps, and of the fastest probe."""
        known = {name: median(recent) for name, recent in self._recent.items() if len(recent) >= FEWEST and name != PROBES}
        # Probes are few, the first is slow, and what the next ones will cost should be known before they are made.
        if self._recent.get(PROBES):
            known[PROBES] = min(self._recent[PROBES])
        return known

    @property
    def gain(self) -> Gain:
        """The gain so far."""
        return Gain(
            seconds=dict(self._seconds), steps=dict(self._steps), exact_step_s=self.step_s.get("serial"), one_worker_step_s=self._one_worker
        )
