"""The ladder: the accuracies that the controller chooses from."""

from dataclasses import replace

from rayllp.config import Relaxation, TrainConfig
from rayllp.control.records import Accuracy
from rayllp.mgrit.windows import Windows


class Ladder:
    """The rungs from cheap to exact; the last one is serial.

    Attributes:
        rungs: the rungs, with windows that are not fitted.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.rungs = [*(_rung(config, *rung) for rung in config.ladder), _serial(config)]
        self.last = len(self.rungs) - 1

    def fitted(self, index: int, windows: Windows | None) -> Accuracy:
        """Return a rung with these windows; None: those of all windows' full length."""
        rung = self.rungs[index]
        if rung.serial or windows is None:
            return rung
        forward, backward = max(windows.forward), max(windows.backward)
        return replace(rung, windows=windows, fitted=True, iterations_forward=forward, iterations_backward=backward)

    def index(self, name: str) -> int:
        """Return the index of the rung with this name, or 0 if there is none."""
        return next((index for index, rung in enumerate(self.rungs) if rung.name == name), 0)


def _rung(config: TrainConfig, forward: int, backward: int, relaxation: Relaxation | None) -> Accuracy:
    """Return the accuracy of a rung, from its iterations and relaxation."""
    levels = config.mgrit.levels
    return Accuracy(
        serial=False,
        levels_forward=1 if forward == 0 else config.rung_levels,
        levels_backward=levels.backward,
        iterations_forward=max(1, forward),
        iterations_backward=backward,
        relaxation=relaxation,
        windows=Windows.alike(config.window_lengths, forward, backward) if config.solver == "windows" else None,
    )


def _serial(config: TrainConfig) -> Accuracy:
    """Return the accuracy of exact steps."""
    first = config.ladder[0] if config.ladder else (1, 1, None)
    return replace(_rung(config, *first), serial=True)
