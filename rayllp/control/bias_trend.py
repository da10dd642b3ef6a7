"""What probes say together about a rolling window: its typical bias, how fast that grows, and so when the next probe is due.

A probe sees one batch, and two probes of the same solve may differ by half. It decides alone whether steps are trained (`judgement.py`),
but how the tolerance is to change, and when to look again, follows from all probes, the latest of which counts most.
"""

import math
from dataclasses import dataclass, replace

from rayllp.config import TrainConfig
from rayllp.control.judgement import tolerated_bias
from rayllp.control.records import Probe

FACTORS = (1.5, 1.0, 0.5, 0.25)
"""From one probe to the next, the interval changes by one of these. It is not doubled: a bias that was small for long may grow tenfold in
less than half of the steps done, and training by it meanwhile leaves a network that is harder to solve.
"""
LEAST_INTERVAL = 10
"""Smallest number of steps between two probes; the largest is `adaptive.probe_every`."""
UNUSED_INTERVAL = LEAST_INTERVAL // 2
"""The interval from which the first one follows, while a solve has not been in use."""
AIMED_SHARE, LEAST_AIM = 0.5, 0.3
"""The tolerance is to cause the first share of the tolerated bias a quarter of `adaptive.probe_every` steps on, but at once no less than
the second.
"""
MOST_GROWTH = 30.0
"""A bias is not expected to grow by more than this factor from one probe to the next."""
CHANCE = 1.5
"""Two probes of the same solve may differ by this factor though nothing has changed."""


@dataclass
class BiasTrend:
    """The part of the controller's state that concerns the bias of a rolling window.

    Attributes:
        bias, noise: typical ones, as probes have found them; None if none has.
        latest: bias that the latest probe has found. This and the typical bias are those to be expected of the tolerance in use.
        growth: how fast the bias grows: the change of its logarithm in a step, as far as it is not chance.
        count: number of probes.
        at: step of the last one.
        interval: number of steps from there to the next, while the window is in use.
    """

    bias: float | None = None
    noise: float | None = None
    latest: float | None = None
    growth: float = 0.0
    count: int = 0
    at: int = 0
    interval: int = UNUSED_INTERVAL

    def forget(self) -> None:
        """Forget how large the bias is, since the tolerance was wrong. How fast the bias grows is remembered."""
        self.bias = self.noise = self.latest = None

    def expect(self, factor: float) -> None:
        """Expect the bias to change by this factor, with the tolerance."""
        self.bias, self.latest = (value and value * factor for value in (self.bias, self.latest))

    def begin_anew(self) -> None:
        """Forget all, since the window has not been in use for a while."""
        self.forget()
        self.growth, self.interval = 0.0, UNUSED_INTERVAL

    def take(self, step: int, probe: Probe, *, in_use: bool) -> Probe:
        """Take in what a probe has found. Returns it with the typical bias and noise in place of its own.

        Args:
            step: the probe's step.
            probe: what it has found.
            in_use: whether the window has been in use since the last probe.
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
        """Choose the step of the next probe: after the longest interval at whose end the solve should still be accurate.

        Args:
            config: says which bias is tolerated, and bounds the intervals.
            in_use: whether the window has been in use since the last probe. If not, how its bias grows is not known yet.
        """
        most = max(LEAST_INTERVAL, config.adaptive.probe_every)
        factors = FACTORS if in_use else FACTORS[1:]
        intervals = [min(max(round(factor * self.interval), LEAST_INTERVAL), most) for factor in factors]
        self.interval = next((interval for interval in intervals if self.share(self.at + interval, config) <= 1), intervals[-1])

    def is_due(self, step: int) -> bool:
        """Return True if a window in use is to be probed at a step."""
        return step >= self.at + self.interval

    def share(self, step: int, config: TrainConfig) -> float:
        """Return the share of the tolerated bias that is expected at a step, by the typical bias or the latest, if that is larger."""
        if not self.bias or not self.latest:
            return 0.0
        tolerated = tolerated_bias(Probe(bias=self.bias, noise=self.noise), config, step)
        return max(self.bias, self.latest) * self._grown(step) / tolerated if tolerated else math.inf

    def _grown(self, step: int) -> float:
        """Return by what factor the bias should have grown since the last probe."""
        return min(math.exp(min(self.growth * (step - self.at), 100.0)), MOST_GROWTH)

    def aim(self, config: TrainConfig) -> float:
        """Return the share of the tolerated bias that the tolerance is to cause: the less, the faster the bias grows."""
        return max(LEAST_AIM, AIMED_SHARE * math.exp(-self.growth * config.adaptive.probe_every / 4))


def _mean(before: float | None, now: float | None) -> float | None:
    """Return the geometric mean; the newer number if one of them is None, 0 or not finite."""
    if not before or not now or not math.isfinite(before * now):
        return now
    return math.sqrt(before * now)
