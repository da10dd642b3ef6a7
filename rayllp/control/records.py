"""What goes into the controller and comes out of it: accuracies of steps, what probes are to measure and have found, decisions."""

from dataclasses import dataclass, replace

from rayllp.config import Relaxation, TrainConfig
from rayllp.mgrit import SolverOptions


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How a step is solved. Serial means exact: microbatched pipeline over the blocks, or plain autograd on one worker.

    Attributes:
        consistency, smoothness: weights of the two penalties.
        relaxation: of the finest level; None: mgrit.relaxation.fine.
        window: layers solved at once, where the placement is cyclic: iterations are sweeps then, and levels mean nothing. 0: MGRIT.
    """

    serial: bool
    levels_forward: int
    levels_backward: int
    iterations_forward: int
    iterations_backward: int
    consistency: float = 0.0
    smoothness: float = 0.0
    relaxation: Relaxation | None = None
    window: int = 0

    @property
    def mode(self) -> str:
        """ "serial" or "parallel", as `metrics.jsonl` says it."""
        return "serial" if self.serial else "parallel"

    @property
    def name(self) -> str:
        """As a ladder has it: "2+1" iterations, "0+1" a serial forward, "2+1 FCF" with a relaxation of its own, "serial"."""
        if self.serial:
            return "serial"
        forward = 0 if self.levels_forward == 1 else self.iterations_forward
        return f"{forward}+{self.iterations_backward}" + (f" {self.relaxation}" if self.relaxation else "")

    def methods(self, config: TrainConfig) -> tuple[SolverOptions, SolverOptions]:
        """How the forward and the adjoint are solved."""
        return config.method(self.iterations_forward, self.relaxation), config.method(self.iterations_backward, self.relaxation)

    def probing(self) -> "Accuracy":
        """Doubled iterations, at least three, so that two residuals give ρ."""
        forward, backward = max(3, 2 * self.iterations_forward), max(3, 2 * self.iterations_backward)
        return replace(self, iterations_forward=forward, iterations_backward=backward)


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """What a probing step measures.

    Attributes:
        candidate: the accuracy that is judged: the one in use, or in serial training the rung to come back to.
        bias: whether its gradient is compared with a better one.
        exact: whether that better one is the exact gradient rather than that of doubled iterations.
        rho: whether convergence factors are wanted where the step is exact, for which doubled iterations are run besides.
        lipschitz: whether each layer's Lipschitz constant is estimated.
    """

    candidate: Accuracy
    bias: bool = False
    exact: bool = False
    rho: bool = True
    lipschitz: bool = False


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a probe found; None for what it did not measure.

    Attributes:
        bias: norm of the gradient's error over the gradient's norm.
        noise: standard deviation of the gradient over the choice of the batch, over the gradient's norm.
    """

    rho_forward: float | None = None
    rho_backward: float | None = None
    bias: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class Decision:
    """A change and its reason.

    Attributes:
        mode, rung: of the steps from here on.
        trying: the rung that they will go to once a probe has found it accurate, where they are exact until then.
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
