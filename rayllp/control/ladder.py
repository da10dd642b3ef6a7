"""The ladder: the accuracies that the controller chooses from."""

from dataclasses import replace

from rayllp.config import Relaxation, TrainConfig
from rayllp.control.records import Accuracy
from rayllp.control.tolerance_choice import FIRST
from rayllp.mgrit.windows import Windows


class Ladder:
    """The rungs from cheap to exact; the last one is serial.

    Attributes:
        rungs: the rungs, a rolling window with the tolerance of the settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.rungs = [*(_rung(config, *rung) for rung in config.ladder), _serial(config)]
        self.last = len(self.rungs) - 1

    def at(self, index: int, tolerance: float) -> Accuracy:
        """Return a rung, with this tolerance if it is a rolling window."""
        rung = self.rungs[index]
        return rung if rung.tolerance is None else replace(rung, tolerance=tolerance)

    def index(self, name: str) -> int:
        """Return the index of the rung with this name, or 0 if there is none."""
        return next((index for index, rung in enumerate(self.rungs) if rung.name == name), 0)


def _rung(config: TrainConfig, forward: int, backward: int, relaxation: Relaxation | None) -> Accuracy:
    """Return the accuracy of a rung, from its iterations and relaxation."""
    levels, cyclic = config.mgrit.levels, config.solver == "windows"
    return Accuracy(
        serial=False,
        levels_forward=1 if forward == 0 else config.rung_levels,
        levels_backward=levels.backward,
        iterations_forward=max(1, forward),
        iterations_backward=backward,
        relaxation=relaxation,
        windows=Windows.alike(config.window_lengths, forward, backward) if cyclic and not config.rolls else None,
        tolerance=(config.windows.tolerance or FIRST) if config.rolls else None,
    )


def _serial(config: TrainConfig) -> Accuracy:
    """Return the accuracy of exact steps."""
    first = config.ladder[0] if config.ladder else (1, 1, None)
    return replace(_rung(config, *first), serial=True, tolerance=None)
