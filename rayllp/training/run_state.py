"""The state of a run: what its workers train, how far they are, and the ways to an earlier state, a checkpoint or the next stage."""

from collections.abc import Callable, Sequence
from typing import Any

from rayllp.checkpoint import Folder, checkpoints, count_layers, read_manifest, step_of
from rayllp.config import TrainConfig
from rayllp.config.nested import stage_at
from rayllp.errors import DamagedCheckpointError, NonFiniteError
from rayllp.report import Journal, RunDirectory
from rayllp.training.checkpointing import Saver
from rayllp.training.failure_budget import CopyInterval
from rayllp.training.messages import describe_stage, where_not_finite
from rayllp.training.result import Network
from rayllp.training.step_log import StepLog
from rayllp.training.worker_group import ElasticGroup, WorkerGroup

Answers = Sequence[list[dict[str, Any]]]
"""For each worker (by rank), the statistics of the steps that it has done."""


class RunState:
    """Keeps settings, workers' states, records and checkpoints consistent during one session of a run.

    Args:
        network: the network at the run's full depth.

    Attributes:
        whole: settings of the whole run.
        stage: the current stage of nested iteration; without nested iteration there is one stage.
        config: settings of the stage for the current number of workers.
        step_log: records of the steps, and the controller.
        settled: the last step after which evaluation and checkpoint, if due, were done.
        copies: how often workers keep their states in memory.
    """

    def __init__(
        self, whole: TrainConfig, run: RunDirectory, workers: WorkerGroup, saver: Saver, journal: Journal, network: Network,
    ) -> None:  # fmt: skip
        self.whole, self.run, self.workers, self.saver, self.journal = whole, run, workers, saver, journal
        self._network = network
        self._size = workers.config.world
        self.stage = stage_at(whole, 0)
        self.config = self.at_size(self._size)
        self.step_log = StepLog(run, journal, self.config)
        self.settled = 0
        self.copies = self._choose_copies()

    def start_at(self, step: int) -> None:
        """Go on after `step` steps, whose state the workers have. They keep it, so that the next step can already be recovered from."""
        self.step_log.start_at(step)
        self.settled = step
        self.keep(step)

    def keep(self, step: int) -> None:
        """Have the workers keep in memory the state that they have after `step` steps, if this run keeps states at all."""
        if self.copies.every:
            self.workers.call("keep", step)

    def take_in(self, answers: Answers) -> int:
        """Record what the steps of a chunk did; return the steps done.

        Raises:
            NonFiniteError: the loss or the gradient of the next step is not finite. A checkpoint from before that step is saved first.
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
        """Save a checkpoint; it is complete when this returns."""
        return self.saver.save(step, self.step_log.controller.state(), self.journal)

    def begin_save(self, step: int) -> None:
        """Start a checkpoint that is written while training goes on."""
        self.saver.begin(step, self.step_log.controller.state(), self.journal)

    def restore(self, folder: Folder, manifest: dict[str, Any]) -> int:
        """Load a checkpoint into the workers and reset the records to its step; return the steps done."""
        self._load(folder, manifest)
        step = self.settled = int(manifest["step"])
        self.saver.restored(step)
        self.step_log.restart(step)
        self.journal.event(step, "restore", path=str(folder))
        return step

    def restore_newest(self, found: Sequence[Folder], newest: tuple[Folder, dict[str, Any]], *, built: bool) -> int:
        """Load the newest of these checkpoints that is undamaged; return the steps done.

        Args:
            found: the checkpoints, oldest first.
            newest: the checkpoint to try first, and its manifest, as returned by `Saver.read_newest`.
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
                return self.restore(folder, manifest)
            except DamagedCheckpointError as error:
                self.saver.pass_over(folder, error, self.journal)
                first, found, built = first or error, found[: found.index(folder)], False
                if not found:
                    raise first from None
                newest = self.saver.read_newest(list(found), self.journal)

    def _load(self, folder: Folder, manifest: dict[str, Any]) -> None:
        """Load a checkpoint of this stage's network, or of the shallower network of the stage before."""
        prolongation, config = self.saver.load(folder, manifest, nested=bool(self.whole.nested.factors)), self.config
        if prolongation is None:
            self.step_log.controller.restore(manifest["controller"])
        else:
            sizes = {"middle_layers": config.middle_layers, "step_size": config.middle_step}
            self.journal.event(manifest["step"], "deepen", layers_before=count_layers(manifest), layers=config.model.layers, **sizes)

    # Earlier states -------------------------------------------------------------------------------------------------------------

    def agree_on(self, step: int, report: Callable[[int, int], Answers]) -> None:
        """Take records and controller to `step`, the step whose state the workers are about to go on from.

        Args:
            report: returns the workers' statistics of the steps in a range [start, stop), as far as they remember them.
        """
        if step > self.step_log.step:  # the workers did these steps, but the failed call lost their statistics
            self.take_in(report(self.step_log.step, step))
        elif step < self.step_log.step:
            self.step_log.rewind(step)
            self.settled = min(step, self.settled)

    def take_back_from_disk(self) -> tuple[int, str]:
        """Go back to the last checkpoint, or to the start if there is none; return the step and "checkpoint" or "the start"."""
        found = checkpoints(self.run.checkpoints)
        if found:
            return self.restore_newest(found, self.saver.read_newest(found, self.journal), built=False), "checkpoint"
        self._rebuild(0)
        self.step_log.restart(0)
        self.settled = 0
        return 0, "the start"

    # Other settings: the next stage, or another number of workers -----------------------------------------------------------------

    def enter_stage(self, step: int) -> None:
        """Use the settings of the stage that contains `step`, with a new controller, since what it has learnt holds for another network."""
        self.stage = stage_at(self.whole, step)
        self.config = self.workers.config = self.saver.settings = self.at_size(self._size)
        self.step_log.enter(self.config)

    def deepen(self, step: int) -> None:
        """Start the next stage on the same workers: build its deeper network, and initialise it from a checkpoint of the current one."""
        folder = self.save(step)
        self._rebuild(step)
        self._load(folder, read_manifest(folder))
        self.start_at(step)
        self.journal.say(f"step {step}: {describe_stage(self.stage, self.whole)}")

    def _rebuild(self, step: int) -> None:
        """Give the same workers the layers of the stage that contains `step`."""
        self.enter_stage(step)
        self.workers.rebuild(self.config, self.network())

    def network(self) -> Network:
        """Return the network at the stage's depth."""
        return self._network.at_stage(self.config, self.whole)

    def at_size(self, size: int) -> TrainConfig:
        """Return the stage's settings for at most `size` workers."""
        return self.stage.config.with_workers(size)

    def set_size(self, size: int) -> None:
        """Use the settings for another number of workers; `reshape` redistributes the layers accordingly."""
        self._size = size
        self.config = self.saver.settings = self.step_log.config = self.at_size(size)
        self.step_log.first_step = self.step_log.step
        self.copies = self._choose_copies()

    def _choose_copies(self) -> CopyInterval:
        return CopyInterval(self.config, there=isinstance(self.workers, ElasticGroup))
