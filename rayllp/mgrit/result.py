"""What a solve returns: states, residual norms, convergence factor, and a status whose text is advice."""

import enum
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayllp.state import State


class Status(enum.Enum):
    """How a solve ended; the value is the advice."""

    EXACT = "exact: one level, or as many iterations as coarse intervals; nothing was approximated"
    UNMEASURED = "unmeasured: this few iterations yield no convergence factor; run three or more (a probe) to see one"
    CONVERGED = "converged: the residual is below the tolerance"
    CONVERGING = "converging: each iteration reduces the residual; more mgrit.iterations buy accuracy at this rate"
    STALLED = (
        "stalled: the convergence factor is near 1, more iterations hardly help; use a smaller mgrit.coarsening, FCF-relaxation, "
        "buffer layers, a smaller step.middle, or mode=serial"
    )
    DIVERGING = (
        "diverging: the convergence factor is above 1, more iterations make it worse; switch to mode=serial, or use a smaller "
        "mgrit.coarsening, the consistency penalty (adaptive.consistency), buffer layers or a smaller step.middle"
    )
    NOT_FINITE = "not finite: a residual is NaN or infinite; look at the batch, the learning rate and the weights"


@dataclass(frozen=True, kw_only=True)
class MGRITResult:
    """Result of one solve on one worker.

    Attributes:
        output: the state after the last step, on the worker that owns it; None elsewhere.
        states: the owned fine points by index in time order (C-points and block inputs always, F-points where kept).
        iterations: iterations done, counted as XBraid and the paper count them.
        squared_residuals: this worker's share of the squared residual norm of each measuring iteration, float64, shape (measured,).
        residuals: norms over all workers, filled by `measured`; empty until then.
        informative: how many residuals say something of convergence; the later ones are zero because iterations have by then made
            every interval exact.
        status: how it went, as advice.
    """

    output: State | None
    states: dict[int, State]
    iterations: int
    squared_residuals: Tensor
    residuals: tuple[float, ...] = ()
    status: Status = Status.UNMEASURED
    tolerance: float | None = None
    exact: bool = False
    informative: int = 0

    @property
    def convergence_factor(self) -> float | None:
        """ρ = ‖r^{k+1}‖ / ‖r^k‖ of the last two informative residuals (section 3.2.3); None with fewer than two."""
        return convergence_factor(self.residuals[: self.informative])

    def measured(self, squared: Tensor) -> "MGRITResult":
        """This result with the residual norms that belong to `squared`, the squares summed over all workers."""
        residuals = tuple(math.sqrt(value) if value >= 0 else math.nan for value in squared.tolist())
        rho = convergence_factor(residuals[: self.informative])
        return replace(self, residuals=residuals, status=judge(residuals, rho, tolerance=self.tolerance, exact=self.exact))


def convergence_factor(residuals: tuple[float, ...] | list[float]) -> float | None:
    """Ratio of the last two residual norms; None with fewer than two, 0 where the former one is zero."""
    if len(residuals) < 2:
        return None
    former, last = residuals[-2:]
    return 0.0 if former == 0 else last / former


def judge(residuals: tuple[float, ...], rho: float | None, *, tolerance: float | None = None, exact: bool = False) -> Status:
    """The status that residual norms and their convergence factor deserve."""
    if any(not math.isfinite(r) for r in residuals):
        return Status.NOT_FINITE
    if rho is not None and rho > 1:
        return Status.DIVERGING
    if exact:
        return Status.EXACT
    if tolerance is not None and residuals and residuals[-1] <= tolerance:
        return Status.CONVERGED
    if rho is None:
        return Status.UNMEASURED
    return Status.CONVERGING if rho < 0.9 else Status.STALLED


def no_residuals() -> Tensor:
    """Of a solve that measured none: an empty tensor of doubles."""
    return torch.zeros(0, dtype=torch.float64)
