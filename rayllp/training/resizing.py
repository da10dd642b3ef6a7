"""Changes the number of workers while a run trains.

Workers are added when the cluster has room and moved off nodes that are about to shut down; there are fewer when lost ones cannot be
replaced. In a run with replicas it is the number of replicas that changes, and layers stay distributed as they are within each replica.
"""

import math
import time
from functools import partial

from rayllp.training.messages import describe_layout, listed
from rayllp.training.run_state import RunState
from rayllp.training.worker_group import ElasticGroup

LATEST_MOVE_S = 10.0
"""This many seconds before a node shuts down, its layers move even if fewer workers are left to take them."""


class Resizing:
    """Decides when the number of workers changes, within what the settings allow, and redistributes the layers."""

    def __init__(self, state: RunState, workers: ElasticGroup) -> None:
        self.state, self.workers = state, workers
        self._warned: frozenset[int] = frozenset()  # ranks on draining nodes that the user was told of
        self._last_check = time.monotonic()  # when the cluster was last checked for free resources

    def adapt(self, step: int) -> None:
        """Move layers off nodes that are about to shut down, then take in workers for which the cluster has room."""
        self.leave_draining_nodes(step)
        self.grow(step)

    def grow(self, step: int) -> None:
        """Check for free resources from time to time, start standby workers there, and take in those that are ready."""
        size, most = self.workers.size, self.state.run_config.world
        if size >= most:
            return
        if time.monotonic() - self._last_check >= self.state.run_config.resize_check_s:
            self._last_check = time.monotonic()
            self.workers.start_standbys(most)
        standbys = self.workers.count_standbys()
        if not standbys or self.state.at_size(size + standbys).world <= size:
            return
        began = time.monotonic()
        self._resize_between_steps(step, size + standbys)
        self.state.journal.say(f"step {step}: workers added in {time.monotonic() - began:.1f} s")

    def leave_draining_nodes(self, step: int) -> None:
        """Save a checkpoint, and move layers off nodes that are about to shut down, to standby workers elsewhere if there is room."""
        state, journal = self.state, self.state.journal
        draining, left_s = self.workers.draining_ranks()
        if not draining:
            self._warned = frozenset()
            return
        if draining != self._warned:
            self._warned = draining
            seconds_left = round(left_s, 1) if math.isfinite(left_s) else None
            journal.event(step, "fault", reason="the node was told to go", ranks=sorted(draining), seconds_left=seconds_left)
            journal.say(f"step {step}: workers {listed(sorted(draining))} are on nodes that will shut down; their layers move elsewhere")
            state.begin_save(step)
        size_now = self.workers.size
        self.workers.start_standbys(size_now + len(draining))
        remaining = size_now - len(draining) + min(self.workers.count_standbys(), len(draining))
        size = state.at_size(remaining).world
        if size > remaining or (size < size_now and left_s > LATEST_MOVE_S):
            return  # too few workers would be left, or more of them may be ready before the node shuts down
        state.checkpointer.finish()
        self._resize_between_steps(step, size, draining)

    def _resize_between_steps(self, step: int, size: int, leaving: frozenset[int] = frozenset()) -> None:
        """Change the number of workers, or replace those in `leaving`, while all workers are alive."""
        self.workers.call("keep", step)
        self.resize(size, frozenset(), leaving)
        self.state.start_at(step)

    def resize(self, size: int, lost: frozenset[int], leaving: frozenset[int] = frozenset()) -> tuple[int, str]:
        """Redistribute the layers among `size` workers.

        Args:
            lost: ranks of lost workers.
            leaving: ranks of workers that hand over their states and get no layers.

        Returns: the step that the workers are at then, and where their states came from: "memory", "checkpoint" or "the start".
        """
        state, journal = self.state, self.state.journal
        began, before = time.monotonic(), state.current_config
        state.checkpointer.abandon()
        step = self.workers.common_step(lost)
        if step is not None and not self.workers.is_halfway:
            state.sync_records_to(step, partial(self.workers.step_reports, lost))
        state.set_size(size)
        self.workers.reshape(state.current_config, lost, state.network(), leaving)
        source = "memory"
        if step is None:
            step, source = state.restore_from_checkpoint_or_start()
        config, seconds = state.current_config, round(time.monotonic() - began, 3)
        if before.world == config.world:
            journal.say(f"step {step}: all {before.world} workers are new processes")
            return step, source
        counts = [len(config.layers_of(rank)) for rank in range(config.layer_workers)]
        sizes = {"workers_before": before.world, "workers": config.world, "blocks": counts, "replicas": config.mesh.data}
        journal.event(step, "resize", **sizes, seconds=seconds)
        journal.say(f"step {step}: {before.world} workers became {config.world}: {describe_layout(config)}")
        return step, source
