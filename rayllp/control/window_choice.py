"""Which windows a run is solved by: fitted to what probes measure, replaced by cheaper ones that would do, given up if none is accurate.

Windows begin as long as they may be, with one sweep each way. After a fault the next step judges them again, and measures couplings, by
which others are fitted (`rayllp/mgrit/fitting.py`) so that the bias should be a certain share of what is tolerated. The bias that the same
probe has found for the windows in use tells how far estimated errors are off. If fitted windows turn out to be inaccurate, others are
fitted to half the error.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from rayllp.config import TrainConfig
from rayllp.control.judgement import is_hopeless, tolerated_bias
from rayllp.control.records import Probe
from rayllp.mgrit.couplings import Couplings
from rayllp.mgrit.fitting import WindowErrors, exact_step_cost, step_cost
from rayllp.mgrit.windows import Windows

WORTHWHILE_RATIO = 0.9
"""Windows that are accurate enough are replaced if others take at most so much of their time, and exact steps are left if windows do."""
MAX_REFITS = 4
"""So many times in a row windows are fitted after a fault, each time to half the error. After that, steps are exact."""


@dataclass
class WindowState:
    """What a choice of windows remembers from step to step.

    Attributes:
        windows: those in use, or to be probed; None: all are as long as they may be, and take one sweep each way.
        before: those to return to if the cheaper ones are not accurate.
        refits: number of times in a row that windows were fitted after a fault.
        waits: number of good probes before cheaper windows are tried again.
        calm: number of probes in a row by which windows would do in place of exact steps.
        couplings: by which windows were fitted that no probe has judged yet.
        asks: whether the next probe is to measure couplings, since something is wrong.
    """

    windows: Windows | None = None
    before: Windows | None = None
    refits: int = 0
    waits: int = 0
    calm: int = 0
    couplings: Couplings | None = None
    asks: bool = False


@dataclass(frozen=True)
class Move:
    """A change of windows, or a wish to measure what a change takes.

    Attributes:
        reason: why, in words.
        changed: whether the windows are others now.
        verified: whether a probe has found these windows accurate. If not, the next step is to be a probe.
    """

    reason: str
    changed: bool = True
    verified: bool = False


class WindowChoice:
    """Chooses the windows of a run.

    Attributes:
        state: what is kept in checkpoints.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.state = config, WindowState()
        self._full = Windows.alike(config.window_lengths)

    @property
    def chosen(self) -> Windows:
        """The windows in use, or to be probed."""
        return self.state.windows or self._full

    # What probes are to measure ---------------------------------------------------------------------------------------------------

    def wants_couplings(self, expected: float, aim: float) -> bool:
        """Return True if a probe is to measure couplings, which takes as long as an exact step: after a fault, or if less time may do.

        Args:
            expected: the share of the tolerated bias that it is expected to find.
            aim: the share that windows are fitted to have.
        """
        state = self.state
        return state.asks or (state.windows is not None and not state.waits and expected < aim)

    # Changes ------------------------------------------------------------------------------------------------------------------------

    def mend(self, step: int, probe: Probe, fault: str, aim: float, *, in_use: bool) -> Move | None:
        """Return to the windows before if cheaper ones were tried. Else fit others; None if exact steps would take no longer.

        Windows in use are judged once more before, since a bias differs from batch to batch.

        Args:
            step, fault: the probe's step, and what is wrong in words.
            probe: what it has found, with the typical bias and noise of these windows.
            aim: the share of the tolerated bias that others are to have.
            in_use: whether the windows have been in use until now.
        """
        state = self.state
        if state.before is not None:
            state.windows, state.before, state.couplings, state.waits = state.before, None, None, self.config.adaptive.patience
            return Move(f"{fault}; back to {self._in_words}", verified=True)
        if is_hopeless(probe, self.config):
            return None
        if in_use or (probe.couplings is None and state.couplings is None and not state.asks):
            state.asks = True
            return Move(f"{fault}; the next step measures where layers depend strongly on each other", changed=False)
        fitted = None if state.refits == MAX_REFITS else self._fit(step, probe, aim)
        if fitted is None or self._share_of_exact(fitted) > WORTHWHILE_RATIO:
            return None
        state.refits += 1
        return self._try(fitted, probe, fault)

    def accept(self) -> None:
        """Note that a probe has found the windows accurate."""
        self.state.refits, self.state.before, self.state.couplings, self.state.asks = 0, None, None, False

    def give_up(self) -> None:
        """Note that steps are exact from now on."""
        self.state.refits, self.state.couplings, self.state.asks = 0, None, False

    def begin_anew(self) -> None:
        """Begin as at the start of a run, and measure couplings at once."""
        self.state = WindowState(asks=True)

    def cheapen(self, step: int, probe: Probe, aim: float) -> Move | None:
        """Fit windows to what layers depend on each other now, if that pays."""
        state, before = self.state, self.state.windows
        if before is None:
            return None
        if state.waits:
            state.waits -= 1
            return None
        fitted = self._fit(step, probe, aim)
        if fitted is None or self._share_of_exact(fitted) > WORTHWHILE_RATIO * self._share_of_exact(before):
            return None
        move = self._try(fitted, probe, "less time would do")
        state.before = before
        return move

    def replace_exact_steps(self, step: int, probe: Probe, aim: float) -> Move | None:
        """Leave exact steps again, after `patience` probes in a row by which windows would be accurate and faster."""
        state, fitted, patience = self.state, self._fit(step, probe, aim), self.config.adaptive.patience
        pays = fitted is not None and self._share_of_exact(fitted) <= WORTHWHILE_RATIO
        state.calm = state.calm + 1 if pays else 0
        if fitted is None or state.calm < patience:
            return None
        state.calm = 0
        return self._try(fitted, probe, f"{patience} probes say that windows would do")

    def _try(self, fitted: Windows, probe: Probe, reason: str) -> Move:
        """Choose these windows, to be used once a probe has found them accurate."""
        state = self.state
        state.windows, state.couplings, state.asks, state.before = fitted, probe.couplings or state.couplings, False, None
        return Move(f"{reason}; {self._in_words}")

    @property
    def _in_words(self) -> str:
        return f"windows of {self.chosen} layers"

    # Fitting ------------------------------------------------------------------------------------------------------------------------

    def _fit(self, step: int, probe: Probe, aim: float) -> Windows | None:
        """Return the fastest windows found whose bias should have the share `aim` of the tolerated one, or half as much after each refit.

        Returns: None if no windows would be accurate, or if the probe did not measure what that takes.
        """
        couplings, bias = probe.couplings or self.state.couplings, probe.bias
        if couplings is None or bias is None or is_hopeless(probe, self.config):
            return None
        buffers = self.config.buffers
        errors = WindowErrors(couplings, self.config.longest_window, (buffers.open, buffers.close))
        limit = aim * tolerated_bias(probe, self.config, step) * 0.5**self.state.refits
        estimated = errors.of(self.chosen)  # right in proportion only; the bias that was measured for the same windows gives the scale
        return errors.fit(limit * estimated / bias if 0 < bias < math.inf and 0 < estimated < math.inf else limit)

    def _share_of_exact(self, windows: Windows) -> float:
        """Return the time of a step by these windows over that of an exact step. It serves to choose before steps by them can be timed.

        It is that on as many workers as the longest window has layers, whatever their number is now, so that decisions do not depend on it.
        """
        workers = self.config.longest_window
        return step_cost(windows, workers) / exact_step_cost(len(self.config.solved_layers), workers)

    # Checkpoints --------------------------------------------------------------------------------------------------------------------

    def restore(self, kept: dict[str, Any]) -> None:
        """Continue from a checkpoint's `WindowState`, as a dict of its fields; those of earlier versions had others."""
        windows, before = (self._restored_windows(kept.get(name)) for name in ("windows", "before"))
        dropped = kept.get("windows") is not None and windows is None
        if dropped or not self.config.fits_windows:
            return
        known = {field.name: kept[field.name] for field in fields(WindowState) if field.name in kept}
        couplings = known.get("couplings")
        found = {"windows": windows, "before": before, "couplings": None if couplings is None else Couplings.restored(couplings)}
        self.state = WindowState(**{**known, **found})

    def _restored_windows(self, kept: dict[str, Any] | None) -> Windows | None:
        """Return the windows of a checkpoint; None if it has none, or if layers or workers are others now."""
        if kept is None or sum(kept["lengths"]) != len(self.config.solved_layers) or max(kept["lengths"]) > self.config.longest_window:
            return None
        return Windows(tuple(kept["lengths"]), tuple((forward, backward) for forward, backward in kept["sweeps"]))
