"""The state of a run: what its workers train and how far they are. It is saved, taken back to an earlier step, or on to the next stage."""

from collections.abc import Callable, Sequence
from typing import Any

from rayllp.checkpoint import Folder, Prolongation, checkpoints, count_layers, read_manifest, step_of
from rayllp.config import TrainConfig
from rayllp.config.nested import stage_at
from rayllp.errors import DamagedCheckpointError, NonFiniteError
from rayllp.report import Journal, RunDirectory
from rayllp.report.run_lock import RunLock
from rayllp.training.checkpointing import Checkpointer
from rayllp.training.failure_budget import CopyInterval
from rayllp.training.inputs import Network, TrainingInputs
from rayllp.training.messages import describe_stage, where_not_finite
from rayllp.training.step_log import StepLog
from rayllp.training.worker_group import ElasticGroup, StepReport, WorkerGroup, WorkerShare


class RunState:
    """Keeps settings, workers' states, records and checkpoints consistent during one session of a run.

    Args:
        inputs: the network and the data.
        locks: those of the directories that the run writes to.

    Attributes:
        run_config: settings of the whole run.
        stage: the current stage of nested iteration; without nested iteration there is one stage.
        shares: each worker's share of the network, when the layers of the stage were built; empty before the workers start.
        step_log: records of the steps, and the controller.
        handled_step: the last step after which evaluation and checkpoint, if due, were done.
        copies: how often workers keep their states in memory.
    """

    def __init__(
        self, run_config: TrainConfig, run: RunDirectory, workers: WorkerGroup, checkpointer: Checkpointer, journal: Journal,
        inputs: TrainingInputs, locks: Sequence[RunLock] = (),
    ) -> None:  # fmt: skip
        self.run_config, self.run, self.workers, self.checkpointer, self.journal = run_config, run, workers, checkpointer, journal
        self._inputs, self._locks = inputs, locks
        self._size = workers.config.world
        self.stage = stage_at(run_config, 0)
        self.shares: list[WorkerShare] = []
        self.step_log = StepLog(run, journal, self.at_size(self._size))
        self.handled_step = 0
        self.copies = self._choose_copies()

    @property
    def current_config(self) -> TrainConfig:
        """Settings of the current stage, for the current number of workers."""
        return self.step_log.config

    def start_at(self, step: int) -> None:
        """Go on after `step` steps, whose state the workers have. They keep it, so that the next step can already be recovered from."""
        self.step_log.start_at(step)
        self.handled_step = step
        self.keep(step)

    def keep(self, step: int) -> None:
        """Have the workers keep in memory the state that they have after `step` steps, if this run keeps states at all."""
        if self.copies.every:
            self.workers.call("keep", step)

    def record(self, reports: Sequence[list[StepReport]]) -> int:
        """Record the steps of a chunk; return the steps done.

        Args:
            reports: for each worker (by rank), its reports of the steps that it has done.

        Raises:
            NonFiniteError: the loss or the gradient of the next step is not finite. A checkpoint from before that step is saved first.
        """
        self.step_log.record(reports)
        failed = [steps[-1] for steps in reports if steps and not steps[-1].is_finite]
        if failed:
            self._stop_before(self.step_log.step, where_not_finite(report.stats.fault for report in failed))
        return self.step_log.step

    def _stop_before(self, step: int, where: str) -> None:
        path = self.save(step)
        self.journal.event(step, "fault", reason="not finite", where=where)
        raise NonFiniteError(
            f"step {step}: the loss or the gradient is not finite; where it began: {where}. The optimizer step was not taken; the state "
            f"before it is in {path}. Look at the batch of this step, lower optimizer.lr, or lengthen optimizer.warmup"
        )

    # Checkpoints ----------------------------------------------------------------------------------------------------------------

    def save(self, step: int) -> Folder:
        """Save a checkpoint; it is complete when this returns."""
        self.check_locks()
        return self.checkpointer.save(step, self._describe())

    def begin_save(self, step: int) -> None:
        """Start a checkpoint that is written while training goes on."""
        self.check_locks()
        self.checkpointer.begin(step, self._describe())

    def check_locks(self) -> None:
        """Check that no other process has taken over a directory of this run, before anything is written to it.

        Raises:
            LockedError: another process has.
        """
        for lock in self._locks:
            lock.check()

    def _describe(self) -> dict[str, Any]:
        """Return what a checkpoint's manifest says of this state."""
        return {"controller": self.step_log.controller.state(), "model": self.current_config.model.model_dump(mode="json")}

    def restore(self, candidates: Sequence[Folder]) -> dict[str, Any] | None:
        """Give the workers the state of the newest of these checkpoints that is undamaged, or of the run's start if there are none.

        The workers get the layers of the stage that it belongs to; they are started if they have not been. Damaged checkpoints are
        reported and skipped.

        Args:
            candidates: the checkpoints, oldest first.

        Returns: the manifest of the checkpoint; None at the start.

        Raises:
            CheckpointError: all are damaged; the message is about the newest.
        """
        failures: list[DamagedCheckpointError] = []
        for folder in reversed(candidates):
            try:
                manifest = read_manifest(folder)
                self.build(step_of(folder))
                self._load(folder, manifest)
            except DamagedCheckpointError as error:
                self.checkpointer.report_damaged(folder, error)
                failures.append(error)
                continue
            step = int(manifest["step"])
            self.checkpointer.note_loaded(step)
            self._rewind_records(step)
            self.journal.event(step, "restore", path=str(folder))
            return manifest
        if failures:
            raise failures[0]
        self.build(0)
        self._rewind_records(0)
        return None

    def _load(self, folder: Folder, manifest: dict[str, Any]) -> None:
        """Load a checkpoint of this stage's network, or of the shallower network of the stage before."""
        config, prolongation = self.current_config, None
        if self.run_config.nested.factors:
            prolongation = Prolongation.between(count_layers(manifest), config, folder)
        self.workers.call("load", str(folder.absolute()), manifest["files"], prolongation)
        if prolongation is None:
            self.step_log.controller.restore(manifest["controller"])
        else:
            sizes = {"middle_layers": config.middle_layers, "step_size": config.middle_step}
            self.journal.event(manifest["step"], "deepen", layers_before=count_layers(manifest), layers=config.model.layers, **sizes)

    def _rewind_records(self, step: int) -> None:
        self.handled_step = step
        self.step_log.rewind_records(step)

    # Earlier states -------------------------------------------------------------------------------------------------------------

    def sync_records_to(self, step: int, step_reports: Callable[[int, int], Sequence[list[StepReport]]]) -> None:
        """Take records and controller to `step`, the step whose state the workers are about to go on from.

        Args:
            step_reports: returns the workers' reports of the steps in a range [start, stop), as far as they remember them.
        """
        if step > self.step_log.step:  # the workers did these steps, but the failed call lost their reports
            self.record(step_reports(self.step_log.step, step))
        elif step < self.step_log.step:
            self.step_log.rewind_with_controller(step)
            self.handled_step = min(step, self.handled_step)

    def restore_from_checkpoint_or_start(self) -> tuple[int, str]:
        """Go back to the last checkpoint, or to the start if there is none; return the step and "checkpoint" or "the start"."""
        manifest = self.restore(checkpoints(self.run.checkpoints))
        return (0, "the start") if manifest is None else (int(manifest["step"]), "checkpoint")

    # Other settings: the next stage, or another number of workers -----------------------------------------------------------------

    def build(self, step: int) -> None:
        """Give the workers the layers of the stage that contains `step`. Start the workers if they are not running.

        The stage gets a new controller, since what the old one has learnt holds for another network.
        """
        self.stage = stage_at(self.run_config, step)
        self.step_log.begin_stage(self.at_size(self._size))
        if self.workers.is_started:
            self.shares = self.workers.rebuild(self.current_config, self.network())
        else:
            self.shares = self.workers.start(self.current_config, self.network(), self._inputs.batches)

    def deepen(self, step: int) -> None:
        """Start the next stage on the same workers: build its deeper network, and initialise it from a checkpoint of the current one."""
        folder = self.save(step)
        self.build(step)
        self._load(folder, read_manifest(folder))
        self.start_at(step)
        self.journal.say(f"step {step}: {describe_stage(self.stage, self.run_config)}")

    def network(self) -> Network:
        """Return the network at the stage's depth."""
        return self._inputs.network.at_stage(self.current_config, self.run_config)

    def at_size(self, size: int) -> TrainConfig:
        """Return the stage's settings for at most `size` workers."""
        return self.stage.config.with_workers(size)

    def set_size(self, size: int) -> None:
        """Use the settings for another number of workers; `reshape` redistributes the layers accordingly."""
        self._size = size
        self.step_log.resize(self.at_size(size))
        self.copies = self._choose_copies()

    def _choose_copies(self) -> CopyInterval:
        return CopyInterval(self.current_config, elastic=isinstance(self.workers, ElasticGroup))
