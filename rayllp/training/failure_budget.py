"""How many faults a run takes, and how often it keeps states in memory. Pure."""

import math
from collections import deque
from collections.abc import Sequence

from rayllp.config import TrainConfig
from rayllp.errors import ClusterError

HOUR_S = 3600.0
SAME_STEP = 3
"""Faults at one step, with none done between, after which it is the step that is at fault."""
BACK_OFF_S, LONGEST_S = 0.5, 30.0
COST = 0.03
"""Share of a step's time that keeping states may take."""
RAREST = 100


class FailureBudget:
    """Counts faults.

    Args:
        most: faults in an hour.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._times: deque[float] = deque()
        self._step, self._at_step = -1, 0

    def spend(self, step: int, now_s: float, what: str) -> float:
        """One fault, while `step` was the next step to do; seconds to wait before trying again.

        Raises:
            ClusterError: too many in an hour, or at this step.
        """
        self._count(now_s, what)
        self._at_step = self._at_step + 1 if step == self._step else 1
        self._step = step
        if self._at_step >= SAME_STEP:
            raise ClusterError(
                f"{what}; that is fault {self._at_step} at step {step} with no step done between: look at that step's batch, and at the "
                "memory of the workers' nodes"
            )
        return 0.0 if self._at_step == 1 else min(LONGEST_S, BACK_OFF_S * 2**self._at_step)

    def spend_again(self, attempt: int, now_s: float, what: str) -> float:
        """One fault more, while recovery from one is under way for the `attempt`-th time; seconds to wait.

        No step is at fault then: a node that goes down takes its workers one by one.

        Raises:
            ClusterError: too many in an hour.
        """
        self._count(now_s, what)
        return min(LONGEST_S, BACK_OFF_S * 2.0**attempt)

    def _count(self, now_s: float, what: str) -> None:
        while self._times and self._times[0] <= now_s - HOUR_S:
            self._times.popleft()
        self._times.append(now_s)
        if len(self._times) > self.most:
            raise ClusterError(
                f"{what}; that is fault {len(self._times)} within an hour, and max_failures is {self.most}: see events.jsonl"
            )


class CopyInterval:
    """How often states are kept in memory: as the settings say, or by what that costs, once it is known.

    Attributes:
        every: steps between states; 0: never.
        is_open: whether it is yet to be chosen.

    Args:
        there: whether any worker outlives another's loss.
    """

    def __init__(self, config: TrainConfig, *, there: bool = True) -> None:
        if config.world == 1 or not there:  # who would hold it when the worker is gone?
            self.every, self.is_open = 0, False
        else:
            wanted = config.snapshot_every
            self.every, self.is_open = (1, True) if wanted is None else (wanted, False)

    def choose(self, step_s: float, costs: Sequence[tuple[float, float]], *, on_cpu: bool) -> None:
        """By a step's seconds, and each worker's for taking a state and for its way to the next one."""
        take_s, exchange_s = (max(cost[part] for cost in costs) for part in (0, 1))
        self.every, self.is_open = choose_interval(step_s, take_s, exchange_s, on_cpu=on_cpu), False


def choose_interval(step_s: float, take_s: float, exchange_s: float, *, on_cpu: bool) -> int:
    """Steps between states kept in memory, so that they take at most `COST` of the time.

    Args:
        step_s: of a training step.
        take_s: of taking a state, while training waits.
        exchange_s: of its way to the next worker, in the background: on a CPU it takes from training too, on a GPU it must end in time.
    """
    cost = take_s + (exchange_s if on_cpu else 0.0)
    return max(1, min(RAREST, max(math.ceil(cost / (COST * step_s)), math.ceil(exchange_s / step_s))))
