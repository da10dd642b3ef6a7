"""How a problem is solved: everything that is not the problem itself."""

from dataclasses import dataclass
from typing import Literal

from rayllp.errors import SettingsError

Relaxation = Literal["F", "FCF"]


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """Iterations, relaxation, cycle and coarse operator of one solve.

    Attributes:
        iterations: their number, or the cap where `tolerance` is set.
        relaxation: F or FCF, by level; the last entry serves all coarser levels.
        cycle: V or F.
        coarse_step_weight: ω of the coarse operator; 1 is the paper's, 0 the identity.
        keep_states: whether F-points' values are in the result; a propagator that records graphs or checkpoints has no use for them.
        initial_guess: "coarse" (skipped down-cycle) or "constant" (every point starts as the initial state, a zero correction).
        batched: sweep a worker's intervals on the finest level side by side, a layer of each in one call.
        rounding: relative rounding error of what a layer adds to its state, where it is computed in a smaller dtype than the state's.
        tolerance: stop once the residual norm is at or below it; costs one all-reduce an iteration.

    Raises:
        SettingsError: no iteration, or a relaxation that is neither F nor FCF.
    """

    iterations: int = 1
    relaxation: tuple[Relaxation, ...] = ("F", "FCF")
    cycle: Literal["V", "F"] = "V"
    coarse_step_weight: float = 1.0
    initial_guess: Literal["coarse", "constant"] = "coarse"
    rounding: float = 0.0
    tolerance: float | None = None
    keep_states: bool = True
    batched: bool = False

    @property
    def measured_iterations(self) -> int:
        """How many iterations yield a residual, at most: a coarse initial guess counts as an iteration, but measures none."""
        return self.iterations - (self.initial_guess == "coarse")

    def relaxation_on(self, depth: int) -> Relaxation:
        """The relaxation of level `depth`."""
        return self.relaxation[min(depth, len(self.relaxation) - 1)]

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise SettingsError(f"{self.iterations} iterations: need at least 1; for an exact solve use 1 level")
        if not self.relaxation or any(kind not in ("F", "FCF") for kind in self.relaxation):
            raise SettingsError(f"relaxation {self.relaxation}: each level takes F or FCF")
