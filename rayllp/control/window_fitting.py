"""Fitting a run's windows to what a probe has measured."""

import math

from rayllp.config import TrainConfig
from rayllp.mgrit.couplings import Couplings
from rayllp.mgrit.fitting import FittedWindows, WindowErrors, exact_step_cost

AIMED_SHARE = 0.4
"""Windows are fitted to have this share of the bias that is tolerated."""


class WindowFitting:
    """Windows of one run.

    Attributes:
        full: the cheapest windows, all as long as they may be, with one sweep each way.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        lengths = config.window_lengths
        self.full = FittedWindows(lengths, ((1, 1),) * len(lengths))

    def fit(self, couplings: Couplings, judged: FittedWindows, bias: float, tolerated: float) -> FittedWindows:
        """Return the fastest windows found whose bias should be `AIMED_SHARE` of the tolerated one.

        Args:
            couplings: of the layers.
            judged: windows that a probe has judged. Estimated errors are right in proportion only; these give the scale.
            bias: relative bias of the gradient that it has found for them.
            tolerated: relative bias that is tolerated.
        """
        errors = WindowErrors(couplings, self.config.longest_window)
        estimated, limit = errors.of(judged), AIMED_SHARE * tolerated
        return errors.fit(limit * estimated / bias if 0 < bias < math.inf and 0 < estimated < math.inf else limit)

    def share_of_exact(self, windows: FittedWindows) -> float:
        """Return the time of a step by these windows over that of an exact step. It serves to choose before steps by them can be timed.

        It is that on as many workers as the longest window has layers, whatever their number is now, so that decisions do not depend on it.
        """
        workers = self.config.longest_window
        return windows.cost(workers) / exact_step_cost(self.config.middle_layers, workers)
