"""The driver of one run: has the workers do chunks of steps, brings lost ones back, and takes in new ones."""

import math
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

from rich.console import Console

from rayllp.checkpoint import Folder, checkpoints, count_layers, read_manifest, step_of
from rayllp.checkpoint.described import write_model_json, write_tokenizer_json
from rayllp.cluster.evaluation import Evaluator
from rayllp.cluster.given import Loaded, TrainResult, network_at, whole_network
from rayllp.cluster.group import ElasticGroup, WorkerGroup
from rayllp.cluster.interrupt import stopping
from rayllp.cluster.ledger import Chunk, Ledger
from rayllp.cluster.recovery import CopyInterval, FailureBudget
from rayllp.cluster.saving import Saver
from rayllp.cluster.wording import describe_run, describe_stage, listed, where_not_finite
from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.errors import ChannelError, NonFiniteError, RayllpError, WorkerLostError
from rayllp.models import Architecture
from rayllp.nested import stage_at
from rayllp.report import Journal, Listener, RunDirectory

MOVE_S = 10.0
"""Before its node goes, a worker's layers move, be there new workers or not."""
WARM_STEPS = 3
"""Steps before the cost of keeping states is looked at."""


class Driver:
    """One sitting of one run.

    Args:
        listeners: are told what happens.

    Attributes:
        whole: the run's settings.
        config: those of the stage in hand; without `nested` the same.
    """

    def __init__(
        self, config: TrainConfig, run: RunDirectory, workers: WorkerGroup, model: Architecture | None, batches: Batches | None,
        loaded: Loaded | None, console: Console | None = None, listeners: Sequence[Listener] = (),
    ) -> None:  # fmt: skip
        self.whole, self.run = config, run
        self.stage = stage_at(config, 0)
        self._size = workers.config.world
        self.config = self._at_size(self._size)
        self.data, self.kept = loaded or Loaded(None, None)
        self.model, self.batches = model, batches
        self.workers = workers
        self.elastic = workers if isinstance(workers, ElasticGroup) else None
        self.listeners = listeners
        self.console = console or Console(stderr=True)
        self.stop = False
        self.saver = Saver(run, self.workers, config)
        self.evaluator = Evaluator(run, self.workers, self.saver, config.eval, self.data, batches)
        self.budget = FailureBudget(config.max_failures)
        self._settled = 0  # the last step after which everything due was done
        self.copies = CopyInterval(self.config, there=self.elastic is not None)
        self._warned: frozenset[int] = frozenset()  # ranks whose nodes are known to go
        self._looked = time.monotonic()  # for room for more workers

    def train(self, found: Sequence[Folder] = ()) -> TrainResult:
        """Run to the last step, or to Ctrl-C.

        Args:
            found: checkpoints to go on from, oldest first; the newest that is whole serves.
        """
        sample = ""
        final: dict[str, float] = {}
        begin = step_of(found[-1]) if found else 0
        self.run.mend()
        try:
            with Journal.open(self.run, self.whole.steps, begin, self.console, self.listeners) as self.journal:
                self.ledger = Ledger(self.run, self.journal, self.config)
                start, manifest = self.saver.read_newest(list(found), self.journal) if found else (None, None)
                step = self._begin(start, manifest)
                with stopping(self._stop):  # a start that is interrupted leaves nothing
                    step, final, sample = self._train_through_faults(step)
        except BaseException:
            self.run.discard_if_unused()
            raise
        finally:
            self.workers.shutdown()
        if self.stop:
            self.console.print(
                f"stopped after step {step}; go on with: rayllp train --resume {self.run.path}", highlight=False, soft_wrap=True
            )
        loss = final.pop("loss", None)
        return TrainResult(
            directory=self.run.path, steps=step, validation_loss=loss, metrics=final, sample=sample, stopped=self.stop
        )  # fmt: skip

    def _stop(self) -> None:
        """End after the chunk in hand."""
        self.stop = True
        self.console.print("stopping after this chunk of steps, with a checkpoint; again to stop at once", highlight=False, soft_wrap=True)

    def _begin(self, start: Folder | None, manifest: dict[str, Any] | None) -> int:
        """Start the workers, and have them take over a checkpoint; steps done."""
        step = step_of(start) if start is not None else 0
        self._enter_stage(step)
        self.run.truncate(step)  # one that ended before its first checkpoint has records too
        while True:
            try:
                architecture, kept = self._network()
                shares = self.workers.start(architecture, self.batches or self.data, kept)
                if start is not None and manifest is not None:
                    self._restore(start, manifest)
                break
            except (WorkerLostError, ChannelError) as error:
                if self.elastic is None:
                    raise
                wait_s = self.budget.spend(step, time.monotonic(), str(error))
                self.journal.event(step, "fault", reason=f"at the start: {error}", ranks=sorted(_ranks_of(error)))
                self.journal.say(f"at the start: {error}; all workers start anew")
                self.elastic.dismiss()
                time.sleep(wait_s)
        write_model_json(self.run.path, whole_network(self.whole, shares[0]["network"]))
        write_tokenizer_json(self.run.path, self.data)
        self.journal.say(self._describe(shares))
        return step

    # Faults ---------------------------------------------------------------------------------------------------------------------

    def _train_through_faults(self, step: int) -> tuple[int, dict[str, float], str]:
        try:
            self._keep_in_memory(step)
        except (WorkerLostError, ChannelError) as error:
            step = self._recover(error)
        while True:
            try:
                step = self._train_stages(step)
                self._save(step)  # first of all: what follows can take long, and be interrupted
                final, sample = ({}, "") if self.stop else self.evaluator.finish(step, self.journal)
                self._save(step)
                self.journal.finish(self.whole, final, sample, step)
            except (WorkerLostError, ChannelError) as error:
                step = self._recover(error)
            else:
                return step, final, sample

    def _recover(self, error: RayllpError) -> int:
        """Replace lost workers and take all blocks back to a common step; that step."""
        if self.elastic is None:
            raise error
        began, lost, reached = time.monotonic(), _ranks_of(error), self.ledger.step
        self.saver.abandon()
        for attempt in count():
            self.journal.event(reached, "fault", reason=str(error), ranks=sorted(lost))
            self.journal.say(f"step {reached}: {error}")
            now = time.monotonic()
            wait_s = self.budget.spend_again(attempt, now, str(error)) if attempt else self.budget.spend(self.ledger.step, now, str(error))
            time.sleep(wait_s)
            try:
                reached = max(reached, self.elastic.reached(lost))
                size = max(self.elastic.places(lost), self.whole.fewest_workers)
                if size < self.elastic.size or self.elastic.is_halfway or not self.elastic.keeps_processes:
                    step, source = self._resize(size, lost)
                else:
                    self.elastic.replace(lost)
                    step, source = self._take_back(lost)
                if self.copies.every:
                    self.workers.call("keep", step)
                break
            except (WorkerLostError, ChannelError) as another:
                # Those that were replaced have no state yet, as far as is known.
                error, lost = another, _ranks_of(another) | (frozenset() if self.elastic.is_halfway else lost)
        seconds = time.monotonic() - began
        self.journal.event(step, "restore", source=source, ranks=sorted(lost), seconds=round(seconds, 3), steps_lost=reached - step)
        self.journal.scalar("recovery/seconds", seconds, step)
        self.journal.say(f"step {step}: going on from {source} after {seconds:.1f} s; {reached - step} steps are done again")
        return step

    def _take_back(self, lost: frozenset[int]) -> tuple[int, str]:
        """Blocks and controller as they were after some step: held in memory, else of the last checkpoint, else of none; its source."""
        assert self.elastic is not None
        step = self.elastic.roll_back(lost)
        if step is None:
            return self._take_back_from_disk()
        self._agree_on(step, lost)
        return step, "memory"

    def _agree_on(self, step: int, lost: frozenset[int]) -> None:
        """Records and controller as they were after `step` steps, of which the workers' memories know."""
        assert self.elastic is not None
        if step > self.ledger.step:  # their statistics were lost with the call
            self._take_in(self.elastic.report(lost, self.ledger.step, step))
        elif step < self.ledger.step:
            self.ledger.rewind(step)
            self._settled = min(step, self._settled)

    def _take_back_from_disk(self) -> tuple[int, str]:
        found = checkpoints(self.run.checkpoints)
        if found:
            folder, manifest = self.saver.read_newest(found, self.journal)
            self._rebuild(step_of(folder))
            return self._restore(folder, manifest), "checkpoint"
        self._rebuild(0)
        self.ledger.restart(0)
        self._settled = 0
        return 0, "the start"

    def _keep_in_memory(self, step: int) -> None:
        """A state to come back to before the next step is done."""
        self.ledger.start_at(step)
        self._settled = step
        if self.copies.every:
            self.workers.call("keep", step)

    # Another number of workers --------------------------------------------------------------------------------------------------

    def _grow(self, step: int) -> None:
        """Look for room for more workers now and then, and take in those that are there."""
        assert self.elastic is not None
        most = self.whole.world
        if self.elastic.size >= most:
            return
        if time.monotonic() - self._looked >= self.whole.resize_check_s:
            self._looked = time.monotonic()
            self.elastic.recruit(most)
        count = self.elastic.recruited()
        if not count or self._at_size(self.elastic.size + count).world <= self.elastic.size:
            return
        began = time.monotonic()
        self._resize_between_steps(step, self.elastic.size + count)
        self.journal.say(f"step {step}: grown in {time.monotonic() - began:.1f} s")

    def _leave_in_time(self, step: int) -> None:
        """Move layers off nodes that were told to go, to new workers elsewhere as far as there is room; first of all, a checkpoint."""
        assert self.elastic is not None
        leaving, left_s = self.elastic.leaving()
        if not leaving:
            self._warned = frozenset()
            return
        if leaving != self._warned:
            self._warned = leaving
            known = round(left_s, 1) if math.isfinite(left_s) else None
            self.journal.event(step, "fault", reason="the node was told to go", ranks=sorted(leaving), seconds_left=known)
            self.journal.say(
                f"step {step}: workers {listed(sorted(leaving))} are on nodes that were told to go; their layers move elsewhere"
            )
            self.saver.begin(step, self.ledger.controller.state(), self.journal)
        here = self.elastic.size
        self.elastic.recruit(here + len(leaving))
        there = here - len(leaving) + min(self.elastic.recruited(), len(leaving))
        size = self._at_size(there).world
        if size > there or (size < here and left_s > MOVE_S):
            return  # too few to go on, or others may be there before it is time
        self.saver.finish(self.journal)
        self._resize_between_steps(step, size, leaving)

    def _resize_between_steps(self, step: int, size: int, leaving: frozenset[int] = frozenset()) -> None:
        """Another number of workers, or others, while all are there."""
        self.workers.call("keep", step)
        self._resize(size, frozenset(), leaving)
        self._keep_in_memory(step)

    def _resize(self, size: int, lost: frozenset[int], leaving: frozenset[int] = frozenset()) -> tuple[int, str]:
        """Share the layers out among another number of workers; the step that they are at, and where their states came from."""
        assert self.elastic is not None
        began, before = time.monotonic(), self.config
        self.saver.abandon()
        step = self.elastic.common_step(lost)
        if step is not None and not self.elastic.is_halfway:
            self._agree_on(step, lost)
        self._set_size(size)
        self.elastic.reshape(self.config, lost, *self._network(), leaving)
        source = "memory"
        if step is None:
            step, source = self._take_back_from_disk()
        seconds = round(time.monotonic() - began, 3)
        if before.world == self.config.world:
            self.journal.say(f"step {step}: all {before.world} workers are new processes")
            return step, source
        self.journal.event(
            step, "resize", workers_before=before.world, workers=self.config.world, blocks=self.config.blocks, seconds=seconds
        )
        self.journal.scalar("train/workers", self.config.world, step)
        self.journal.say(f"step {step}: {before.world} workers became {self.config.world}, blocks {listed(self.config.blocks, '/')}")
        return step, source

    def _at_size(self, size: int) -> TrainConfig:
        return self.stage.config.with_workers(size)

    def _set_size(self, size: int) -> None:
        """Settings for another number of workers."""
        self._size = size
        self.config = self.saver.settings = self.ledger.config = self._at_size(size)
        self.ledger.first_step = self.ledger.step
        self.copies = CopyInterval(self.config, there=self.elastic is not None)

    # Stages of nested iteration: one without it ---------------------------------------------------------------------------------

    def _train_stages(self, step: int) -> int:
        while True:
            if self.whole.nested.factors:
                self.journal.scalar("train/layers", self.config.model.layers, step)
            step = self._loop(step)
            if self.stop or step >= self.whole.steps:
                return step
            self._deepen(step)

    def _enter_stage(self, step: int) -> None:
        """From `step` on: the settings of the stage that does it, and a controller that starts anew, since its network is another."""
        self.stage = stage_at(self.whole, step)
        self.config = self.workers.config = self.saver.settings = self._at_size(self._size)
        self.ledger.enter(self.config)

    def _rebuild(self, step: int) -> None:
        """Give the same workers new layers, those of the stage that does `step`."""
        self._enter_stage(step)
        self.workers.rebuild(self.config, *self._network())

    def _deepen(self, step: int) -> None:
        """Go on with the next stage's network on the same workers, made of this one's checkpoint."""
        folder = self._save(step)
        self._rebuild(step)
        self._load(folder, read_manifest(folder))
        self._keep_in_memory(step)
        self.journal.say(f"step {step}: {describe_stage(self.stage, self.whole)}")

    def _network(self) -> tuple[Architecture | None, dict[str, Any] | None]:
        return network_at(self.config, self.whole, self.model, self.kept)

    def _load(self, folder: Folder, manifest: dict[str, Any]) -> None:
        """Take over a checkpoint, of this stage's network or of a shallower one's."""
        prolongation, config = self.saver.load(folder, manifest, nested=bool(self.whole.nested.factors)), self.config
        if prolongation is None:
            self.ledger.controller.restore(manifest["controller"])
        else:
            sizes = {"middle_layers": config.middle_layers, "step_size": config.middle_step}
            self.journal.event(manifest["step"], "deepen", layers_before=count_layers(manifest), layers=config.model.layers, **sizes)

    # The loop -----------------------------------------------------------------------------------------------------------------

    def _loop(self, step: int) -> int:
        while True:
            if step > self._settled:
                self._between_chunks(step)
                self._settled = step
            if step >= self.stage.end or self.stop:
                return step
            if self.elastic is not None:
                self._leave_in_time(step)
                self._grow(step)
            self.ledger.begin(step)
            chunk = self._next_chunk(step)
            answers = self.workers.call("run", chunk, self.copies.every, timeout_s=self.ledger.expect(chunk))
            self.ledger.note_time()
            step = self._take_in(answers)
            if self.copies.is_open and self.ledger.step >= self.ledger.first_step + WARM_STEPS:
                self.copies.choose(self.ledger.step_s, self.workers.call("cost_of_copies"), on_cpu=self.workers.device == "cpu")
            if self.elastic is not None:
                self.elastic.keep_spares()  # after a step, so that a spare does not start while a lost worker is waited for

    def _next_chunk(self, step: int) -> Chunk:
        return self.ledger.next_chunk(step, self.stage.end)

    def _take_in(self, answers: Sequence[list[dict[str, Any]]]) -> int:
        """What the chunk's steps did; steps done."""
        faults = self.ledger.take_in(answers)
        if faults is not None:
            self._not_finite(self.ledger.step, faults)
        return self.ledger.step

    def _between_chunks(self, step: int) -> None:
        """What is due after a chunk; the last step's is done when training ends."""
        if step < self.whole.steps:
            if self.evaluator.is_due(step):
                self.evaluator.evaluate(step, self.journal)
            if self.saver.is_wanted(step):
                self.saver.begin(step, self.ledger.controller.state(), self.journal)
        self.saver.poll(self.journal)

    # Checkpoints ----------------------------------------------------------------------------------------------------------------

    def _save(self, step: int) -> Folder:
        return self.saver.save(step, self.ledger.controller.state(), self.journal)

    def _restore(self, folder: Folder, manifest: dict[str, Any]) -> int:
        self._load(folder, manifest)
        step = self._settled = int(manifest["step"])
        self.saver.restored(step)
        self.ledger.restart(step)
        self.journal.event(step, "restore", path=str(folder))
        return step

    def _not_finite(self, step: int, faults: list[tuple[int, int, str] | None]) -> None:
        where, path = where_not_finite(faults), self._save(step)
        self.journal.event(step, "fault", reason="not finite", where=where)
        raise NonFiniteError(
            f"step {step}: the loss or the gradient is not finite; first at fault: {where}. The optimizer step was not taken; the state "
            f"before it is in {path}. Look at the batch of this step, lower optimizer.lr, or lengthen optimizer.warmup"
        )

    def _describe(self, shares: list[dict[str, Any]]) -> str:
        network = self.config.model.family if self.model is None else type(self.model).__name__
        parameters = sum(share["parameters"] for share in shares) // self.config.mesh.data
        left_out = getattr(self.data, "skipped", {})
        line = describe_run(self.config, network, parameters, self.workers.device, self.run.path, left_out)
        return f"{line}; {describe_stage(self.stage, self.whole)}" if self.whole.nested.factors else line


def _ranks_of(error: RayllpError) -> frozenset[int]:
    return error.ranks if isinstance(error, WorkerLostError) else frozenset()
