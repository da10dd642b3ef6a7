"""What a solve returns: states, residual norms, convergence factor, and a status whose text is advice."""

import enum
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayllp.state import State

ROUNDING = 1e-10
"""A squared residual that is this part of the largest on its level, or less, is zero but for rounding."""


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
        point_residuals: the same by level (but the coarsest) and C-point (but the first, which is given), shapes (measured, points); no
            levels where no two can be compared.
        residuals: norms over all workers, filled by `measured`; empty until then.
        informative: how many residuals say something of convergence; the later ones are zero because iterations have by then made
            every interval exact.
        factors: by level and C-point but the first, how much of the residual there an iteration left: of the last two informative ones,
            filled by `measured`. None where iterations have by then made the state exact. On coarse levels the problem changes in between.
        status: how it went, as advice.
    """

    output: State | None
    states: dict[int, State]
    iterations: int
    squared_residuals: Tensor
    point_residuals: tuple[Tensor, ...] = ()
    residuals: tuple[float, ...] = ()
    factors: tuple[tuple[float | None, ...], ...] = ()
    status: Status = Status.UNMEASURED
    tolerance: float | None = None
    exact: bool = False
    informative: int = 0

    @property
    def convergence_factor(self) -> float | None:
        """ρ = ‖r^{k+1}‖ / ‖r^k‖ of the last two informative residuals (section 3.2.3); None with fewer than two."""
        return convergence_factor(self.residuals[: self.informative])

    @property
    def shares(self) -> Tensor:
        """What is to be summed over all workers for `measured`, float64, flat."""
        return torch.cat([self.squared_residuals, *(table.flatten() for table in self.point_residuals)])

    def measured(self, shares: Tensor) -> "MGRITResult":
        """This result with the residual norms and factors that belong to `shares`, summed over all workers."""
        squared, *points = shares.split([len(self.squared_residuals), *(table.numel() for table in self.point_residuals)])
        residuals = tuple(math.sqrt(value) if value >= 0 else math.nan for value in squared.tolist())
        rho = convergence_factor(residuals[: self.informative])
        last = min(len(squared), self.informative)
        tables = [summed.view(table.shape) for summed, table in zip(points, self.point_residuals, strict=True)]
        factors = tuple(_factors(table[last - 2], table[last - 1]) for table in tables) if last > 1 else ()
        status = judge(residuals, rho, tolerance=self.tolerance, exact=self.exact)
        return replace(self, residuals=residuals, factors=factors, status=status)


def convergence_factor(residuals: tuple[float, ...] | list[float]) -> float | None:
    """Ratio of the last two residual norms; None with fewer than two, 0 where the former one is zero."""
    if len(residuals) < 2:
        return None
    former, last = residuals[-2:]
    return 0.0 if former == 0 else last / former


def _factors(former: Tensor, last: Tensor) -> tuple[float | None, ...]:
    """Of squared residuals, by point."""
    inexact = torch.minimum(former, last) > ROUNDING * former.max()
    return tuple(ratio if there else None for ratio, there in zip((last / former).sqrt().tolist(), inexact.tolist(), strict=True))


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
