"""The driver of one run: has the workers do chunks of steps, brings lost ones back, and takes in new ones."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from rayllp.checkpoint import Folder, checkpoints, count_layers, read_manifest, step_of
from rayllp.checkpoint.export import write_model_json, write_tokenizer_json
from rayllp.cluster.evaluation import Evaluator
from rayllp.cluster.group import WorkerGroup
from rayllp.cluster.interrupt import stopping
from rayllp.cluster.ledger import Chunk, Ledger
from rayllp.cluster.names import run_name
from rayllp.cluster.places import capacity
from rayllp.cluster.recovery import FailureBudget, choose_interval
from rayllp.cluster.saving import Saver
from rayllp.cluster.staff import Staff
from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.errors import ChannelError, NonFiniteError, RayllpError, WorkerLostError
from rayllp.models import Architecture, LayerStack
from rayllp.nested import stage_at
from rayllp.report import Journal, Listener, RunDirectory
from rayllp.sizes import with_layers

MOVE_S = 10.0
"""Before its node goes, a worker's layers move, be there new workers or not."""
WARM_STEPS = 3
"""Steps before the cost of keeping states is looked at."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        directory: the run directory.
        steps: optimizer steps done, over all sittings of the run.
        validation_loss: mean held-out loss per token (or image, or sentence), exact forward; None if stopped early.
        metrics: what else the last evaluation found: perplexity, accuracy, bleu, by the family.
        sample: generated text; empty unless the family writes text, and for a stopped run.
        stopped: whether Ctrl-C (or SIGTERM) ended it.
    """

    directory: Path
    steps: int
    validation_loss: float | None
    sample: str
    stopped: bool
    metrics: dict[str, float] = field(default_factory=dict)


class Loaded(NamedTuple):
    """What the settings name: the data set, the architecture (a plan without weights), and its configuration where a run goes on."""

    data: Any
    plan: Architecture | None
    kept: dict[str, Any] | None


