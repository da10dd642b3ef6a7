"""How fast the bias of windows in use grows: when they are to be probed next, and how little bias others are to have at first."""

import math
from dataclasses import dataclass

FACTORS = (2.0, 1.0, 0.5, 0.25)
"""From one probe of the same windows to the next, the interval changes by one of these."""
LEAST_INTERVAL = 10
"""Smallest number of steps between two probes."""
AIMED_SHARE, LEAST_AIM = 0.5, 0.2
"""Windows are fitted to have the first share of the tolerated bias a quarter of `adaptive.probe_every` steps on, but at once no less than
the second.
"""
CHANCE = 1.5
"""Two probes of the same windows may differ by this factor though nothing has changed, since each sees one batch."""
MOST_INTERVALS = 2
"""The largest is this many times `adaptive.probe_every`."""


@dataclass
class ProbeTimes:
    """The part of the controller's state that concerns when to probe.

    Attributes:
        count: number of probes of windows in use.
        at: step of the last of them.
        bias: what it has found.
        tolerated: what would have been tolerated.
        growth: how fast the bias grows: the change of its logarithm in a step, as far as it is not chance.
        interval: number of steps to the next.
    """

    count: int = 0
    at: int = 0
    bias: float | None = None
    tolerated: float = 0.0
    growth: float = 0.0
    interval: int = LEAST_INTERVAL // 2

    def is_due(self, step: int) -> bool:
        """Return True if windows in use are to be probed at a step."""
        return step >= self.at + self.interval

    def expected_share(self, step: int) -> float:
        """Return the share of the tolerated bias that a probe is expected to find at a step."""
        return self._share(step - self.at)

    def aim(self, probe_every: int) -> float:
        """Return the share of the tolerated bias that windows are to have when they are fitted: the less, the faster it grows."""
        return max(LEAST_AIM, AIMED_SHARE * math.exp(-self.growth * probe_every / 4))

    def judge(self, step: int, bias: float, tolerated: float, *, same: bool, probe_every: int) -> None:
        """Take in what a probe has found for windows in use, or for others that are used from now on.

        Args:
            step: the probe's step.
            bias, tolerated: what it has found, and what would have been tolerated.
            same: whether the last probe was one of the same windows.
            probe_every: the setting of that name, which bounds the intervals.
        """
        if same and self.bias and 0 < bias < math.inf and step > self.at:
            self.growth = max(math.log(bias / self.bias / CHANCE) / (step - self.at), self.growth / 2)
        self.count, self.at, self.bias, self.tolerated = self.count + 1, step, bias, tolerated
        most = max(LEAST_INTERVAL, MOST_INTERVALS * probe_every)
        factors = FACTORS if same else FACTORS[1:]  # how the bias of other windows grows is not known yet
        intervals = [min(max(round(factor * self.interval), LEAST_INTERVAL), most) for factor in factors]
        self.interval = next((interval for interval in intervals if self._share(interval) <= 1), intervals[-1])

    def _share(self, steps: int) -> float:
        """Return the share of the tolerated bias that is expected so many steps after the last probe."""
        if not self.bias or not self.tolerated:
            return math.inf if self.bias else 0.0
        return self.bias / self.tolerated * math.exp(min(self.growth * steps, 100.0))
