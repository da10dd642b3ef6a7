"""The tolerance of a rolling window (`rayllp/mgrit/rolling.py`): what probes make of it.

A window adapts to each batch by itself, but how large a bias its tolerance causes depends on the network. So each probe moves the tolerance
towards the one whose bias should have a certain share of what is tolerated. After a fault it is made smaller at once, and the new one is
used as soon as a probe has found it accurate. If that takes sweeps that cost about as much as exact steps, steps are exact.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from rayllp.config import TrainConfig
from rayllp.control.judgement import tolerated_bias
from rayllp.control.records import Probe

FIRST, LEAST, MOST = 0.1, 1e-4, 1.0
"""The tolerance at the start, and its bounds. With the largest, a state may change by as much as itself."""
ORDER = 0.8
"""The bias grows about with this power of the tolerance, as measured on four trained networks (0.4 to 1)."""
DOWN, UP = 0.25, 2.0
"""Bounds of the factor by which a good probe changes the tolerance."""
FAULT_DOWN, FAULT_UP = 1 / 16, 0.5
"""Bounds of the factor by which a fault does."""
UNCHANGED = 1.25
"""The tolerance stays if it would change by less than this factor: probes differ by more than that from batch to batch."""
WORTHWHILE_SHARE = 0.9
"""Sweeps that take more than this share of an exact step's time are not worth their bias."""
MOST_REFUSALS = 6
"""After so many faults in a row steps are exact."""


@dataclass
class ToleranceState:
    """What a choice of tolerance remembers from step to step.

    Attributes:
        tolerance: the one in use, or to be probed.
        refusals: number of faults in a row.
        calm: number of probes in a row, in exact training, by which the tolerance of the time would do.
    """

    tolerance: float = FIRST
    refusals: int = 0
    calm: int = 0


@dataclass(frozen=True)
class Move:
    """A change of the tolerance.

    Attributes:
        factor: new tolerance over the one before.
        reason: why, in words.
    """

    factor: float
    reason: str


