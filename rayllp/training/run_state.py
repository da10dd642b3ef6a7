"""What the workers train and how far it is, and the ways to another state: a checkpoint's, an earlier step's, the next stage's."""

from collections.abc import Callable, Sequence
from typing import Any

from rayllp.checkpoint import Folder, checkpoints, count_layers, read_manifest, step_of
from rayllp.config import TrainConfig
from rayllp.config.nested import stage_at
from rayllp.errors import DamagedCheckpointError, NonFiniteError
from rayllp.models import Architecture
from rayllp.report import Journal, RunDirectory
from rayllp.training.checkpointing import Saver
from rayllp.training.failure_budget import CopyInterval
from rayllp.training.messages import describe_stage, where_not_finite
from rayllp.training.result import network_at
from rayllp.training.step_log import StepLog
from rayllp.training.worker_group import ElasticGroup, WorkerGroup

Answers = Sequence[list[dict[str, Any]]]
"""Of each worker, what steps did."""


class RunState:
    """Settings, workers' states, records and checkpoints of one sitting, which change together.

    Args:
        model: a network of the user's own; None: the one that the settings name.
        kept: transformers' configuration of a run that goes on.

    Attributes:
        whole: the run's settings.
        stage: of nested iteration, in hand; without it there is one.
        config: the stage's settings, for the workers there are.
        settled: the last step after which everything due was done.
        copies: how often workers keep their states in memory.
    """

    def __init__(
        self, whole: TrainConfig, run: RunDirectory, workers: WorkerGroup, saver: Saver, journal: Journal, model: Architecture | None,
        kept: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        self.whole, self.run, self.workers, self.saver, self.journal = whole, run, workers, saver, journal
        self._model, self._kept = model, kept
        self._size = workers.config.world
        self.stage = stage_at(whole, 0)
        self.config = self.at_size(self._size)
        self.step_log = StepLog(run, journal, self.config)
        self.settled = 0
        self.copies = self._choose_copies()

    def start_at(self, step: int) -> None:
        """Go on after `step` steps, on workers that have that state; it is kept, to come back to before the next step is done."""
        self.step_log.start_at(step)
        self.settled = step
        self.keep(step)

    def keep(self, step: int) -> None:
        """Have the workers keep the state that they have after `step` steps, where they keep any."""
        if self.copies.every:
            self.workers.call("keep", step)

    def take_in(self, answers: Answers) -> int:
        """What the chunk's steps did; steps done.

        Raises:
            NonFiniteError: the loss or the gradient of the one after these is not finite.
        """
        faults = self.step_log.take_in(answers)
        if faults is not None:
            self._not_finite(self.step_log.step, where_not_finite(faults))
        return self.step_log.step

    def _not_finite(self, step: int, where: str) -> None:
        path = self.save(step)
        self.journal.event(step, "fault", reason="not finite", where=where)
        raise NonFiniteError(
            f"step {step}: the loss or the gradient is not finite; first at fault: {where}. The optimizer step was not taken; the state "
            f"before it is in {path}. Look at the batch of this step, lower optimizer.lr, or lengthen optimizer.warmup"
        )

    # Checkpoints ----------------------------------------------------------------------------------------------------------------

    def save(self, step: int) -> Folder:
        """A checkpoint that is complete when this returns."""
        return self.saver.save(step, self.step_log.controller.state(), self.journal)

    def begin_save(self, step: int) -> None:
        """A checkpoint that is written while training goes on."""
        self.saver.begin(step, self.step_log.controller.state(), self.journal)

    def restore(self, folder: Folder, manifest: dict[str, Any]) -> int:
        """Go on from a checkpoint; steps done."""
        self._load(folder, manifest)
        step = self.settled = int(manifest["step"])
        self.saver.restored(step)
        self.step_log.restart(step)
        self.journal.event(step, "restore", path=str(folder))
        return step

    def restore_newest(self, found: Sequence[Folder], newest: tuple[Folder, dict[str, Any]], *, built: bool) -> int:
        """Go on from the newest of these checkpoints that is whole; steps done.

        Args:
            newest: the first that is tried, and its manifest, as `Saver.read_newest` found them.
            built: whether the workers have the layers of its step.

        Raises:
            CheckpointError: none is whole; says what is wrong with the newest.
        """
        first: DamagedCheckpointError | None = None
        while True:
            folder, manifest = newest
            if not built:
                self._rebuild(step_of(folder))
            try:
                return self.restore(folder, manifest)
            except DamagedCheckpointError as error:
                self.saver.pass_over(folder, error, self.journal)
                first, found, built = first or error, found[: found.index(folder)], False
                if not found:
                    raise first from None
                newest = self.saver.read_newest(list(found), self.journal)

    def _load(self, folder: Folder, manifest: dict[str, Any]) -> None:
        """Take over a checkpoint, of this stage's network or of a shallower one's."""
        prolongation, config = self.saver.load(folder, manifest, nested=bool(self.whole.nested.factors)), self.config
        if prolongation is None:
            self.step_log.controller.restore(manifest["controller"])
        else:
            sizes = {"middle_layers": config.middle_layers, "step_size": config.middle_step}
            self.journal.event(manifest["step"], "deepen", layers_before=count_layers(manifest), layers=config.model.layers, **sizes)

    # Earlier states -------------------------------------------------------------------------------------------------------------

    def agree_on(self, step: int, report: Callable[[int, int], Answers]) -> None:
        """Records and controller as they were after `step` steps, a state of which the workers' memories have.

        Args:
            report: what the steps from … to … did, as workers remember it.
        """
        if step > self.step_log.step:  # their statistics were lost with the call
            self.take_in(report(self.step_log.step, step))
        elif step < self.step_log.step:
            self.step_log.rewind(step)
            self.settled = min(step, self.settled)

    def take_back_from_disk(self) -> tuple[int, str]:
        """Everything as it was at the last checkpoint, else at the start: the step, and which it was."""
        found = checkpoints(self.run.checkpoints)
        if found:
            return self.restore_newest(found, self.saver.read_newest(found, self.journal), built=False), "checkpoint"
        self._rebuild(0)
        self.step_log.restart(0)
        self.settled = 0
        return 0, "the start"

    # Other settings: of the next stage, of another number of workers -------------------------------------------------------------

    def enter_stage(self, step: int) -> None:
        """From `step` on: the settings of the stage that does it, and a controller that starts anew, since its network is another."""
        self.stage = stage_at(self.whole, step)
        self.config = self.workers.config = self.saver.settings = self.at_size(self._size)
        self.step_log.enter(self.config)

    def deepen(self, step: int) -> None:
        """Go on with the next stage's network on the same workers, made of this one's checkpoint."""
        folder = self.save(step)
        self._rebuild(step)
        self._load(folder, read_manifest(folder))
        self.start_at(step)
        self.journal.say(f"step {step}: {describe_stage(self.stage, self.whole)}")

    def _rebuild(self, step: int) -> None:
        """Give the same workers new layers, those of the stage that does `step`."""
        self.enter_stage(step)
        self.workers.rebuild(self.config, *self.network())

    def network(self) -> tuple[Architecture | None, dict[str, Any] | None]:
        """The stage's network, as `WorkerGroup.start` takes it."""
        return network_at(self.config, self.whole, self._model, self._kept)

    def at_size(self, size: int) -> TrainConfig:
        """The stage's settings for up to so many workers."""
        return self.stage.config.with_workers(size)

    def set_size(self, size: int) -> None:
        """Settings for another number of workers, which `reshape` then has."""
        self._size = size
        self.config = self.saver.settings = self.step_log.config = self.at_size(size)
        self.step_log.first_step = self.step_log.step
        self.copies = self._choose_copies()

    def _choose_copies(self) -> CopyInterval:
        return CopyInterval(self.config, there=isinstance(self.workers, ElasticGroup))
