"""Whether layer-parallel steps are fast enough: what the controller makes of the seconds that steps take."""

from dataclasses import dataclass

TIMED_STEPS = 5
"""Number of exact steps at the start that are timed. The first is a probe, and the second may be slow."""
MAX_TIME_RATIO = 0.98
"""A layer-parallel step that takes more than this share of an exact step's time is not worth its bias."""
CLEARLY_SLOWER_RATIO = 1.1
"""A rung whose steps take more than this many times as long as exact ones is left at once."""
DOUBT_STEPS = 15
"""A rung that is too slow by less has so many steps to become faster."""
PAUSE_PROBES = 10
"""A ladder that was too slow is tried again after this many regular intervals between probes."""
TAKE_BACK_RATIO = 0.95
"""It is tried again at once if its steps took at most this share of the time that exact steps then turn out to take."""


@dataclass
class Pace:
    """The part of the controller's state that concerns time.

    Attributes:
        timed_from: the step from which exact steps are timed.
        paused_at, pause_ends: the step at which the ladder was left since it was too slow, and the one at which it is tried again; None: it
            is in use.
        slow: name of the rung that was too slow.
        probing: seconds that probes added to each of its steps.
        doubted_from: the step since which the rung has been a little too slow; None if it is not.
    """

    timed_from: int = 0
    paused_at: int = 0
    pause_ends: int | None = None
    slow: str = ""
    probing: float = 0.0
    doubted_from: int | None = None

    def is_timing(self, step: int) -> bool:
        """Return True if the step is exact in order to be timed."""
        return step < self.timed_from + TIMED_STEPS

    def make_up_for_probe(self, step: int) -> None:
        """Time exact steps for one step longer if the step after this one, which was to be timed, is a probe."""
        if self.is_timing(step + 1):
            self.timed_from += 1

    def time_anew(self, step: int) -> None:
        """Time exact steps again from this step on, and try the ladder again, if it was left."""
        self.timed_from = step
        if self.pause_ends is not None:
            self.pause_ends = step

    def is_too_slow(self, step: int, here: float, probing: float, exact: float) -> bool:
        """Return True if steps are to be left for exact ones. Few steps tell little, so a doubt has to last.

        Args:
            step: the step that is about to begin.
            here, exact: seconds of a plain step and of an exact one.
            probing: seconds that probes add to each step.
        """
        if here + probing <= MAX_TIME_RATIO * exact:
            self.doubted_from = None
            return False
        self.doubted_from = step if self.doubted_from is None else self.doubted_from
        return step >= self.doubted_from + DOUBT_STEPS or here > CLEARLY_SLOWER_RATIO * exact

    def pause(self, step: int, slow: str, probing: float, probe_every: int) -> None:
        """Note that the ladder is left, since the rung `slow` was too slow with its probes, and when it is tried again."""
        self.slow, self.probing, self.doubted_from = slow, probing, None
        self.paused_at, self.pause_ends = step, step + PAUSE_PROBES * probe_every

    def ends_pause(self, step: int, exact: float | None, slow: float | None) -> bool:
        """Return True if the ladder is to be tried again: its time has come, or exact steps turn out slower than the rung that was left.

        Args:
            step: the step that is about to begin.
            exact, slow: seconds of an exact step and of one by the rung that was too slow, as timed since; None: not known.
        """
        assert self.pause_ends is not None
        is_faster = exact is not None and slow is not None and slow + self.probing <= TAKE_BACK_RATIO * exact
        if step < self.pause_ends and not (is_faster and step >= self.paused_at + DOUBT_STEPS):
            return False
        self.pause_ends, self.timed_from = None, step
        return True
