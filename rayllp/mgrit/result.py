"""What a solve returns: states, residual norms, convergence factor, and a status whose text is advice."""

import enum
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayllp.state import State, squared_norm, tensors

ROUNDING = 1e-10
"""A squared residual that is this part of the largest on its level, or less, is zero but for rounding."""


FAR = 10.0
"""Times the floor: a residual this far above it has a factor even where the next one has reached it."""


class Status(enum.Enum):
    """How a solve ended; the value is the advice."""

    EXACT = "exact: one level, or as many iterations as coarse intervals; nothing was approximated"
    UNMEASURED = "unmeasured: this few iterations yield no convergence factor; run three or more (a probe) to see one"
    CONVERGED = "converged: the residual is below the tolerance, or is nothing but rounding; more iterations change nothing"
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
        floor: norm, over all workers, of a residual that is nothing but rounding; filled by `measured`.
        squared_floor: this worker's share of the squared norm of residuals that are nothing but rounding: a float64 scalar.
        status: how it went, as advice.
    """

    output: State | None
    states: dict[int, State]
    iterations: int
    squared_residuals: Tensor
    point_residuals: tuple[Tensor, ...] = ()
    squared_floor: Tensor | None = None
    residuals: tuple[float, ...] = ()
    factors: tuple[tuple[float | None, ...], ...] = ()
    status: Status = Status.UNMEASURED
    tolerance: float | None = None
    exact: bool = False
    informative: int = 0
    floor: float = 0.0

    @property
    def convergence_factor(self) -> float | None:
        """ρ = ‖r^{k+1}‖ / ‖r^k‖ of the last two informative residuals (section 3.2.3); None with fewer than two, 0 once there is nothing
        left but rounding.
        """
        return convergence_factor(self.residuals[: self.informative], self.floor)

    @property
    def shares(self) -> Tensor:
        """What is to be summed over all workers for `measured`, float64, flat."""
        floor = [self.squared_floor.view(1)] if self._has_floor and self.squared_floor is not None else []
        return torch.cat([self.squared_residuals, *(table.flatten() for table in self.point_residuals), *floor])

    @property
    def _has_floor(self) -> bool:
        return self.squared_floor is not None and len(self.squared_residuals) > 1

    def measured(self, shares: Tensor) -> "MGRITResult":
        """This result with the residual norms and factors that belong to `shares`, summed over all workers."""
        sizes = [len(self.squared_residuals), *(table.numel() for table in self.point_residuals)]
        squared, *points, rounding = shares.split([*sizes, int(self._has_floor)])
        residuals = tuple(math.sqrt(value) if value >= 0 else math.nan for value in squared.tolist())
        floor = math.sqrt(float(rounding.sum()))
        result = replace(self, residuals=residuals, floor=floor, informative=min(self.informative, _above(residuals, floor) + 1))
        last = min(len(squared), result.informative)
        tables = [summed.view(table.shape) for summed, table in zip(points, self.point_residuals, strict=True)]
        factors = tuple(_factors(table[last - 2], table[last - 1], floor) for table in tables) if last > 1 else ()
        rho = result.convergence_factor
        status = judge(residuals, rho, tolerance=self.tolerance, exact=self.exact, floor=floor)
        return replace(result, factors=factors, status=status)


def squared_rounding(state: State, increment: State, rounding: float) -> Tensor:
    """What rounding adds to the squared error of a state in one step.

    Args:
        increment: what the step adds to the state.
        rounding: relative rounding error of the increment; that of the state is its dtype's.
    """
    if not tensors(state):
        return squared_norm(state)
    own = max(torch.finfo(part.dtype).eps for part in tensors(state))
    return own**2 * squared_norm(state) + rounding**2 * squared_norm(increment)


def convergence_factor(residuals: tuple[float, ...] | list[float], floor: float = 0.0) -> float | None:
    """Ratio of the last two residual norms; None with fewer than two, 0 where the former one is zero, or all but rounding.

    Args:
        floor: norm of a residual that is nothing but rounding: a ratio to one near it says nothing of the method.
    """
    if len(residuals) < 2:
        return 0.0 if residuals and residuals[0] <= floor > 0 else None
    former, last = residuals[-2:]
    return 0.0 if former == 0 or (last <= floor and former <= FAR * floor) else last / former


def _above(residuals: tuple[float, ...], floor: float) -> int:
    """How many residuals, from the first, are more than rounding."""
    return next((k for k, residual in enumerate(residuals) if residual <= floor), len(residuals))


def _factors(former: Tensor, last: Tensor, floor: float) -> tuple[float | None, ...]:
    """Of squared residuals, by point."""
    inexact = torch.minimum(former, last) > max(ROUNDING * float(former.max()), floor**2 / len(former))
    return tuple(ratio if there else None for ratio, there in zip((last / former).sqrt().tolist(), inexact.tolist(), strict=True))


def judge(
    residuals: tuple[float, ...], rho: float | None, *, tolerance: float | None = None, exact: bool = False, floor: float = 0.0
) -> Status:
    """The status that residual norms and their convergence factor deserve; `floor` is the norm of one that is nothing but rounding."""
    if any(not math.isfinite(r) for r in residuals):
        return Status.NOT_FINITE
    if rho is not None and rho > 1:
        return Status.DIVERGING
    if exact:
        return Status.EXACT
    if residuals and (min(residuals) <= floor > 0 or (tolerance is not None and residuals[-1] <= tolerance)):
        return Status.CONVERGED
    if rho is None:
        return Status.UNMEASURED
    return Status.CONVERGING if rho < 0.9 else Status.STALLED


def no_residuals() -> Tensor:
    """Of a solve that measured none: an empty tensor of doubles."""
    return torch.zeros(0, dtype=torch.float64)
