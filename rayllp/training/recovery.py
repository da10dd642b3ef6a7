"""Recovery from lost workers: replace them, or go on with fewer, and take all workers back to a step whose state can be restored."""

import time
from functools import partial
from itertools import count

from rayllp.config import TrainConfig
from rayllp.errors import ChannelError, RayllpError, WorkerLostError
from rayllp.training.failure_budget import FailureBudget
from rayllp.training.resizing import Resizing
from rayllp.training.run_state import RunState
from rayllp.training.worker_group import ElasticGroup

FAULTS = (WorkerLostError, ChannelError)
"""Errors that a run can recover from."""
WARM_STEPS = 3
"""Training steps before the cost of keeping states is measured: the first ones are slow."""


class Recovery:
    """Recovers from failures, as many as the settings allow.

    Args:
        resizing: redistributes the layers if lost workers cannot be replaced one by one.
    """

    def __init__(self, state: RunState, workers: ElasticGroup, resizing: Resizing) -> None:
        self.state, self.workers, self.resizing = state, workers, resizing
        self.budget = FailureBudget(state.run_config.max_failures)

    def prepare(self) -> None:
        """Prepare for the next failure, after a chunk of steps: choose how often states are kept, and start spare workers.

        Spares are started only after a step has succeeded, so that they do not compete with the replacement of a lost worker.
        """
        copies, step_log = self.state.copies, self.state.step_log
        if copies.is_undecided and step_log.step >= step_log.first_step + WARM_STEPS:
            copies.choose(step_log.step_s, self.workers.call("cost_of_copies"), on_cpu=self.workers.device == "cpu")
        self.workers.keep_spares()

    def start_anew(self, step: int, error: RayllpError) -> None:
        """Handle a failure during the start, before `step`: end all worker processes and wait, so that the caller can try again.

        Raises:
            ClusterError: there were too many failures.
        """
        wait_s = self.budget.spend(step, time.monotonic(), str(error))
        self.state.journal.event(step, "fault", reason=f"at the start: {error}", ranks=sorted(_ranks_of(error)))
        self.state.journal.say(f"at the start: {error}; all workers are started again")
        self.workers.dismiss()
        time.sleep(wait_s)

    def recover(self, error: RayllpError) -> int:
        """Replace lost workers and take all workers back to a common step; return that step.

        Raises:
            ClusterError: there were too many failures, or the resources of lost workers did not become available again.
        """
        state, journal, step_log = self.state, self.state.journal, self.state.step_log
        began, lost, reached = time.monotonic(), _ranks_of(error), step_log.step
        shape = _shape(step_log.config)
        state.checkpointer.abandon()
        for attempt in count():
            journal.event(reached, "fault", reason=str(error), ranks=sorted(lost))
            journal.say(f"step {reached}: {error}")
            now = time.monotonic()
            wait_s = self.budget.spend_again(attempt, now, str(error)) if attempt else self.budget.spend(step_log.step, now, str(error))
            time.sleep(wait_s)
            try:
                reached = max(reached, self.workers.steps_done(lost))
                step, source = self._fill_up(lost)
                if _shape(step_log.config) != shape:  # what was timed is how fast other blocks of layers were
                    step_log.start_at(step)
                state.keep(step)
                break
            except FAULTS as another:
                # Workers that have just been replaced count as lost again: they may not have received their state yet.
                error, lost = another, _ranks_of(another) | (frozenset() if self.workers.is_halfway else lost)
        seconds = time.monotonic() - began
        journal.event(step, "restore", source=source, ranks=sorted(lost), seconds=round(seconds, 3), steps_lost=reached - step)
        journal.say(f"step {step}: going on from {source} after {seconds:.1f} s; steps to repeat: {reached - step}")
        return step

    def _fill_up(self, lost: frozenset[int]) -> tuple[int, str]:
        """Give each block of layers a worker again, with all workers at the same step.

        Returns: that step, and where the states came from: "memory", "checkpoint" or "the start".
        """
        size = max(self.workers.count_available_workers(lost), self.state.run_config.fewest_workers)
        if size < self.workers.size or self.workers.is_halfway or not self.workers.keeps_processes:
            return self.resizing.resize(size, lost)
        self.workers.replace(lost)
        step = self.workers.restore_from_memory(lost)
        if step is None:
            return self.state.restore_from_checkpoint_or_start()
        self.state.sync_records_to(step, partial(self.workers.step_reports, lost))
        return step, "memory"


def _shape(config: TrainConfig) -> tuple[int, int]:
    """Return what the time of a step depends on: the number of workers, and that of layers."""
    return config.world, config.model.layers


def _ranks_of(error: RayllpError) -> frozenset[int]:
    return error.ranks if isinstance(error, WorkerLostError) else frozenset()
