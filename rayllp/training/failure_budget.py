"""How many failures a run survives, and how often workers keep copies of their states in memory."""

import math
from collections import deque
from collections.abc import Sequence

from rayllp.config import TrainConfig
from rayllp.errors import ClusterError

HOUR_S = 3600.0
MOST_FAILURES_AT_ONE_STEP = 3
"""After this many failures at one step, with no step done between them, the step itself is taken to be the cause."""
BASE_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""After the n-th failure in a row the wait is BASE_WAIT_S · 2ⁿ seconds, and at most LONGEST_WAIT_S. After a first failure there is none."""
MOST_COPY_SHARE = 0.03
"""Largest share of the training time that keeping states in memory may take."""
LONGEST_COPY_INTERVAL = 100
"""Largest number of steps between kept states."""


class FailureBudget:
    """Counts failures, and says how long to wait after each.

    Args:
        most: failures allowed within one hour.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._times: deque[float] = deque()
        self._step, self._at_step = -1, 0

    def spend(self, step: int, now_s: float, what: str) -> float:
        """Count a failure that happened while `step` was the next one to do. Returns the seconds to wait before trying again.

        Args:
            now_s: the time, by a monotonic clock.
            what: describes the failure in an error message.

        Raises:
            ClusterError: there were too many failures within an hour, or at this step.
        """
        self._count(now_s, what)
        self._at_step = self._at_step + 1 if step == self._step else 1
        self._step = step
        if self._at_step >= MOST_FAILURES_AT_ONE_STEP:
            raise ClusterError(
                f"{what}; that is failure {self._at_step} at step {step} with no step done between: look at that step's batch, and at the "
                "memory of the workers' nodes"
            )
        return 0.0 if self._at_step == 1 else min(LONGEST_WAIT_S, BASE_WAIT_S * 2**self._at_step)

    def spend_again(self, attempt: int, now_s: float, what: str) -> float:
        """Count another failure during recovery, whose `attempt`-th attempt has failed. Returns the seconds to wait.

        It is not counted against the step: a node that goes down takes its workers with it one by one.

        Raises:
            ClusterError: there were too many failures within an hour.
        """
        self._count(now_s, what)
        return min(LONGEST_WAIT_S, BASE_WAIT_S * 2.0**attempt)

    def _count(self, now_s: float, what: str) -> None:
        while self._times and self._times[0] <= now_s - HOUR_S:
            self._times.popleft()
        self._times.append(now_s)
        if len(self._times) > self.most:
            raise ClusterError(
                f"{what}; that is failure {len(self._times)} within an hour, and max_failures is {self.most}: see events.jsonl"
            )


class CopyInterval:
    """How often workers keep a state in memory: as the settings say, or chosen by its measured cost.

    Args:
        elastic: True if workers can outlive the loss of another one; without that, a copy is of no use.

    Attributes:
        every: steps between kept states; 0 keeps none.
        is_undecided: True until the interval has been chosen by its cost.
    """

    def __init__(self, config: TrainConfig, *, elastic: bool = True) -> None:
        if config.world == 1 or not elastic:  # no other worker would be left to hold the copy
            self.every, self.is_undecided = 0, False
        else:
            wanted = config.snapshot_every
            self.every, self.is_undecided = (1, True) if wanted is None else (wanted, False)

    def choose(self, step_s: float, costs: Sequence[tuple[float, float]], *, on_cpu: bool) -> None:
        """Choose the interval.

        Args:
            step_s: seconds of a training step.
            costs: for each worker, the seconds to take a state and those to exchange it with another worker.
            on_cpu: True if workers compute on CPUs.
        """
        take_s, exchange_s = (max(cost[part] for cost in costs) for part in (0, 1))
        self.every, self.is_undecided = choose_interval(step_s, take_s, exchange_s, on_cpu=on_cpu), False


def choose_interval(step_s: float, take_s: float, exchange_s: float, *, on_cpu: bool) -> int:
    """Return the number of steps between states kept in memory that limits their cost to the share `MOST_COPY_SHARE` of the training time.

    Args:
        step_s: seconds of a training step.
        take_s: seconds to take a state; training waits for that.
        exchange_s: seconds to send it to another worker in the background. On a CPU that slows training down and counts as cost; on a GPU
            it must only be finished before the next one begins.
        on_cpu: True if workers compute on CPUs.
    """
    cost = take_s + (exchange_s if on_cpu else 0.0)
    return max(1, min(LONGEST_COPY_INTERVAL, max(math.ceil(cost / (MOST_COPY_SHARE * step_s)), math.ceil(exchange_s / step_s))))
