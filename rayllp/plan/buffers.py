"""How many layers to take out of the parallel solve at each end: buffer layers, from Lipschitz estimates (arXiv:2601.09026, appendix B).

The paper sees the constants of the first and the last layers rise in training while the middle's stay flat, and takes those layers out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median

from rayllp.config import TrainConfig, make_config
from rayllp.errors import SettingsError

FACTOR = 2.0
"""A layer stands clear beyond so many medians: sequences of one batch differ by less, steep layers by more."""
CALM = 0.5
"""c_f·Δt·σ of a middle that few iterations solve well; beside a steeper one a buffer looks flat whatever it is."""
LAST = 3
"""Estimates that count: each is of one sequence, and their median sees past an odd one."""


@dataclass(frozen=True, kw_only=True)
class BufferSuggestion:
    """Layers to take out at each end.

    Attributes:
        open, middle, close: numbers of layers.
        constants: of each layer, the median of the last estimates.
        bar: what a layer's constant must pass to stand clear.
        clear: leading and trailing layers that do, before anything was changed to suit the run and the coarsening.
        reasons: in words, the first ones first.
    """

    open: int
    middle: int
    close: int
    constants: tuple[float, ...]
    bar: float
    clear: tuple[int, int]
    reasons: tuple[str, ...]


def suggest_buffers(estimates: Sequence[Sequence[float]], config: TrainConfig, *, factor: float = FACTOR) -> BufferSuggestion:
    """Buffers for a run like `config`.

    The rule: a layer's constant is the median of its last `LAST` estimates; the bar is `factor` times the median constant of the layers
    between the first and the last quarter; layers beyond the bar, from each end up to the first that is not, are buffers. More are taken,
    the steeper of the two next ones each time, until what is left divides by c_f and the settings allow it. Where nothing that the settings
    allow is left so, the run's own buffers stay. A run whose middle is steep itself (c_f·Δt·σ beyond `CALM`) keeps at least its own: which
    layers get steep depends on which are buffers, so such a run's buffers look flat beside its middle.

    Args:
        estimates: one list a probe, in order of the steps; in each, a constant a layer, the whole network in order.
        config: of the run.
        factor: at least 1.

    Raises:
        SettingsError: no estimates, not one constant a layer, a middle that is not finite, or a factor below 1.
    """
    constants = _medians(estimates, config)
    if not factor >= 1:
        raise SettingsError(f"factor {factor:g}: half of the middle lies below its median, so give at least 1")
    layers = len(constants)
    centre = constants[layers // 4 : layers - layers // 4]
    typical = median(centre)
    bar = factor * typical
    if not math.isfinite(bar):
        raise SettingsError("the middle layers' Lipschitz estimates are not finite: the run diverged; lower optimizer.lr")
    steep = [constant > bar for constant in constants]
    clear = _leading(steep), _leading(steep[::-1])
    reasons = [_about_end("first", clear[0], constants, bar), _about_end("last", clear[1], constants[::-1], bar)]
    least, growth = clear, config.first_coarsening * config.middle_step * typical
    if growth > CALM:
        least = max(clear[0], config.buffers.open), max(clear[1], config.buffers.close)
        reasons.append(
            f"the middle is steep itself: c_f·Δt times its median constant is {growth:.2g}, and calm up to {CALM:g}. No buffer is given "
            "back; the constants of a run with more buffers will look different: try 2 + 2 at least, and ask again"
        )
    found = _nearest(least, constants, config)
    if found is None:
        found = config.buffers.open, config.buffers.close
        reasons.append(
            f"taking {least[0]} + {least[1]} of {layers} layers out leaves no middle that mgrit.coarsening={config.mgrit.coarsening} and "
            "the workers can share: the run's own buffers stay. More layers, or adaptive.consistency, help more here"
        )
    elif found != least:
        rest, c, more = layers - sum(least), config.first_coarsening, sum(found) - sum(least)
        why = f"{rest} middle layers do not divide into coarse intervals of {c}" if rest % c else f"the settings refuse a middle of {rest}"
        reasons.append(f"{why}: {more} more {'is' if more == 1 else 'are'} taken out, the steeper of the two next to the middle each time")
    inner = [n for n in range(found[0], layers - found[1]) if steep[n]]
    if inner:
        reasons.append(f"steep layers inside the middle, which buffers do not reach: {', '.join(map(str, inner))}")
    return BufferSuggestion(
        open=found[0], middle=layers - sum(found), close=found[1], constants=constants, bar=bar, clear=clear, reasons=tuple(reasons)
    )


def _medians(estimates: Sequence[Sequence[float]], config: TrainConfig) -> tuple[float, ...]:
    last = estimates[-LAST:]
    if not last:
        raise SettingsError("no Lipschitz estimates: give those of at least one probe (adaptive.lipschitz_every=1)")
    wrong = {len(constants) for constants in last} - {config.model.layers}
    if wrong:
        raise SettingsError(f"estimates of {min(wrong)} layers for model.layers={config.model.layers}: give one a layer, buffers included")
    return tuple(median(each) if all(map(math.isfinite, each)) else math.inf for each in zip(*last, strict=True))


def _leading(steep: Sequence[bool]) -> int:
    return len(list(takewhile(bool, steep)))


def _about_end(end: str, count: int, constants: Sequence[float], bar: float) -> str:
    if count == 0:
        return f"the {end} layer's {constants[0]:.3g} is not beyond the bar of {bar:.3g}"
    which = f"the {end} layer is" if count == 1 else f"the {end} {count} layers are"
    return f"{which} beyond the bar of {bar:.3g} ({', '.join(f'{c:.3g}' for c in constants[:count])})"


def _nearest(least: tuple[int, int], constants: Sequence[float], config: TrainConfig) -> tuple[int, int] | None:
    """The fewest buffers, at least `least`, whose middle divides by c_f and passes the settings' own rules."""
    begin, end = least[0], len(constants) - least[1]
    while begin < end:
        if (end - begin) % config.first_coarsening == 0 and _is_allowed(begin, len(constants) - end, config):
            return begin, len(constants) - end
        if constants[begin] >= constants[end - 1]:
            begin += 1
        else:
            end -= 1
    return None


def _is_allowed(open_: int, close: int, config: TrainConfig) -> bool:
    values = config.model_dump()
    values["buffers"] = {"open": open_, "close": close}
    values["mesh"]["blocks"] = None  # those given by hand are for the run's own middle
    try:
        make_config(values)
    except SettingsError:
        return False
    return True
