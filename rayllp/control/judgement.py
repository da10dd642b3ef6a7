"""What the controller makes of a probe, by the rule that is set (`adaptive.rule`)."""

import math

from rayllp.config import TrainConfig
from rayllp.control.records import Probe

HOPELESS = 2.0
"""If ρ is above this many thresholds, more iterations only diverge further, so the rungs in between are skipped."""
TOLERATED_SHARE, TOLERATED_SHARE_OF_WINDOWS, TOLERATED_SHARE_OF_ROLLING = 0.4, 0.6, 0.3
"""Shares of the gradient's noise below which bias is tolerated: by MGRIT, by windows of fixed lengths, by a rolling one. Fixed windows are
granted more, as one sweep in both directions gives the exact gradient of a slightly different network, and training by it is stable. A
rolling one is granted less, as accuracy costs it little: at Δt = 1, twice the bias saves a twentieth of the time.
"""


def tolerated_share(config: TrainConfig, step: int) -> float:
    """Return the share of the gradient's noise below which bias is tolerated at a step.

    Towards the end it is smaller: a small learning rate averages the noise out, and the bias stays.
    """
    share = config.adaptive.bias_to_noise
    if share is None:
        fixed = TOLERATED_SHARE_OF_WINDOWS if config.solver == "windows" else TOLERATED_SHARE
        share = TOLERATED_SHARE_OF_ROLLING if config.rolls else fixed
    return min(share, config.adaptive.late_bias_to_noise) if step >= config.late_step else share


def tolerated_bias(probe: Probe, config: TrainConfig, step: int) -> float:
    """Return the largest bias of the gradient that is no fault."""
    limit = config.adaptive.bias_limit
    return limit if probe.noise is None or math.isnan(probe.noise) else max(limit, tolerated_share(config, step) * probe.noise)


def fault_in(probe: Probe, config: TrainConfig, step: int) -> str | None:
    """Return what is wrong with the solve that a probe has judged, in words; None if nothing is."""
    settings = config.adaptive
    if settings.rule in ("convergence", "both"):
        for name, rho in (("forward", probe.rho_forward), ("backward", probe.rho_backward)):
            if rho is not None and not rho <= settings.threshold:  # NaN counts as too large
                return f"{name} convergence factor {_shown(rho)} passed adaptive.threshold {settings.threshold:g}"
    if settings.rule == "convergence" or probe.bias is None:
        return None
    noise, share = probe.noise, tolerated_share(config, step)
    if not probe.bias <= settings.bias_limit and (noise is None or not probe.bias <= share * noise):
        beside = "" if noise is None else f", {_shown(probe.bias / noise if noise else math.inf)} of its noise (tolerated: {share:g})"
        return f"gradient bias {_shown(probe.bias)} passed adaptive.bias_limit {settings.bias_limit:g}{beside}"
    return None


def is_hopeless(probe: Probe, config: TrainConfig) -> bool:
    """Return True if the probe is so bad that no rung of the ladder would be accurate."""
    rule = config.adaptive.rule
    if rule != "convergence" and probe.bias is not None and not math.isfinite(probe.bias):
        return True
    if rule == "bias":
        return False
    found = [rho for rho in (probe.rho_forward, probe.rho_backward) if rho is not None]
    return any(not rho <= HOPELESS * config.adaptive.threshold for rho in found)


def found_accurate(probe: Probe) -> str:
    """Return the reason for using a rung that a probe has found accurate, in words."""
    if probe.bias is None:
        return "a probe has found nothing against it"
    beside = "" if probe.noise is None else f" beside a noise of {_shown(probe.noise)}"
    return f"a probe has found a gradient bias of {_shown(probe.bias)}{beside}"


def _shown(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"
