"""Options of the MGRIT solver: everything about a solve but the problem itself."""

from dataclasses import dataclass
from typing import Literal

from rayllp.errors import SettingsError

Relaxation = Literal["F", "FCF"]


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """Iterations, relaxation, cycle and coarse operator of one solve.

    Attributes:
        iterations: number of iterations; their maximum where `tolerance` is set.
        relaxation: "F" or "FCF" for each level, finest first; the last entry also holds for all coarser levels.
        cycle: "V" or "F".
        coarse_step_weight: ω of the coarse operator (`Rediscretised`): 1 is the operator of arXiv:2601.09026, 0 the identity.
        initial_guess: "coarse" solves the coarsest level first (XBraid's skipped down-cycle); "constant" sets all C-points to u_0.
        rounding: relative rounding error of a layer's increment, where it is computed in a lower precision than the state's; otherwise 0.
        tolerance: the residual norm at which to stop, checked by one all-reduce per iteration. None: do all iterations.
        batched: sweep a worker's intervals on the finest level side by side, one layer of each in one call.

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
    batched: bool = False

    @property
    def measured_iterations(self) -> int:
        """The largest number of iterations that yield a residual. A coarse initial guess counts as an iteration but yields none."""
        return self.iterations - (self.initial_guess == "coarse")

    def relaxation_on(self, depth: int) -> Relaxation:
        """Return the relaxation on level `depth`."""
        return self.relaxation[min(depth, len(self.relaxation) - 1)]

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise SettingsError(f"{self.iterations} iterations: need at least 1; for an exact solve use 1 level")
        if not self.relaxation or any(kind not in ("F", "FCF") for kind in self.relaxation):
            raise SettingsError(f"relaxation {self.relaxation}: each level takes F or FCF")
