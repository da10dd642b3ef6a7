"""A run's checkpoints. The workers write them in the background, the driver commits them, and any number of workers can read them back."""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from rayllp.checkpoint import Folder, commit, staging, step_of
from rayllp.checkpoint.location import remove
from rayllp.config import TrainConfig
from rayllp.data.record import DataRecord
from rayllp.errors import CheckpointError
from rayllp.report import Journal, RunDirectory
from rayllp.training.worker_group import WorkerGroup


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that the workers are still writing.

    Attributes:
        step: optimizer steps done when its state was copied.
        folder: the staging folder that the workers write to.
        extra: what the manifest says besides the files: the controller's state, the network, the settings and the record of the data.
        best: the evaluation that made this the best checkpoint so far, as `Checkpointer.best`; None if it is not the best.
    """

    step: int
    folder: Folder
    extra: dict[str, Any]
    best: dict[str, Any] | None


class Checkpointer:
    """Writes and reads the checkpoints of a run.

    Args:
        config: settings of the whole run.
        record: describes the run's data; it is stored in each checkpoint.

    Attributes:
        best: "step", "loss" and number of "batches" of the best evaluation so far; None before the first one.
        saved: step of the last complete checkpoint that this session wrote or loaded; -1 if there is none.
    """

    def __init__(
        self, run: RunDirectory, workers: WorkerGroup, journal: Journal, config: TrainConfig, record: DataRecord | None = None
    ) -> None:
        self._run_metadata = {"config": config.model_dump(mode="json"), "data": None if record is None else record.as_dict()}
        self.run, self.workers, self._journal, self._settings = run, workers, journal, config.checkpoint
        self.best: dict[str, Any] | None = run.read_best()
        self.saved = -1
        self._new_best: dict[str, Any] | None = None
        self._pending: PendingCheckpoint | None = None
        self._overdue, self._why = False, ""
        self._last_began = time.monotonic()

    # Writing --------------------------------------------------------------------------------------------------------------------

    def begin(self, step: int, trained: dict[str, Any]) -> None:
        """Have the workers copy their states now and write the copies while training goes on.

        If the checkpoint of this step is complete or being written already, only note that it is the best one, where it is.

        Args:
            trained: what the manifest says of the state: "controller" (its state) and "model" (the settings of the trained network).
        """
        if step == self.saved:
            self._mark_best(self._new_best)
            self._new_best = None
            return
        if self._pending is not None and self._pending.step == step:
            self._pending, self._new_best = replace(self._pending, best=self._new_best or self._pending.best), None
            return
        self.finish()
        self._overdue, self._last_began = False, time.monotonic()
        try:
            folder = staging(self.run.checkpoints, step)
        except Exception as error:  # on remote storage each fsspec implementation raises errors of its own
            self._failed(step, str(error))
            return
        self.workers.call("begin_save", str(folder.absolute()))
        self._pending, self._new_best = PendingCheckpoint(step, folder, trained | self._run_metadata, self._new_best), None

    def poll(self) -> None:
        """Commit the pending checkpoint if all workers have written their files. Does not block."""
        if self._pending is not None and all(self.workers.call("has_saved")):
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint and commit it. If it cannot be written, report that; it is tried again after the next chunk."""
        pending = self._pending
        files: dict[str, Any] = {}
        if pending is None:
            return
        try:
            for files_of_worker in self.workers.call("finish_save"):
                files |= files_of_worker
            best = pending.best or self.best
            final = self._commit(pending, files, int(best["step"]) if best else None)
        except CheckpointError as error:
            self.abandon()
            self._failed(pending.step, str(error))
            return
        self._pending = None
        self.saved = pending.step
        self._journal.event(pending.step, "checkpoint", path=str(final))
        self._mark_best(pending.best)

    def _commit(self, pending: PendingCheckpoint, files: dict[str, Any], best: int | None) -> Folder:
        try:
            return commit(pending.folder, pending.step, files, pending.extra, self._settings.keep, best)
        except Exception as error:  # on remote storage each fsspec implementation raises errors of its own
            raise CheckpointError(str(error)) from error

    def save(self, step: int, trained: dict[str, Any]) -> Folder:
        """Write a checkpoint, wait until it is complete, and return its folder.

        Args:
            trained: as for `begin`.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.begin(step, trained)
        self.finish()
        if self.saved != step:
            raise CheckpointError(
                f"step {step}: its checkpoint cannot be written below {self.run.checkpoints}: {self._why}. Make room or make the path "
                "writable, and go on with --resume from the last complete one"
            )
        return self.run.checkpoints / f"step_{step}"

    def note_loss(self, step: int, loss: float, batches: int) -> None:
        """Note a validation loss. If it is the best so far, `is_wanted` asks for a checkpoint of this step.

        Only losses over the same number of batches are compared. A last evaluation over more batches is therefore never the best, unless it
        is the only one.
        """
        # The best evaluation so far may be one whose checkpoint has not been started, or is still being written.
        best = self._new_best or (self._pending.best if self._pending is not None else None) or self.best
        if self._settings.best and math.isfinite(loss) and (best is None or (best["batches"] == batches and loss < best["loss"])):
            self._new_best = {"step": step, "loss": loss, "batches": batches}

    def is_wanted(self, step: int) -> bool:
        """True if a checkpoint of `step` is due: by the number of steps, by time, as the best so far, or because the last one failed."""
        every, minutes = self._settings.every, self._settings.minutes
        late = bool(minutes) and time.monotonic() - self._last_began >= 60 * minutes
        return self._overdue or late or self._new_best is not None or (bool(every) and step % every == 0)

    def _mark_best(self, best: dict[str, Any] | None) -> None:
        if best is not None:
            self.best = best
            self.run.write_best(best)

    def abandon(self) -> None:
        """Give up the pending checkpoint, if there is one (a worker was lost, or it cannot be written), and ask for another."""
        if self._pending is not None:
            remove(self._pending.folder)
            self._pending, self._overdue = None, True

    def _failed(self, step: int, why: str) -> None:
        self._overdue, self._why = True, why
        self._journal.event(step, "fault", reason=f"checkpoint not written: {why}")
        self._journal.say(f"step {step}: WARNING: the checkpoint could not be written ({why}); training goes on, and it is tried again")

    # Reading --------------------------------------------------------------------------------------------------------------------

    def report_damaged(self, folder: Folder, error: CheckpointError) -> None:
        """Report a checkpoint that cannot be used."""
        self._journal.event(step_of(folder), "fault", reason=f"damaged checkpoint: {error}")
        self._journal.say(f"WARNING: {error}; trying the one before")

    def note_loaded(self, step: int) -> None:
        """Note that the checkpoint of `step` was loaded. Forget the best evaluation if it came later or its checkpoint is gone."""
        self.saved = step
        if self.best is not None and (self.best["step"] > step or not (self.run.checkpoints / f"step_{self.best['step']}").is_dir()):
            self.forget_best()

    def forget_best(self) -> None:
        """Forget the best evaluation: the next one is the best so far."""
        self.best = None
        self.run.forget_best()
