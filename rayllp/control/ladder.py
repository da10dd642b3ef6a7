"""The ladder: the accuracies that the controller chooses from."""

from dataclasses import replace

from rayllp.config import Relaxation, TrainConfig
from rayllp.control.records import Accuracy
from rayllp.mgrit.windows import cut_windows, exact_step_cost, window_step_cost

Couplings = tuple[float, ...] | None


class Ladder:
    """The rungs from cheap to exact; the last one is serial.

    Attributes:
        rungs: the rungs, with windows that are not cut.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.rungs = [*(_rung(config, *rung) for rung in config.ladder), _serial(config)]
        self.last = len(self.rungs) - 1

    def cut(self, index: int, couplings: Couplings) -> Accuracy:
        """Return a rung with windows that are cut by these couplings; None: they are not cut."""
        rung = self.rungs[index]
        if rung.serial or couplings is None:
            return rung
        sweeps = min(rung.iterations_forward, rung.iterations_backward)
        return replace(rung, windows=cut_windows(couplings, self.config.longest_window, sweeps))

    def cost(self, index: int, couplings: Couplings) -> float:
        """Return the time of a step in evaluations of a layer. It serves to choose windows before steps by them can be timed.

        It is that on as many workers as the longest window has layers, whatever their number is now, so that decisions do not depend on it.
        """
        rung, workers = self.cut(index, couplings), self.config.longest_window
        if rung.serial:
            return exact_step_cost(self.config.middle_layers, workers)
        return window_step_cost(rung.windows, rung.iterations_forward, rung.iterations_backward, workers)

    def above(self, index: int, couplings: Couplings) -> int:
        """Return the index of the next rung. Where windows are cut, it is the cheapest one: more sweeps allow longer windows."""
        if couplings is None or index + 1 >= self.last:
            return index + 1
        return min(range(index + 1, self.last), key=lambda other: self.cost(other, couplings))

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
        windows=config.window_lengths if config.solver == "windows" else (),
    )


def _serial(config: TrainConfig) -> Accuracy:
    """Return the accuracy of exact steps."""
    first = config.ladder[0] if config.ladder else (1, 1, None)
    return replace(_rung(config, *first), serial=True)
