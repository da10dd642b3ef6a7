"""The number of workers follows the cluster: more where there is room, others where nodes are told to go, fewer where they are lost.

With replicas it is their number that changes; layers stay shared out as they are.
"""

import math
import time
from functools import partial

from rayllp.training.messages import describe_layout, listed
from rayllp.training.run_state import RunState
from rayllp.training.worker_group import ElasticGroup

MOVE_S = 10.0
"""Before its node goes, a worker's layers move, be there new workers or not."""


class Resizing:
    """Decides on another number of workers, within what the settings allow, and shares the layers out among them."""

    def __init__(self, state: RunState, workers: ElasticGroup) -> None:
        self.state, self.workers = state, workers
        self._warned: frozenset[int] = frozenset()  # ranks whose nodes are known to go
        self._looked = time.monotonic()  # for room for more workers

    def adapt(self, step: int) -> None:
        """Between two chunks."""
        self.leave_in_time(step)
        self.grow(step)

    def grow(self, step: int) -> None:
        """Look for room for more workers now and then, and take in those that are there."""
        here, most = self.workers.size, self.state.whole.world
        if here >= most:
            return
        if time.monotonic() - self._looked >= self.state.whole.resize_check_s:
            self._looked = time.monotonic()
            self.workers.start_standbys(most)
        count = self.workers.count_standbys()
        if not count or self.state.at_size(here + count).world <= here:
            return
        began = time.monotonic()
        self._resize_between_steps(step, here + count)
        self.state.journal.say(f"step {step}: grown in {time.monotonic() - began:.1f} s")

    def leave_in_time(self, step: int) -> None:
        """Move layers off nodes that were told to go, to new workers elsewhere as far as there is room; first of all, a checkpoint."""
        state, journal = self.state, self.state.journal
        leaving, left_s = self.workers.leaving()
        if not leaving:
            self._warned = frozenset()
            return
        if leaving != self._warned:
            self._warned = leaving
            known = round(left_s, 1) if math.isfinite(left_s) else None
            journal.event(step, "fault", reason="the node was told to go", ranks=sorted(leaving), seconds_left=known)
            journal.say(f"step {step}: workers {listed(sorted(leaving))} are on nodes that were told to go; their layers move elsewhere")
            state.begin_save(step)
        here = self.workers.size
        self.workers.start_standbys(here + len(leaving))
        there = here - len(leaving) + min(self.workers.count_standbys(), len(leaving))
        size = state.at_size(there).world
        if size > there or (size < here and left_s > MOVE_S):
            return  # too few to go on, or others may be there before it is time
        state.saver.finish(journal)
        self._resize_between_steps(step, size, leaving)

    def _resize_between_steps(self, step: int, size: int, leaving: frozenset[int] = frozenset()) -> None:
        """Another number of workers, or others, while all are there."""
        self.workers.call("keep", step)
        self.resize(size, frozenset(), leaving)
        self.state.start_at(step)

    def resize(self, size: int, lost: frozenset[int], leaving: frozenset[int] = frozenset()) -> tuple[int, str]:
        """Share the layers out among another number of workers; the step that they are at, and where their states came from."""
        state, journal = self.state, self.state.journal
        began, before = time.monotonic(), state.config
        state.saver.abandon()
        step = self.workers.common_step(lost)
        if step is not None and not self.workers.is_halfway:
            state.agree_on(step, partial(self.workers.report, lost))
        state.set_size(size)
        self.workers.reshape(state.config, lost, *state.network(), leaving)
        source = "memory"
        if step is None:
            step, source = state.take_back_from_disk()
        config, seconds = state.config, round(time.monotonic() - began, 3)
        if before.world == config.world:
            journal.say(f"step {step}: all {before.world} workers are new processes")
            return step, source
        counts = [len(config.layers_of(rank)) for rank in range(config.layer_workers)]
        sizes = {"workers_before": before.world, "workers": config.world, "blocks": counts, "replicas": config.mesh.data}
        journal.event(step, "resize", **sizes, seconds=seconds)
        journal.scalar("train/workers", config.world, step)
        journal.say(f"step {step}: {before.world} workers became {config.world}: {describe_layout(config)}")
        return step, source
