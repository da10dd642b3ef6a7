"""What probes say together about the windows in use: their typical bias, how fast it grows, and so when the next probe is due.

A probe sees one batch, and two probes of the same windows may differ by half. It decides alone whether steps are trained (`judgement.py`),
but what it takes to fit other windows, and when to look again, follows from all probes of these windows, the latest of which counts most.
"""

import math
from dataclasses import dataclass, replace

from rayllp.config import TrainConfig
from rayllp.control.judgement import tolerated_bias
from rayllp.control.records import Probe

FACTORS = (1.5, 1.0, 0.5, 0.25)
"""From one probe of the same windows to the next, the interval changes by one of these. It is not doubled: a bias that was small for long
may grow tenfold in less than half of the steps done, and windows that are in use meanwhile leave a network of stronger couplings.
"""
LEAST_INTERVAL = 10
"""Smallest number of steps between two probes; the largest is `adaptive.probe_every`."""
UNUSED_INTERVAL = LEAST_INTERVAL // 2
"""Interval of windows that have not been in use yet, from which the first one follows."""
AIMED_SHARE, LEAST_AIM = 0.4, 0.2
"""Windows are fitted to have the first share of the tolerated bias a quarter of `adaptive.probe_every` steps on, but at once no less than
the second.
"""
CHANCE = 1.5
"""Two probes of the same windows may differ by this factor though nothing has changed."""


@dataclass
class BiasTrend:
    """The part of the controller's state that concerns the bias of windows.

    Attributes:
        bias, noise: typical ones, as probes of these windows have found them; None if none has.
        latest: bias that the latest probe of these windows has found.
        growth: how fast the bias grows: the change of its logarithm in a step, as far as it is not chance.
        count: number of probes.
        at: step of the last one.
        interval: number of steps from there to the next, while the windows are in use.
    """

    bias: float | None = None
    noise: float | None = None
    latest: float | None = None
    growth: float = 0.0
    count: int = 0
    at: int = 0
    interval: int = UNUSED_INTERVAL

    def forget(self) -> None:
        """Forget what these windows are like, since others are chosen. How fast the bias grows is remembered."""
        self.bias = self.noise = self.latest = None

    def begin_anew(self) -> None:
        """Forget all, since windows have not been in use for a while."""
        self.forget()
        self.growth, self.interval = 0.0, UNUSED_INTERVAL

    def take(self, step: int, probe: Probe, *, in_use: bool) -> Probe:
        """Take in what a probe has found. Returns it with the typical bias and noise in place of its own.

        Args:
            step: the probe's step.
            probe: what it has found.
            in_use: whether the windows have been in use since the last probe.
        """
        if probe.bias is None:
            return probe
        if in_use and self.latest and 0 < self.latest < math.inf and 0 < probe.bias < math.inf and step > self.at:
            self.growth = max(math.log(probe.bias / self.latest / CHANCE) / (step - self.at), self.growth / 2)
        expected = self.bias and self.bias * self._grown(step)
        self.bias, self.noise, self.latest = _mean(expected, probe.bias), _mean(self.noise, probe.noise), probe.bias
        self.at = step
        return replace(probe, bias=self.bias, noise=self.noise)

    # The next probe -----------------------------------------------------------------------------------------------------------------

    def plan(self, config: TrainConfig, *, in_use: bool) -> None:
        """Choose when windows are probed again that have just been probed: the longest interval after which they should still be accurate.

        Args:
            config: says which bias is tolerated, and bounds the intervals.
            in_use: whether they have been in use since the last probe. How the bias of others grows is not known yet.
        """
        most = max(LEAST_INTERVAL, config.adaptive.probe_every)
        factors = FACTORS if in_use else FACTORS[1:]
        intervals = [min(max(round(factor * self.interval), LEAST_INTERVAL), most) for factor in factors]
        self.interval = next((interval for interval in intervals if self.share(self.at + interval, config) <= 1), intervals[-1])

    def is_due(self, step: int) -> bool:
        """Return True if windows in use are to be probed at a step."""
        return step >= self.at + self.interval

    def share(self, step: int, config: TrainConfig) -> float:
        """Return the share of the tolerated bias that is expected at a step, by the typical bias or the latest, if that is larger."""
        if not self.bias or not self.latest:
            return 0.0
        tolerated = tolerated_bias(Probe(bias=self.bias, noise=self.noise), config, step)
        return max(self.bias, self.latest) * self._grown(step) / tolerated if tolerated else math.inf

    def _grown(self, step: int) -> float:
        """Return by what factor the bias should have grown since the last probe."""
        return math.exp(min(self.growth * (step - self.at), 100.0))

    def aim(self, config: TrainConfig) -> float:
        """Return the share of the tolerated bias that windows are to have when they are fitted: the less, the faster it grows."""
        return max(LEAST_AIM, AIMED_SHARE * math.exp(-self.growth * config.adaptive.probe_every / 4))


def _mean(before: float | None, now: float | None) -> float | None:
    """Return the geometric mean; the newer number if one of them is None, 0 or not finite."""
    if not before or not now or not math.isfinite(before * now):
        return now
    return math.sqrt(before * now)