class ToleranceChoice:
    """Chooses the tolerance of a run's rolling window.

    Attributes:
        state: what is kept in checkpoints.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        given = config.windows.tolerance or FIRST
        self.state = ToleranceState(_bounded(given, LEAST, MOST) if config.chooses_tolerance else given)

    @property
    def tolerance(self) -> float:
        """The tolerance in use, or to be probed."""
        return self.state.tolerance

    def mend(self, step: int, probe: Probe, fault: str, aim: float) -> Move | None:
        """Make the tolerance smaller after a fault. Returns None if exact steps would take no longer.

        Args:
            step, fault: the probe's step, and what is wrong in words.
            probe: what it has found, with the typical bias and noise.
            aim: the share of the tolerated bias that is aimed at.
        """
        self.state.refusals += 1
        if self.state.refusals > MOST_REFUSALS or self.tolerance <= LEAST or self.overrun(probe):
            return None
        factor = self._scale(_bounded(self._wanted(step, probe, aim), FAULT_DOWN, FAULT_UP))
        return Move(factor, f"{fault}; {self._in_words}")

    def accept(self) -> None:
        """Note that a probe has found the tolerance small enough."""
        self.state.refusals = 0

    def adapt(self, step: int, probe: Probe, aim: float) -> Move | None:
        """Move the tolerance towards the bias that is aimed at, after a probe that has found it small enough."""
        wanted = _bounded(self.tolerance * _bounded(self._wanted(step, probe, aim), DOWN, UP), LEAST, MOST) / self.tolerance
        if 1 / UNCHANGED < wanted < UNCHANGED or (wanted > 1 and self._sweeps_are_fewest(probe)):
            return None
        factor, reason = self._scale(wanted), "the bias allows more" if wanted > 1 else "the bias comes near what is tolerated"
        return Move(factor, f"{reason}; {self._in_words}")

    def hasten(self, share: float, aim: float) -> Move | None:
        """Make the tolerance as large as the bias allows, since steps are too slow. Returns None if that would hardly change it.

        Args:
            share: the share of the tolerated bias that the tolerance causes.
            aim: the one that it may cause.
        """
        factor = math.inf if share == 0 else (aim / share) ** (1 / ORDER)
        if _bounded(self.tolerance * factor, LEAST, MOST) < UNCHANGED * self.tolerance:
            return None
        factor = self._scale(min(factor, UP))
        return Move(factor, f"steps are no faster than exact ones, and the bias allows more; {self._in_words}")

    def least_time(self, sweeps: tuple[int, int]) -> float:
        """Return the share of a step's time, of so many sweeps forward and backward, that is left with the fewest sweeps."""
        return 3 * self._fewest_sweeps / (sum(sweeps) + self._fewest_sweeps)

    def replaces_exact_steps(self, step: int, probe: Probe, fault: str | None, aim: float) -> bool:
        """Adapt the tolerance to a probe in exact training. Returns True after `patience` probes in a row by which it would do."""
        state, patience = self.state, self.config.adaptive.patience
        self._scale(_bounded(self._wanted(step, probe, aim), DOWN, UP))
        state.calm = state.calm + 1 if fault is None and not self.overrun(probe) else 0
        if state.calm < patience:
            return False
        state.calm = state.refusals = 0
        return True

    def _wanted(self, step: int, probe: Probe, aim: float) -> float:
        """Return the factor by which the tolerance should change for the bias that is aimed at; 0 if the bias is not finite."""
        if probe.bias is None or not math.isfinite(probe.bias):
            return 0.0
        return (aim * tolerated_bias(probe, self.config, step) / probe.bias) ** (1 / ORDER) if probe.bias else math.inf

    def _scale(self, factor: float) -> float:
        """Change the tolerance by a factor, within its bounds. Returns by which it has changed."""
        before = self.tolerance
        self.state.tolerance = _bounded(before * factor, LEAST, MOST)
        return self.tolerance / before

    @property
    def _in_words(self) -> str:
        return f"tolerance {self.tolerance:.2g}"

    def _sweeps_are_fewest(self, probe: Probe) -> bool:
        """Return True if the window has rolled on by its whole length after each sweep, so that a larger tolerance would gain nothing."""
        return probe.sweeps is not None and max(probe.sweeps) <= self._fewest_sweeps

    @property
    def _fewest_sweeps(self) -> int:
        """The fewest sweeps in one direction: the number of layers of each worker, if there are as many as the window has layers."""
        return math.ceil(len(self.config.solved_layers) / self.config.longest_window)

    def overrun(self, probe: Probe) -> str | None:
        """Return in words that the sweeps which a probe has seen take about as long as an exact step, or longer; None if they do not.

        It is the time on as many workers as the window has layers, whatever their number is now, so that decisions do not depend on it.
        Parameter gradients are formed side by side, and a layer's forward and its input gradient take one unit each.
        """
        if probe.sweeps is None:
            return None
        layers, owned = len(self.config.solved_layers), self._fewest_sweeps
        share = (sum(probe.sweeps) + owned) / (2 * layers + owned)
        if share <= WORTHWHILE_SHARE:
            return None
        return f"{probe.sweeps[0]} + {probe.sweeps[1]} sweeps take {share:.2f} of an exact step's time"

    # Checkpoints --------------------------------------------------------------------------------------------------------------------

    def restore(self, kept: dict[str, Any]) -> None:
        """Continue from a checkpoint's `ToleranceState`, as a dict of its fields; those of earlier versions have none."""
        self.state = ToleranceState(**{field.name: kept[field.name] for field in fields(ToleranceState) if field.name in kept})


def bias_factor(move: Move) -> float:
    """Return by what factor a change of the tolerance should change the bias."""
    return move.factor**ORDER


def _bounded(value: float, least: float, most: float) -> float:
    return min(max(value, least), most)
