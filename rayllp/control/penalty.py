"""The weight of the consistency penalty: what probes make of it."""

from rayllp.config import TrainConfig
from rayllp.control.records import Probe

UP, DOWN = 4.0, 2.0
"""Factors by which a probe changes the weight. Raising is faster than lowering, since a bias that is already there costs more than a weight
that is too large.
"""
LEAST, MOST = 0.5, 5.66
"""Bounds of the weight, as multiples of the one that was set. A larger weight would cost more than the next rung does."""


def steered(weight: float, probe: Probe, config: TrainConfig) -> float:
    """Return the weight moved towards the smallest one that keeps the bias at its target."""
    target, initial = config.adaptive.bias_target, config.consistency
    if not config.steers or probe.bias is None:
        return weight
    if not probe.bias <= target:  # NaN counts as too large
        return min(initial * MOST, weight * UP)
    return max(initial * LEAST, weight / DOWN) if probe.bias < target / 4 else weight
