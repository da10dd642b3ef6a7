"""When to probe, and when to switch to serial training (arXiv:2601.09026, section 3.2.3).

Pure: no clock, no cluster, no random numbers. The driver owns it, and feeds it what probes measured.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from rayllp.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How a step is solved. Serial means exact: microbatched pipeline over the blocks, or plain autograd on one worker."""

    serial: bool
    levels_forward: int
    levels_backward: int
    iterations_forward: int
    iterations_backward: int
    consistency: float = 0.0

    @property
    def mode(self) -> str:
        return "serial" if self.serial else "parallel"

    def probing(self) -> "Accuracy":
        """Doubled iterations, at least three, so that two residuals give ρ."""
        return replace(
            self, iterations_forward=max(3, 2 * self.iterations_forward), iterations_backward=max(3, 2 * self.iterations_backward)
        )


@dataclass(frozen=True)
class Decision:
    """A switch and its reason."""

    step: int
    mode: str
    reason: str


class Controller:
    """The paper's rule: once ρ > threshold, forward or backward, train serially from then on."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.serial = config.mode == "serial"

    @property
    def accuracy(self) -> Accuracy:
        """Of the next step."""
        mgrit = self.config.mgrit
        return Accuracy(
            serial=self.serial,
            levels_forward=mgrit.levels.forward,
            levels_backward=mgrit.levels.backward,
            iterations_forward=mgrit.iterations.forward,
            iterations_backward=mgrit.iterations.backward,
            # A switched run lets go of it; mode=serial with a penalty prepares a network for parallel training.
            consistency=0.0 if self.serial and self.config.mode != "serial" else self.config.adaptive.consistency,
        )

    def is_probe(self, step: int) -> bool:
        """Whether this step runs with doubled iterations; the first such step is `probe_every` − 1, so that a run shows ρ early."""
        every = self.config.adaptive.probe_every
        return not self.serial and every > 0 and (step == 0 or (step + 1) % every == 0)

    def begin(self, step: int) -> Decision | None:
        """Before a step: the switch that settings ask for at it."""
        at = self.config.adaptive.switch_at
        if self.serial or at is None or step < at:
            return None
        self.serial = True
        return Decision(step, "serial", f"adaptive.switch_at {at}")

    def observe(self, step: int, rho_forward: float | None, rho_backward: float | None) -> Decision | None:
        """Take a probe's convergence factors; a decision if something changes."""
        if self.config.mode != "adaptive" or self.serial:
            return None
        limit = self.config.adaptive.threshold
        for name, rho in (("forward", rho_forward), ("backward", rho_backward)):
            if rho is not None and not rho <= limit:  # NaN counts as too large
                self.serial = True
                shown = "not finite" if not math.isfinite(rho) else f"{rho:.3g}"
                return Decision(step, "serial", f"{name} convergence factor {shown} passed adaptive.threshold {limit:g}")
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"serial": self.serial}

    def restore(self, state: dict[str, Any]) -> None:
        self.serial = bool(state["serial"])
