"""What a run has gained: seconds by solve, beside what exact training would have taken."""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

KEPT = 30
"""Steps of a solve whose median is its time."""
FEWEST = 3
"""Steps of a solve that tell its time."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Of the steps of one sitting.

    Attributes:
        seconds, steps: by solve ("1+1", "serial", "probes"); their sums are all that was trained.
        exact_step_s: of an exact step on the same workers; None where too few were timed.
        one_worker_step_s: of an exact step on one worker: the seconds that all workers computed in a timed one; None where none was.
    """

    seconds: Mapping[str, float]
    steps: Mapping[str, int]
    exact_step_s: float | None
    one_worker_step_s: float | None

    @property
    def speedup(self) -> float | None:
        """Times as fast as exact training on the same workers."""
        return self._over(self.exact_step_s)

    @property
    def speedup_over_one(self) -> float | None:
        """Times as fast as exact training on one worker."""
        return self._over(self.one_worker_step_s)

    def _over(self, step_s: float | None) -> float | None:
        total = sum(self.seconds.values())
        return step_s * sum(self.steps.values()) / total if step_s is not None and total > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """For a line of events.jsonl."""
        return {
            "seconds_by_solve": {name: round(value, 3) for name, value in self.seconds.items()}, "steps_by_solve": dict(self.steps),
            "exact_step_s": self.exact_step_s, "one_worker_step_s": self.one_worker_step_s,
            "speedup": self.speedup, "speedup_over_one": self.speedup_over_one,
        }  # fmt: skip

    def sentence(self, why_exact: str | None) -> str:
        """In words.

        Args:
            why_exact: why the last steps were exact, if the controller has said so.
        """
        spent = ", ".join(f"{seconds:.3g} s in {self.steps[name]} {_kind(name)}" for name, seconds in self.seconds.items())
        if self.speedup is None:
            return f"trained {spent}; no exact step was timed to compare with"
        one = "" if self.speedup_over_one is None else f", {self.speedup_over_one:.2f} times as fast as one worker"
        if self.speedup < 1.02:
            reason = f": {why_exact}" if why_exact else ""
            return f"trained {spent}; layer-parallel steps gained nothing over exact ones on these workers{reason}{one}"
        return f"trained {spent}; {self.speedup:.2f} times as fast as exact training on these workers{one}"


def _kind(name: str) -> str:
    return {"serial": "exact steps", "probes": "probes"}.get(name, f"steps by {name}")


class StepTimes:
    """Takes in the times of steps."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps: defaultdict[str, int] = defaultdict(int)
        self._recent: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._before = ""
        self._one_worker: float | None = None

    def take(self, name: str, seconds: float, computed: float | None = None) -> None:
        """A step.

        Args:
            name: its solve's, or "probes".
            computed: seconds that all workers together computed, if it was timed so.
        """
        self._seconds[name] += seconds
        self._steps[name] += 1
        if name == self._before and name != "probes":  # the first of a kind is slow: memory, messages that were not asked for ahead
            self._recent[name].append(seconds)
        self._before = name
        if name == "serial" and computed is not None:
            self._one_worker = computed

    def forget_speed(self) -> None:
        """On another number of workers steps take other times."""
        self._recent.clear()
        self._before = ""

    @property
    def step_s(self) -> dict[str, float]:
        """Seconds of a step by solve, where enough were timed."""
        return {name: median(found) for name, found in self._recent.items() if len(found) >= FEWEST}

    @property
    def gain(self) -> Gain:
        """So far."""
        return Gain(
            seconds=dict(self._seconds), steps=dict(self._steps), exact_step_s=self.step_s.get("serial"), one_worker_step_s=self._one_worker
        )