class Driver:
    """One sitting of one run.

    Args:
        listeners: are told what happens.
        staff: processes to be its workers; None: its own, in a placement group of their own.

    Attributes:
        whole: the run's settings.
        config: those of the stage in hand; without `nested` the same.
    """

    def __init__(
        self, config: TrainConfig, run: RunDirectory, device: str, model: Architecture | None, batches: Batches | None,
        loaded: Loaded | None, console: Console | None = None, listeners: Sequence[Listener] = (), staff: Staff | None = None,
    ) -> None:  # fmt: skip
        self.whole, self.run = config, run
        self.stage = stage_at(config, 0)
        self._size = capacity(config, device)
        self.config = self._at_size(self._size)
        self.data, self.plan, self.kept = loaded or Loaded(None, None, None)
        self.model, self.batches = model, batches
        self.workers = WorkerGroup(self.config, staff or Staff(self.config, device, name=run_name(run.path)))
        self.listeners = listeners
        self.console = console or Console(stderr=True)
        self.stop = False
        self.saver = Saver(run, self.workers, config)
        self.evaluator = Evaluator(run, self.workers, self.saver, config.eval, self.data, batches)
        self.budget = FailureBudget(config.max_failures)
        self._settled = 0  # the last step after which everything due was done
        self._choose_anew()
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
                architecture, kept = self._plans()
                shares = self.workers.start(architecture, self.batches or self.data, kept)
                if start is not None and manifest is not None:
                    self._restore(start, manifest)
                break
            except (WorkerLostError, ChannelError) as error:
                wait_s = self.budget.spend(step, time.monotonic(), str(error))
                self.journal.event(step, "fault", reason=f"at the start: {error}", ranks=sorted(_ranks_of(error)))
                self.journal.say(f"at the start: {error}; all workers start anew")
                self.workers.dismiss()
                time.sleep(wait_s)
        self._keep_what_export_needs()
        self.journal.say(self._describe(shares))
        return step

    def _keep_what_export_needs(self) -> None:
        if self.plan is not None:
            write_model_json(self.run.path, self.plan)
            write_tokenizer_json(self.run.path, self.data)

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
            except (WorkerLostError, ChannelError) as error:
                step = self._recover(error)
            else:
                return step, final, sample

    def _recover(self, error: RayllpError) -> int:
        """Replace lost workers and take all blocks back to a common step; that step."""
        began, lost, reached = time.monotonic(), _ranks_of(error), self.ledger.step
        self.saver.abandon()
        for attempt in count():
            self.journal.event(reached, "fault", reason=str(error), ranks=sorted(lost))
            self.journal.say(f"step {reached}: {error}")
            now = time.monotonic()
            wait_s = self.budget.spend_again(attempt, now, str(error)) if attempt else self.budget.spend(self.ledger.step, now, str(error))
            time.sleep(wait_s)
            try:
                reached = max(reached, self.workers.reached(lost))
                size = max(self.workers.places(lost), self.whole.fewest_workers)
                if size < len(self.workers.workers) or self.workers.is_halfway:
                    step, source = self._resize(size, lost)
                else:
                    self.workers.replace(lost)
                    step, source = self._take_back(lost)
                if self._keep_every:
                    self.workers.call("keep", step)
                break
            except (WorkerLostError, ChannelError) as another:
                # Those that were replaced have no state yet, as far as is known.
                error, lost = another, _ranks_of(another) | (frozenset() if self.workers.is_halfway else lost)
        seconds = time.monotonic() - began
        self.journal.event(step, "restore", source=source, ranks=sorted(lost), seconds=round(seconds, 3), steps_lost=reached - step)
        self.journal.scalar("recovery/seconds", seconds, step)
        self.journal.say(f"step {step}: going on from {source} after {seconds:.1f} s; {reached - step} steps are done again")
        return step

    def _take_back(self, lost: frozenset[int]) -> tuple[int, str]:
        """Blocks and controller as they were after some step: held in memory, else of the last checkpoint, else of none; its source."""
        step = self.workers.roll_back(lost)
        if step is None:
            return self._take_back_from_disk()
        self._agree_on(step, lost)
        return step, "memory"

    def _agree_on(self, step: int, lost: frozenset[int]) -> None:
        """Records and controller as they were after `step` steps, of which the workers' memories know."""
        if step > self.ledger.step:  # their statistics were lost with the call
            self._take_in(self.workers.call_some(self.workers.survivors(lost), "report", self.ledger.step, step))
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
        if self._keep_every:
            self.workers.call("keep", step)

    def _choose_anew(self) -> None:
        """How often states are kept is open again, unless the settings say it."""
        wanted = self.config.snapshot_every
        self._keep_every, self._keep_chosen = (1, False) if wanted is None else (wanted, True)
        if self.config.world == 1:  # who would hold it when the worker is gone?
            self._keep_every, self._keep_chosen = 0, True

    def _choose_keep_every(self) -> None:
        """After the first steps: how often states are kept, by what that costs, where the settings leave it open."""
        if self._keep_chosen or self.ledger.step < self.ledger.first_step + WARM_STEPS:
            return
        costs = self.workers.call("cost_of_copies")
        take_s, exchange_s = (max(cost[part] for cost in costs) for part in (0, 1))
        self._keep_every = choose_interval(self.ledger.step_s, take_s, exchange_s, on_cpu=self.workers.device == "cpu")
        self._keep_chosen = True

    # Another number of workers --------------------------------------------------------------------------------------------------

    def _grow(self, step: int) -> None:
        """Look for room for more workers now and then, and take in those that are there."""
        most = self.whole.world
        if len(self.workers.workers) >= most:
            return
        if time.monotonic() - self._looked >= self.whole.resize_check_s:
            self._looked = time.monotonic()
            self.workers.recruit(most)
        count = self.workers.recruited()
        if not count or self._at_size(len(self.workers.workers) + count).world <= len(self.workers.workers):
            return
        began = time.monotonic()
        self._resize_between_steps(step, len(self.workers.workers) + count)
        self.journal.say(f"step {step}: grown in {time.monotonic() - began:.1f} s")

    def _leave_in_time(self, step: int) -> None:
        """Move layers off nodes that were told to go, to new workers elsewhere as far as there is room; first of all, a checkpoint."""
        leaving, left_s = self.workers.leaving()
        if not leaving:
            self._warned = frozenset()
            return
        if leaving != self._warned:
            self._warned = leaving
            self.journal.event(step, "fault", reason="the node was told to go", ranks=sorted(leaving), seconds_left=_finite(left_s))
            self.journal.say(f"step {step}: workers {_listed(leaving)} are on nodes that were told to go; their layers move elsewhere")
            self.saver.begin(step, self.ledger.controller.state(), self.journal)
        here = len(self.workers.workers)
        self.workers.recruit(here + len(leaving))
        there = here - len(leaving) + min(self.workers.recruited(), len(leaving))
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
        began, before = time.monotonic(), self.config
        self.saver.abandon()
        step = self.workers.common_step(lost)
        if step is not None and not self.workers.is_halfway:
            self._agree_on(step, lost)
        self._set_size(size)
        self.workers.reshape(self.config, lost, *self._plans(), leaving)
        source = "memory"
        if step is None:
            step, source = self._take_back_from_disk()
        seconds = round(time.monotonic() - began, 3)
        self.journal.event(
            step, "resize", workers_before=before.world, workers=self.config.world, blocks=self.config.blocks, seconds=seconds
        )
        self.journal.scalar("train/workers", self.config.world, step)
        self.journal.say(f"step {step}: {before.world} workers became {self.config.world}, blocks {'/'.join(map(str, self.config.blocks))}")
        return step, source

    def _at_size(self, size: int) -> TrainConfig:
        return self.stage.config.with_workers(size)

    def _set_size(self, size: int) -> None:
        """Settings for another number of workers."""
        self._size = size
        self.config = self.saver.settings = self.ledger.config = self._at_size(size)
        self.ledger.first_step = self.ledger.step
        self._choose_anew()

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
        self.workers.rebuild(self.config, *self._plans())

    def _deepen(self, step: int) -> None:
        """Go on with the next stage's network on the same workers, made of this one's checkpoint."""
        folder = self._save(step)
        self._rebuild(step)
        self._load(folder, read_manifest(folder))
        self._keep_in_memory(step)
        self.journal.say(f"step {step}: {self._describe_stage()}")

    def _plans(self) -> tuple[Architecture | None, dict[str, Any] | None]:
        """The user's own network and the kept configuration of a run that goes on, at this stage's depth."""
        if not self.whole.nested.factors:
            return self.model, self.kept
        config = self.config
        kept = None if self.kept is None else with_layers(self.kept, config.model.layers)
        if not isinstance(self.model, LayerStack):
            return self.model, kept
        return self.model.thinned(config.buffers.open, config.buffers.close, self.whole.middle_layers // config.middle_layers), kept

    def _load(self, folder: Folder, manifest: dict[str, Any]) -> None:
        """Take over a checkpoint, of this stage's network or of a shallower one's."""
        prolongation, config = self.saver.load(folder, manifest, nested=bool(self.whole.nested.factors)), self.config
        if prolongation is None:
            self.ledger.controller.restore(manifest["controller"])
        else:
            sizes = {"middle_layers": config.middle_layers, "step_size": config.middle_step}
            self.journal.event(manifest["step"], "deepen", layers_before=count_layers(manifest), layers=config.model.layers, **sizes)

    def _describe_stage(self) -> str:
        stage, config = self.stage, self.config
        note = f" ({stage.note})" if stage.note else ""
        depth = f"{config.middle_layers} middle layers with Δt = {config.middle_step:g}"
        return f"stage {stage.number} of {len(self.whole.nested.factors) + 1}, to step {stage.end}: {depth}{note}"

    # The loop -----------------------------------------------------------------------------------------------------------------

    def _loop(self, step: int) -> int:
        while True:
            if step > self._settled:
                self._between_chunks(step)
                self._settled = step
            if step >= self.stage.end or self.stop:
                return step
            self._leave_in_time(step)
            self._grow(step)
            self.ledger.begin(step)
            chunk = self._next_chunk(step)
            answers = self.workers.call("run", chunk, self._keep_every, timeout_s=self.ledger.expect(chunk))
            self.ledger.note_time()
            step = self._take_in(answers)
            self._choose_keep_every()
            self.workers.keep_spares()  # after a step, so that a spare does not start while a lost worker is waited for

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
        found = [fault for fault in faults if fault is not None]
        where = (
            min(found)[2]
            if found
            else "the approximate solve alone (exact forward and gradients are finite): raise mgrit.iterations or use mode=serial"
        )
        path = self._save(step)
        self.journal.event(step, "fault", reason="not finite", where=where)
        raise NonFiniteError(
            f"step {step}: the loss or the gradient is not finite; first at fault: {where}. The optimizer step was not taken; the state "
            f"before it is in {path}. Look at the batch of this step, lower optimizer.lr, or lengthen optimizer.warmup"
        )

    def _describe(self, shares: list[dict[str, Any]]) -> str:
        config, parameters = self.config, sum(share["parameters"] for share in shares) // self.config.mesh.data
        buffers = f"{config.buffers.open} + {config.middle_layers} + {config.buffers.close} layers"
        mesh = f"{config.layer_workers} blocks {'/'.join(map(str, config.blocks))}" + (
            f" × {config.mesh.data} replicas" if config.mesh.data > 1 else ""
        )
        what = config.model.family if self.model is None else type(self.model).__name__
        skipped = getattr(self.data, "skipped", {})
        left_out = "; left out of the data: " + ", ".join(f"{n} {kind}" for kind, n in skipped.items()) if skipped else ""
        where = f"{mesh} on {self.workers.device}; run directory {self.run.path}"
        stage = f"; {self._describe_stage()}" if self.whole.nested.factors else ""
        return f"{what}: {buffers}, {parameters / 1e6:.1f} M parameters, {where}{left_out}{stage}"


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _finite(seconds: float) -> float | None:
    return round(seconds, 1) if math.isfinite(seconds) else None


def _ranks_of(error: RayllpError) -> frozenset[int]:
    return error.ranks if isinstance(error, WorkerLostError) else frozenset()
