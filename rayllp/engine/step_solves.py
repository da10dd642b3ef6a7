"""Derives the hierarchies and solver options of a training step from its accuracy.

The engine and the planner (`plan/recording.py`) both take a step's solves from here, and from nowhere else.
"""

from dataclasses import dataclass, replace

from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.mgrit import Hierarchy, SolverOptions


@dataclass(frozen=True)
class StepSolves:
    """How forward and adjoint of one training step are solved.

    Attributes:
        accuracy: the accuracy that they follow from (`kind_of`).
        forward, adjoint: the hierarchies; the adjoint's is mirrored already.
        forward_options, adjoint_options: the solver's options.
        interval: number of layers in a coarse interval on the finest level.
        layers: number of middle layers.
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
        """Return the solves that `accuracy` asks for. A serial step has one level in both directions."""
        levels = (1, 1) if accuracy.serial else (accuracy.levels_forward, accuracy.levels_backward)
        options = accuracy.solver_options(config)
        return StepSolves(
            accuracy=kind_of(accuracy),
            forward=config.hierarchy(levels[0]),
            adjoint=config.hierarchy(levels[1]).adjoint(),
            forward_options=options[0],
            adjoint_options=options[1],
            interval=config.fine_coarsening,
            layers=config.middle_layers,
        )

    @property
    def c_points(self) -> frozenset[int]:
        """The layers that begin coarse intervals, counted from the first middle layer.

        An exact forward leaves graphs at these, too, for an adjoint that is solved on several levels.
        """
        return frozenset(range(0, self.layers, self.interval))

    @property
    def has_fixed_messages(self) -> bool:
        """True if any two steps with these solves exchange the same messages, because no tolerance ends the iterations early."""
        return self.forward_options.tolerance is None and self.adjoint_options.tolerance is None


def kind_of(accuracy: Accuracy) -> Accuracy:
    """Return an accuracy without what changes often, weights of penalties and tolerance: equal for steps that do the same kind of work."""
    return replace(accuracy, consistency=0.0, smoothness=0.0, tolerance=None if accuracy.tolerance is None else 1.0)
