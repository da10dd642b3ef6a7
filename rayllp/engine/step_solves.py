"""What an accuracy means for the solver: the one place where it becomes hierarchies and options.

The engine and the planner (`plan/schedule.py`) both take a step's solves from here.
"""

from dataclasses import dataclass, replace

from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.mgrit import Hierarchy, SolverOptions


@dataclass(frozen=True)
class StepSolves:
    """How the forward and the adjoint of one training step are solved.

    Attributes:
        accuracy: what they were made of, without its penalties' weights.
        forward, adjoint: the hierarchies; the adjoint's is mirrored already.
        forward_options, adjoint_options: the solver's.
        interval: layers of a coarse interval on the finest level.
        layers: middle layers.
    """

    accuracy: Accuracy
    forward: Hierarchy
    adjoint: Hierarchy
    forward_options: SolverOptions
    adjoint_options: SolverOptions
    interval: int
    layers: int

    @staticmethod
    def of(accuracy: Accuracy, config: TrainConfig) -> "StepSolves":
        """The solves that `accuracy` asks for; a serial step has one level in both directions."""
        levels = (1, 1) if accuracy.serial else (accuracy.levels_forward, accuracy.levels_backward)
        options = accuracy.methods(config)
        return StepSolves(
            accuracy=without_penalties(accuracy),
            forward=config.hierarchy(levels[0]),
            adjoint=config.hierarchy(levels[1]).adjoint(),
            forward_options=options[0],
            adjoint_options=options[1],
            interval=config.first_coarsening,
            layers=config.middle_layers,
        )

    @property
    def c_points(self) -> frozenset[int]:
        """The layers that begin coarse intervals, counted from the first middle layer. An exact forward leaves graphs there, too."""
        return frozenset(range(0, self.layers, self.interval))

    @property
    def has_fixed_messages(self) -> bool:
        """True if any two steps with these solves exchange the same messages: no tolerance ends the iterations early."""
        return self.forward_options.tolerance is None and self.adjoint_options.tolerance is None


def without_penalties(accuracy: Accuracy) -> Accuracy:
    """The part of an accuracy that says how to solve: equal for steps that are solved alike."""
    return replace(accuracy, consistency=0.0, smoothness=0.0)
