"""The result of a solve: each worker's output and share of the residuals; over all workers, the convergence factor and a status."""

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllp.state import State, squared_norm, tensors

ROUNDING = 1e-10
"""A squared residual of at most this share of the largest one on its level counts as zero: it is rounding error."""


FAR = 10.0
"""A residual above this many times the rounding floor yields a convergence factor even if the next residual has reached the floor."""


class Status(enum.Enum):
    """How a solve ended. The value is a text that says so and gives advice."""

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
class Convergence:
    """How a solve converged, over all its workers.

    Attributes:
        residuals: the residual norm of each measured iteration.
        convergence_factor: ρ = ‖r^{k+1}‖ / ‖r^k‖ of the last two informative residuals (arXiv:2601.09026, section 3.2.3). None with fewer
            than two of them; 0 once only rounding error is left.
        factors: for each level and C-point but the first, the ratio of the last two informative residuals there. None where the state is
            exact by then. On coarse levels the problem itself changes from one iteration to the next.
        floor: norm of a residual that is rounding error only.
        status: how the solve went, with advice.
        sweeps: with a rolling window, number of sweeps; otherwise None.
    """

    residuals: tuple[float, ...]
    convergence_factor: float | None
    factors: tuple[tuple[float | None, ...], ...]
    floor: float
    status: Status
    sweeps: int | None = None


@dataclass(frozen=True, kw_only=True)
class ResidualShares:
    """One worker's share of a solve's residuals. Only the sum over all workers says anything about convergence.

    Attributes:
        squared: the squared residual norm of each measured iteration: float64, shape (measured,).
        squared_floor: the squared norm of a residual that is rounding error only: a float64 scalar.
        points: for each level but the coarsest, the squared residuals at all C-points but the first, zero where another worker owns the
            point: float64, shape (measured, points). Empty if fewer than two iterations are measured.
        informative: how many residuals, from the first, say something about convergence. Later ones are zero by construction, since
            each iteration makes further intervals exact.
        exact: True if nothing was approximated: one level, or as many iterations as coarse intervals. The same on all workers.
        tolerance: the residual norm at which iterations were to stop; None if none was set. The same on all workers.
        converged: True if iterations went on until all changes were within a tolerance. The same on all workers.
        sweeps: with a rolling window, number of sweeps; otherwise None. The same on all workers.
    """

    squared: Tensor
    squared_floor: Tensor
    points: tuple[Tensor, ...] = ()
    informative: int = 0
    exact: bool = False
    tolerance: float | None = None
    converged: bool = False
    sweeps: int | None = None

    @property
    def flat(self) -> Tensor:
        """All values to sum over the workers, as one flat float64 tensor, whose shape is the same on all workers."""
        return torch.cat([part.flatten() for part in self._parts])

    @property
    def _parts(self) -> list[Tensor]:
        floor = [self.squared_floor] if len(self.squared) > 1 else []  # only a ratio of two residuals needs it
        return [self.squared, *self.points, *floor]

    def convergence(self, total: Tensor) -> Convergence:
        """Return how the solve went.

        Args:
            total: the sum of all workers' `flat`.
        """
        squared, *others = total.split([part.numel() for part in self._parts])
        residuals = tuple(math.sqrt(value) if value >= 0 else math.nan for value in squared.tolist())
        floor = math.sqrt(float(others.pop())) if len(squared) > 1 else 0.0
        informative = min(self.informative, _above(residuals, floor) + 1)
        last = min(len(residuals), informative)
        tables = [summed.view(table.shape) for summed, table in zip(others, self.points, strict=True)]
        rho = convergence_factor(residuals[:informative], floor)
        return Convergence(
            residuals=residuals,
            convergence_factor=rho,
            factors=tuple(_factors(table[last - 2], table[last - 1], floor) for table in tables) if last > 1 else (),
            floor=floor,
            status=judge(residuals, rho, tolerance=self.tolerance, exact=self.exact, converged=self.converged, floor=floor),
            sweeps=self.sweeps,
        )


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The result of one solve on one worker.

    Attributes:
        output: the state after the last step, on the worker that takes that step (with windows, on every worker); None elsewhere.
        residuals: this worker's share of the residuals.
    """

    output: State | None
    residuals: ResidualShares


def sweeps_of_both(forward: Convergence | ResidualShares | None, adjoint: Convergence | ResidualShares | None) -> tuple[int, int] | None:
    """Return the numbers of sweeps of a forward and an adjoint solve; None unless both were by a rolling window."""
    first, second = (None if solve is None else solve.sweeps for solve in (forward, adjoint))
    return None if first is None or second is None else (first, second)


def squared_rounding(state: State, increment: State, rounding: float) -> Tensor:
    """Return what rounding adds to the squared error of a state in one step: a float64 scalar.

    Args:
        state: the state that the increment is added to.
        increment: what the step adds to the state.
        rounding: relative rounding error of the increment. That of the state follows from its dtype.
    """
    if not tensors(state):
        return squared_norm(state)
    own = max(torch.finfo(part.dtype).eps for part in tensors(state))
    return own**2 * squared_norm(state) + rounding**2 * squared_norm(increment)


def convergence_factor(residuals: tuple[float, ...] | list[float], floor: float = 0.0) -> float | None:
    """Return the ratio of the last two residual norms.

    Args:
        residuals: residual norms, first iteration first.
        floor: norm of a residual that is rounding error only. A ratio of residuals near it says nothing about convergence.

    Returns: None with fewer than two residuals; 0 if the former one is zero, or both are close to rounding error.
    """
    if len(residuals) < 2:
        return 0.0 if residuals and residuals[0] <= floor > 0 else None
    former, last = residuals[-2:]
    return 0.0 if former == 0 or (last <= floor and former <= FAR * floor) else last / former


def _above(residuals: tuple[float, ...], floor: float) -> int:
    """Return how many residuals, from the first, are above rounding error."""
    return next((k for k, residual in enumerate(residuals) if residual <= floor), len(residuals))


def _factors(former: Tensor, last: Tensor, floor: float) -> tuple[float | None, ...]:
    """Return the convergence factor at each point from its squared residuals before and after an iteration; None for rounding error."""
    inexact = torch.minimum(former, last) > max(ROUNDING * float(former.max()), floor**2 / len(former))
    return tuple(ratio if there else None for ratio, there in zip((last / former).sqrt().tolist(), inexact.tolist(), strict=True))


def judge(
    residuals: tuple[float, ...],
    rho: float | None,
    *,
    tolerance: float | None = None,
    exact: bool = False,
    converged: bool = False,
    floor: float = 0.0,
) -> Status:
    """Return the status that follows from residual norms and their convergence factor.

    Args:
        tolerance: residual norm at which the solve counts as converged.
        exact: True if the solve approximated nothing.
        converged: True if it went on until all changes were within a tolerance.
        floor: norm of a residual that is rounding error only.
    """
    if any(not math.isfinite(r) for r in residuals):
        return Status.NOT_FINITE
    if converged:  # changes may grow at first
        return Status.EXACT if exact else Status.CONVERGED
    if rho is not None and rho > 1:
        return Status.DIVERGING
    if exact:
        return Status.EXACT
    if residuals and (min(residuals) <= floor > 0 or (tolerance is not None and residuals[-1] <= tolerance)):
        return Status.CONVERGED
    if rho is None:
        return Status.UNMEASURED
    return Status.CONVERGING if rho < 0.9 else Status.STALLED
