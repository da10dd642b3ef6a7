"""What goes into the controller and what comes out of it: accuracies of steps, plans and findings of probes, decisions."""

from dataclasses import dataclass, replace

from rayllp.config import Relaxation, TrainConfig
from rayllp.mgrit import SolverOptions
from rayllp.mgrit.windows import Windows

ROLLING = "rolling"
"""Name of a solve by a rolling window, whatever its tolerance."""
PROBES = "probes"
"""Name under which the times of steps that also measure are kept, whatever their solve."""
FINER = 8.0
"""A rolling window is judged by one with so many times less tolerance."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How accurately a step is solved. Serial means exact: by a pipeline over the blocks, with layers in turn, or on one worker.

    Attributes:
        serial: True for an exact step.
        levels_forward, levels_backward: number of levels of the forward and of the adjoint solve.
        iterations_forward, iterations_backward: number of iterations of each.
        consistency, smoothness: weights of the two penalties.
        relaxation: relaxation on the finest level; None: mgrit.relaxation.fine.
        windows: on a cyclic placement, windows of fixed lengths; the iterations are then the most sweeps of any.
        tolerance: on a cyclic placement, of a rolling window. If there are neither windows nor a tolerance, the solve is by MGRIT.
    """

    serial: bool
    levels_forward: int
    levels_backward: int
    iterations_forward: int
    iterations_backward: int
    consistency: float = 0.0
    smoothness: float = 0.0
    relaxation: Relaxation | None = None
    windows: Windows | None = None
    tolerance: float | None = None

    @property
    def mode(self) -> str:
        """ "serial" or "parallel", as `metrics.jsonl` says it."""
        return "serial" if self.serial else "parallel"

    @property
    def name(self) -> str:
        """The name of this rung in a ladder: "2+1" for iterations forward and adjoint, "0+1" for a serial forward, "2+1 FCF" with a
        relaxation of its own, "rolling" for a rolling window, "serial".
        """
        if self.serial:
            return "serial"
        if self.tolerance is not None:
            return ROLLING
        forward = 0 if self.levels_forward == 1 else self.iterations_forward
        return f"{forward}+{self.iterations_backward}" + (f" {self.relaxation}" if self.relaxation else "")

    def solver_options(self, config: TrainConfig) -> tuple[SolverOptions, SolverOptions]:
        """Return the solver's options for the forward and for the adjoint solve."""
        forward, adjoint = (config.solver_options(count, self.relaxation) for count in (self.iterations_forward, self.iterations_backward))
        return forward, adjoint

    def doubled(self) -> "Accuracy":
        """Return a better one: with less tolerance, or doubled iterations, at least three each, so that there are two residuals for ρ."""
        if self.tolerance is not None:
            return replace(self, tolerance=self.tolerance / FINER)
        forward, backward = _doubled(self.iterations_forward), _doubled(self.iterations_backward)
        windows = self.windows and replace(self.windows, sweeps=tuple((_doubled(f), _doubled(b)) for f, b in self.windows.sweeps))
        return replace(self, iterations_forward=forward, iterations_backward=backward, windows=windows)


def _doubled(count: int) -> int:
    return max(3, 2 * count)


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """What a probing step measures.

    Attributes:
        candidate: the accuracy to judge: the one in use or, in serial training, that of the rung to return to.
        bias: compare the gradient of `candidate` with a better one.
        exact: take the exact gradient for the better one, rather than that of doubled iterations.
        rho: measure convergence factors even if the step is exact; doubled iterations are then run in addition.
        lipschitz: estimate each layer's Lipschitz constant.
    """

    candidate: Accuracy
    bias: bool = False
    exact: bool = False
    rho: bool = True
    lipschitz: bool = False


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Findings of a probe; None for what it did not measure.

    Attributes:
        rho_forward, rho_backward: convergence factors of the forward and of the adjoint solve.
        bias: norm of the gradient's error over the gradient's norm, a mean over layers (`engine/probe.py`).
        noise: standard deviation of the gradient over the choice of the batch, over the gradient's norm, as the same mean.
        loss_gap: relative difference of the loss by the solve in use from that of the same batch by a better solve.
        sweeps: sweeps forward and backward of the solve that was judged, if that is by a rolling window.
    """

    rho_forward: float | None = None
    rho_backward: float | None = None
    bias: float | None = None
    noise: float | None = None
    loss_gap: float | None = None
    sweeps: tuple[int, int] | None = None


@dataclass(frozen=True)
class Decision:
    """A change of accuracy, and its reason.

    Attributes:
        step: the step at which it was made.
        mode, rung: mode ("serial" or "parallel") and rung of the steps from here on.
        reason: why, in words.
        trying: the rung that steps will use once a probe has found it accurate, if they are exact until then; otherwise empty.
    """

    step: int
    mode: str
    reason: str
    rung: str = ""
    trying: str = ""

    @property
    def trained(self) -> str:
        """How the steps from here on are solved, in words."""
        solved = "exact" if self.mode == "serial" else self.rung
        return f"{solved}, trying {self.trying}" if self.trying else solved
