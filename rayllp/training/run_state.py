"""The state of a run: what its workers train, how far they are, and the ways to an earlier state, a checkpoint or the next stage."""

from collections.abc import Callable, Sequence
from typing import Any

from rayllp.checkpoint import Folder, checkpoints, count_layers, read_manifest, step_of
from rayllp.config import TrainConfig
from rayllp.config.nested import stage_at
from rayllp.errors import DamagedCheckpointError, NonFiniteError
from rayllp.report import Journal, RunDirectory
from rayllp.training.checkpointing import Checkpointer
from rayllp.training.failure_budget import CopyInterval
from rayllp.training.messages import describe_stage, where_not_finite
from rayllp.training.result import Network
from rayllp.training.step_log import StepLog
from rayllp.training.worker_group import ElasticGroup, StepReport, WorkerGroup


class RunState:
    """Keeps settings, workers' states, records and checkpoints consistent during one session of a run.

    Args:
        network: the network at the run's full depth.

    Attributes:
        run_config: settings of the whole run.
        stage: the current stage of nested iteration; without nested iteration there is one stage.
        current_config: settings of that stage, for the current number of workers.
        step_log: records of the steps, and the controller.
        handled_step: the last step after which evaluation and checkpoint, if due, were done.
        copies: how often workers keep their states in memory.
    """

    def __init__(
        self, run_config: TrainConfig, run: RunDirectory, workers: WorkerGroup, checkpointer: Checkpointer, journal: Journal,
        network: Network,
    ) -> None:  # fmt: skip
        self.run_config, self.run, self.workers, self.checkpointer, self.journal = run_config, run, workers, checkpointer, journal
        self._network = network
        self._size = workers.config.world
        self.stage = stage_at(run_config, 0)
        self.current_config = self.at_size(self._size)
        self.step_log = StepLog(run, journal, self.current_config)
        self.handled_step = 0
        self.copies = self._choose_copies()

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
            f"step {step}: the loss or the gradient is not finite; first at fault: {where}. The optimizer step was not taken; the state "
            f"before it is in {path}. Look at the batch of this step, lower optimizer.lr, or lengthen optimizer.warmup"
        )

    # Checkpoints ----------------------------------------------------------------------------------------------------------------

    def save(self, step: int) -> Folder:
        """Save a checkpoint; it is complete when this returns."""
        return self.checkpointer.save(step, self.step_log.controller.state(), self.journal)

    def begin_save(self, step: int) -> None:
        """Start a checkpoint that is written while training goes on."""
        self.checkpointer.begin(step, self.step_log.controller.state(), self.journal)

    def _restore_from(self, folder: Folder, manifest: dict[str, Any]) -> int:
        """Load a checkpoint into the workers and reset the records to its step; return the steps done."""
        self._load(folder, manifest)
        step = self.handled_step = int(manifest["step"])
        self.checkpointer.note_loaded(step)
        self.step_log.rewind_records(step)
        self.journal.event(step, "restore", path=str(folder))
        return step

    def restore_from_newest(self, candidates: Sequence[Folder], newest: tuple[Folder, dict[str, Any]], *, built: bool) -> int:
        """Load the newest of these checkpoints that is undamaged; return the steps done.

        Args:
            candidates: the checkpoints, oldest first.
            newest: the checkpoint to try first, and its manifest, as returned by `Checkpointer.read_newest`.
            built: True if the workers have the layers of the stage that this checkpoint belongs to.

        Raises:
            CheckpointError: all are damaged; the message is about the newest.
        """
        first: DamagedCheckpointError | None = None
        while True:
            folder, manifest = newest
            if not built:
                self._rebuild(step_of(folder))
            try:
                return self._restore_from(folder, manifest)
            except DamagedCheckpointError as error:
                self.checkpointer.report_damaged(folder, error, self.journal)
                first, candidates, built = first or error, candidates[: candidates.index(folder)], False
                if not candidates:
                    raise first from None
                newest = self.checkpointer.read_newest(list(candidates), self.journal)

    def _load(self, folder: Folder, manifest: dict[str, Any]) -> None:
        """Load a checkpoint of this stage's network, or of the shallower network of the stage before."""
        prolongation, config = self.checkpointer.load(folder, manifest, nested=bool(self.run_config.nested.factors)), self.current_config
        if prolongation is None:
            self.step_log.controller.restore(manifest["controller"])
        else:
            sizes = {"middle_layers": config.middle_layers, "step_size": config.middle_step}
            self.journal.event(manifest["step"], "deepen", layers_before=count_layers(manifest), layers=config.model.layers, **sizes)

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
        candidates = checkpoints(self.run.checkpoints)
        if candidates:
            newest = self.checkpointer.read_newest(candidates, self.journal)
            return self.restore_from_newest(candidates, newest, built=False), "checkpoint"
        self._rebuild(0)
        self.step_log.rewind_records(0)
        self.handled_step = 0
        return 0, "the start"

    # Other settings: the next stage, or another number of workers -----------------------------------------------------------------

    def enter_stage(self, step: int) -> None:
        """Use the settings of the stage that contains `step`, with a new controller, since what it has learnt holds for another network."""
        self.stage = stage_at(self.run_config, step)
        self.current_config = self.workers.config = self.checkpointer.config = self.at_size(self._size)
        self.step_log.enter(self.current_config)

    def deepen(self, step: int) -> None:
        """Start the next stage on the same workers: build its deeper network, and initialise it from a checkpoint of the current one."""
        folder = self.save(step)
        self._rebuild(step)
        self._load(folder, read_manifest(folder))
        self.start_at(step)
        self.journal.say(f"step {step}: {describe_stage(self.stage, self.run_config)}")

    def _rebuild(self, step: int) -> None:
        """Give the same workers the layers of the stage that contains `step`."""
        self.enter_stage(step)
        self.workers.rebuild(self.current_config, self.network())

    def network(self) -> Network:
        """Return the network at the stage's depth."""
        return self._network.at_stage(self.current_config, self.run_config)

    def at_size(self, size: int) -> TrainConfig:
        """Return the stage's settings for at most `size` workers."""
        return self.stage.config.with_workers(size)

    def set_size(self, size: int) -> None:
        """Use the settings for another number of workers; `reshape` redistributes the layers accordingly."""
        self._size = size
        self.current_config = self.checkpointer.config = self.step_log.config = self.at_size(size)
        self.step_log.first_step = self.step_log.step
        self.copies = self._choose_copies()

    def _choose_copies(self) -> CopyInterval:
        return CopyInterval(self.current_config, elastic=isinstance(self.workers, ElasticGroup))
