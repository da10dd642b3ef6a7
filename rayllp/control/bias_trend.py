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
AIMED_SHARE, MOST_AIMED_SHARE = 0.5, 0.8
"""The tolerance is chosen to cause a share of the tolerated bias between these, a quarter of `adaptive.probe_every` steps on. The share is
the larger, the less probes of the same solve have differed.
"""
HURRIED_SHARE = 0.85
"""That share where steps by the window are otherwise no faster than exact ones."""
LEAST_AIM = 0.3
"""Where the bias grows fast, the tolerance may cause less than those shares now, but not less than this one."""
DEVIATIONS = math.sqrt(3)
"""The bias aimed at lies below the tolerated one by so many standard deviations of log(a probe's bias / the preceding one's)."""
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
        sweeps: sweeps forward and backward that the last one has seen; by the tolerance that it has judged.
        deviations: sum of squares of log(bias / bias expected from the preceding probe).
        compared: number of biases in that sum.
        hurried: whether `HURRIED_SHARE` applies, since steps were too slow.
    """

    bias: float | None = None
    noise: float | None = None
    latest: float | None = None
    growth: float = 0.0
    count: int = 0
    at: int = 0
    interval: int = UNUSED_INTERVAL
    sweeps: tuple[int, int] | None = None
    deviations: float = 0.0
    compared: int = 0
    hurried: bool = False

    def forget(self) -> None:
        """Forget how large the bias is, since the tolerance was wrong. How fast the bias grows is remembered."""
        self.bias = self.noise = self.latest = None

    def expect(self, factor: float) -> None:
        """Expect the bias to change by this factor, with the tolerance."""
        self.bias, self.latest = (value and value * factor for value in (self.bias, self.latest))

    def begin_anew(self) -> None:
        """Forget all, since the window has not been in use for a while."""
        self.forget()
        self.growth, self.interval, self.deviations, self.compared, self.hurried = 0.0, UNUSED_INTERVAL, 0.0, 0, False

    def take(self, step: int, probe: Probe, *, in_use: bool) -> Probe:
        """Take in what a probe has found. Returns it with the typical bias and noise in place of its own.

        Args:
            step: the probe's step.
            probe: what it has found.
            in_use: whether the window has been in use since the last probe.
        """
        self.sweeps = probe.sweeps
        if probe.bias is None:
            return probe
        if in_use and self.latest and 0 < self.latest < math.inf and 0 < probe.bias < math.inf and step > self.at:
            change = math.log(probe.bias / self.latest)
            self.growth = max((change - math.log(CHANCE)) / (step - self.at), self.growth / 2)
            self.deviations, self.compared = self.deviations + change**2, self.compared + 1
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
        factors = FACTORS if in_use else FACTORS[1:]
        intervals = [_scaled(self.interval, factor, config) for factor in factors]
        self.interval = next((interval for interval in intervals if self.share(self.at + interval, config) <= 1), intervals[-1])

    def is_due(self, step: int) -> bool:
        """Return True if a window in use is to be probed at a step."""
        return step >= self.at + self.interval

    def probes_until(self, end: int, config: TrainConfig) -> int:
        """Return how many probes there will be until step `end`, if the bias stays as it is."""
        count, at, interval = 0, self.at + self.interval, self.interval
        while at < end:
            count, interval = count + 1, _scaled(interval, FACTORS[0], config)
            at += interval
        return count

    def probing_share(self, step: int, config: TrainConfig) -> float:
        """Return the share of the steps from here on that will be probes, until the run's end or its switch to exact steps."""
        last = config.steps - 1  # is never a probe
        end = last if config.switch_step is None else min(config.switch_step, last)
        return self.probes_until(end, config) / max(end - step, 1)

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
        """Return the share of the tolerated bias that the tolerance is to cause.

        It is the smaller, the faster the bias grows, and the more probes of the same solve differ.
        """
        spread = math.sqrt((self.deviations + math.log(CHANCE) ** 2) / (self.compared + 1))
        steady = min(max(math.exp(-DEVIATIONS * spread), AIMED_SHARE), MOST_AIMED_SHARE)
        share = HURRIED_SHARE if self.hurried else steady
        return max(LEAST_AIM, share * math.exp(-self.growth * config.adaptive.probe_every / 4))


def _scaled(interval: int, factor: float, config: TrainConfig) -> int:
    """Return an interval between two probes times a factor, within the bounds of such intervals."""
    return min(max(round(factor * interval), LEAST_INTERVAL), max(LEAST_INTERVAL, config.adaptive.probe_every))


def _mean(before: float | None, now: float | None) -> float | None:
    """Return the geometric mean; the newer number if one of them is None, 0 or not finite."""
    if not before or not now or not math.isfinite(before * now):
        return now
    return math.sqrt(before * now)
