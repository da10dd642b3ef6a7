"""Suggest how many layers at each end to take out of the parallel solve as buffer layers (arXiv:2601.09026, appendix B).

The paper observes that the Lipschitz constants of the first and last layers rise in training while those in the middle stay flat, and takes
the former out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median

from rayllp.config import TrainConfig, make_config
from rayllp.errors import SettingsError

FACTOR = 2.0
"""A layer is steep if its constant is this many medians or more. Sequences of one batch differ by less, steep layers by more."""
CALM = 0.5
"""Value of c_f·Δt·σ up to which few iterations solve a middle layer well. If the middle is steeper, buffer layers look flat beside it."""
LAST = 3
"""How many of the last estimates count. Each is from one sequence; their median ignores an outlier."""


@dataclass(frozen=True, kw_only=True)
class BufferSuggestion:
    """Suggested buffer layers at each end.

    Attributes:
        open, middle, close: numbers of layers.
        constants: the median of the last estimates of each layer.
        threshold: the constant beyond which a layer is steep.
        steep_ends: numbers of steep layers at the beginning and at the end, before any adjustment to the run and the coarsening.
        reasons: why, in sentences.
    """

    open: int
    middle: int
    close: int
    constants: tuple[float, ...]
    threshold: float
    steep_ends: tuple[int, int]
    reasons: tuple[str, ...]


def suggest_buffers(estimates: Sequence[Sequence[float]], config: TrainConfig, *, factor: float = FACTOR) -> BufferSuggestion:
    """Suggest buffers for a run like `config`.

    The constant of a layer is the median of its last `LAST` estimates. The threshold is `factor` times the median constant of the middle
    half of the layers. From each end, the layers beyond the threshold, up to the first that is not, become buffers. Further layers are
    added, each time the steeper of the two next ones, until the rest divides by c_f and the settings allow it; if no such number exists,
    the run's own buffers stay. If the middle itself is steep (c_f·Δt·σ above `CALM`), the run keeps at least its own buffers: which layers
    become steep depends on which are buffers, so these look flat beside such a middle.

    Args:
        estimates: one list per probe, in order of steps; each has one constant per layer of the whole network.
        config: the run's settings.
        factor: at least 1.

    Raises:
        SettingsError: there are no estimates, or not one per layer; the middle's are not finite; or factor is below 1.
    """
    constants = _medians(estimates, config)
    if not factor >= 1:
        raise SettingsError(f"factor {factor:g}: half of the middle lies below its median, so give at least 1")
    layers = len(constants)
    centre = constants[layers // 4 : layers - layers // 4]
    typical = median(centre)
    threshold = factor * typical
    if not math.isfinite(threshold):
        raise SettingsError("the middle layers' Lipschitz estimates are not finite: the run diverged; lower optimizer.lr")
    steep = [constant > threshold for constant in constants]
    steep_ends = _leading(steep), _leading(steep[::-1])
    reasons = [_about_end("first", steep_ends[0], constants, threshold), _about_end("last", steep_ends[1], constants[::-1], threshold)]
    least, growth = steep_ends, config.fine_coarsening * config.middle_step * typical
    if growth > CALM:
        least = max(steep_ends[0], config.buffers.open), max(steep_ends[1], config.buffers.close)
        reasons.append(
            f"the middle is steep itself: c_f·Δt times its median constant is {growth:.2g}, and calm up to {CALM:g}. No buffer is given "
            "back; the constants of a run with more buffers will look different: try 2 + 2 at least, and ask again"
        )
    buffers = _nearest(least, constants, config)
    if buffers is None:
        buffers = config.buffers.open, config.buffers.close
        reasons.append(
            f"taking {least[0]} + {least[1]} of {layers} layers out leaves no middle that mgrit.coarsening={config.mgrit.coarsening} and "
            "the workers can share: the run's own buffers stay. More layers, or adaptive.consistency, help more here"
        )
    elif buffers != least:
        rest, c, more = layers - sum(least), config.fine_coarsening, sum(buffers) - sum(least)
        why = f"{rest} middle layers do not divide into coarse intervals of {c}" if rest % c else f"the settings refuse a middle of {rest}"
        reasons.append(f"{why}: {more} more {'is' if more == 1 else 'are'} taken out, the steeper of the two next to the middle each time")
    inner = [n for n in range(buffers[0], layers - buffers[1]) if steep[n]]
    if inner:
        reasons.append(f"steep layers inside the middle, which buffers do not reach: {', '.join(map(str, inner))}")
    return BufferSuggestion(
        open=buffers[0],
        middle=layers - sum(buffers),
        close=buffers[1],
        constants=constants,
        threshold=threshold,
        steep_ends=steep_ends,
        reasons=tuple(reasons),
    )


def _medians(estimates: Sequence[Sequence[float]], config: TrainConfig) -> tuple[float, ...]:
    """Return the median of each layer's last estimates; infinite if any of them is not finite."""
    last = estimates[-LAST:]
    if not last:
        raise SettingsError("no Lipschitz estimates: give those of at least one probe (adaptive.lipschitz_every=1)")
    wrong = {len(constants) for constants in last} - {config.model.layers}
    if wrong:
        raise SettingsError(f"estimates of {min(wrong)} layers for model.layers={config.model.layers}: give one a layer, buffers included")
    return tuple(median(each) if all(map(math.isfinite, each)) else math.inf for each in zip(*last, strict=True))


def _leading(steep: Sequence[bool]) -> int:
    return len(list(takewhile(bool, steep)))


def _about_end(end: str, count: int, constants: Sequence[float], threshold: float) -> str:
    if count == 0:
        return f"the {end} layer's {constants[0]:.3g} is not beyond the bar of {threshold:.3g}"
    which = f"the {end} layer is" if count == 1 else f"the {end} {count} layers are"
    return f"{which} beyond the bar of {threshold:.3g} ({', '.join(f'{c:.3g}' for c in constants[:count])})"


def _nearest(least: tuple[int, int], constants: Sequence[float], config: TrainConfig) -> tuple[int, int] | None:
    """Return the fewest buffers, at least `least`, whose middle divides by c_f and passes the settings' rules; None if there are none."""
    begin, end = least[0], len(constants) - least[1]
    while begin < end:
        if (end - begin) % config.fine_coarsening == 0 and _is_allowed(begin, len(constants) - end, config):
            return begin, len(constants) - end
        if constants[begin] >= constants[end - 1]:
            begin += 1
        else:
            end -= 1
    return None


def _is_allowed(open_: int, close: int, config: TrainConfig) -> bool:
    values = config.model_dump()
    values["buffers"] = {"open": open_, "close": close}
    values["mesh"]["blocks"] = None  # blocks that the user has set fit only the run's own middle
    try:
        make_config(values)
    except SettingsError:
        return False
    return True
