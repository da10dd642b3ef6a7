"""The driver of a run: it starts the workers, calls them once per chunk of steps, and evaluates, saves and so on between chunks."""

from collections.abc import Callable, Sequence
from functools import partial

from rich.console import Console

from rayllp.checkpoint import Folder, step_of
from rayllp.checkpoint.run_metadata import write_data_json, write_model_json, write_tokenizer_json
from rayllp.config import TrainConfig
from rayllp.errors import RayllpError
from rayllp.report import Journal, Listener, RunDirectory
from rayllp.report.loggers import opened_loggers
from rayllp.report.progress import tell
from rayllp.report.run_lock import RunLock
from rayllp.training.checkpointing import Checkpointer
from rayllp.training.evaluation import Evaluator
from rayllp.training.inputs import TrainingInputs, at_full_depth
from rayllp.training.interrupt import Stopping, stopping
from rayllp.training.messages import describe_other_length, describe_run, describe_stage, note_without_pipeline
from rayllp.training.recovery import FAULTS, Recovery
from rayllp.training.resizing import Resizing
from rayllp.training.result import TrainResult
from rayllp.training.run_state import RunState
from rayllp.training.step_log import Chunk
from rayllp.training.worker_group import ElasticGroup, WorkerGroup


def train_session(
    config: TrainConfig, run: RunDirectory, workers: WorkerGroup, inputs: TrainingInputs, resume_from: Sequence[Folder] = (),
    *, console: Console | None = None, listeners: Sequence[Listener] = (), locks: Sequence[RunLock] = (),
    make_driver: "Callable[..., Driver] | None" = None,
) -> TrainResult:  # fmt: skip
    """Train to the last step, or until the user stops the run: one session of a run. The workers are shut down at the end.

    Args:
        config: the settings of the whole run.
        inputs: the network and the data.
        resume_from: checkpoints, oldest first; the newest complete one is used.
        console: where to show progress; default: standard error.
        listeners: are told what happens.
        locks: the locks on the directories that the run writes to; it ends if another process takes one over.
        make_driver: makes the driver; takes the arguments of `Driver`, which is the default.
    """
    console = console or Console(stderr=True)
    begin = step_of(resume_from[-1]) if resume_from else 0
    asked = "stopping after this chunk of steps, with a checkpoint; again to stop at once"
    run.mend()
    try:
        with (
            opened_loggers(config, run, partial(tell, console), begin) as loggers,
            Journal.open(run, config.steps, begin, console, [*listeners, *loggers]) as journal,
            stopping(partial(tell, console, asked)) as signals,
        ):
            result = (make_driver or Driver)(config, run, workers, inputs, journal, signals, locks).train(resume_from)
    except BaseException:
        run.discard_if_unused()
        raise
    finally:
        workers.shutdown()
    if result.stopped:
        tell(console, f"stopped after step {result.steps}; go on with: rayllp train --resume {run.path}")
    return result


class Driver:
    """Runs one session of a run, from its start or resumption to its end.

    Args:
        run_config: the settings of the whole run; with nested iteration, `state.current_config` has those of the current stage.
        inputs: the network and the data.
        journal: is told what happens.
        signals: tells whether the user has asked for the run to end.
        locks: as for `train_session`.

    Attributes:
        state: what the workers train and how far they are.
        resizing, recovery: None if the workers are not elastic; the first failure then ends the run.
    """

    def __init__(
        self, run_config: TrainConfig, run: RunDirectory, workers: WorkerGroup, inputs: TrainingInputs, journal: Journal,
        signals: Stopping, locks: Sequence[RunLock] = (),
    ) -> None:  # fmt: skip
        self.run_config, self.run, self.workers, self.inputs = run_config, run, workers, inputs
        self.journal, self.signals = journal, signals
        self.ends = self.stopped_early = False
        self.checkpointer = Checkpointer(run, workers, journal, run_config, inputs.record)
        self.evaluator = Evaluator(run, workers, self.checkpointer, journal, run_config.eval, inputs, lambda: self.stop)
        self.state = RunState(run_config, run, workers, self.checkpointer, journal, inputs, locks)
        self.resizing: Resizing | None = None
        self.recovery: Recovery | None = None
        if isinstance(workers, ElasticGroup):
            self.resizing = Resizing(self.state, workers)
            self.recovery = Recovery(self.state, workers, self.resizing)

    @property
    def stop(self) -> bool:
        """True if the run is to end after the current chunk, with a checkpoint: by a signal, or because `ends` was set."""
        return self.ends or self.signals.number is not None

    def train(self, resume_from: Sequence[Folder] = ()) -> TrainResult:
        """Train to the last step, or until the run is stopped; `resume_from` is as for `train_session`."""
        with self.signals.at_once():  # an interrupted start leaves nothing behind
            step = self._begin(list(resume_from))
        step, final, sample = self._train_through_faults(step)
        loss = final.pop("loss", None)
        return TrainResult(
            directory=self.run.path, steps=step, validation_loss=loss, metrics=final, sample=sample, stopped=self.stop,
            signal=self.signals.number, stopped_early=self.stopped_early,
        )  # fmt: skip

    # The start ------------------------------------------------------------------------------------------------------------------

    def _begin(self, candidates: list[Folder]) -> int:
        """Start the workers, load the newest undamaged one of these checkpoints, and return how many steps are done."""
        while True:
            try:
                manifest = self.state.restore(candidates)
                break
            except FAULTS as error:
                if self.recovery is None:
                    raise
                self.recovery.start_anew(step_of(candidates[-1]) if candidates else 0, error)
        step = self.state.step_log.step
        self.state.check_locks()
        write_model_json(self.run.path, at_full_depth(self.state.shares[0]["network"], self.run_config))
        write_tokenizer_json(self.run.path, self.inputs.data_set)
        write_data_json(self.run.path, self.inputs.record)
        self._say_changes(step)
        self.journal.say(self._describe())
        before = manifest.get("config", {}).get("steps") if manifest is not None else None
        if before not in (None, self.run_config.steps):
            self.journal.say(describe_other_length(self.run_config, before, step))
        if note := note_without_pipeline(self.state.current_config):
            self.journal.say(note)
        return step

    def _say_changes(self, step: int) -> None:
        """Report if the data differ from those that the run began with. Losses on different validation data cannot be compared."""
        changed = self.inputs.changed
        if changed:
            self.journal.event(step, "data", changed=list(changed))
            self.journal.say(f"step {step}: WARNING: the data have changed since the run began: {', '.join(changed)}")
        if "validation" in changed:
            self.checkpointer.forget_best()

    def _describe(self) -> str:
        config, model, data = self.state.current_config, self.inputs.network.architecture, self.inputs.data_set
        network = config.model.family if model is None else type(model).__name__
        parameters = sum(share["parameters"] for share in self.state.shares) // config.mesh.data
        left_out = {} if data is None else data.skipped
        line = describe_run(config, network, parameters, self.workers.device, self.run.path, left_out)
        return f"{line}; {describe_stage(self.state.stage, self.run_config)}" if self.run_config.nested.factors else line

    # Training ---------------------------------------------------------------------------------------------------------------------

    def _train_through_faults(self, step: int) -> tuple[int, dict[str, float], str]:
        """Train to the end, recovering from failures; return the steps done, the metrics of the last evaluation, and a sample."""
        try:
            self.state.start_at(step)
        except FAULTS as error:
            step = self._recover(error)
        while True:
            try:
                return self._train_to_the_end(step)
            except FAULTS as error:
                step = self._recover(error)

    def _recover(self, error: RayllpError) -> int:
        if self.recovery is None:
            raise error
        self.stopped_early = False  # evaluations after the step that the run returns to are repeated
        return self.recovery.recover(error)

    def _train_to_the_end(self, step: int) -> tuple[int, dict[str, float], str]:
        step = self._train_stages(step)
        self.state.save(step)  # save before the final evaluation, which may take long and be interrupted
        final, sample = ({}, "") if self.stop else self._evaluate_at_the_end(step)
        self.state.save(step)
        self._say_gain(step)
        self.journal.end(step, final, sample)
        return step, final, sample

    def _evaluate_at_the_end(self, step: int) -> tuple[dict[str, float], str]:
        """Return what `Evaluator.finish` finds, or nothing if it is interrupted.

        Interrupting it at once is safe with elastic workers: the state is saved, and they need not finish their call.
        """
        if not isinstance(self.workers, ElasticGroup):
            return self.evaluator.finish(step)
        try:
            with self.signals.at_once():
                return self.evaluator.finish(step)
        except KeyboardInterrupt:
            self.ends = True
            return {}, ""

    def _say_gain(self, step: int) -> None:
        """Report how much faster this session was with layer-parallel steps than with exact ones alone."""
        step_log = self.state.step_log
        gain = step_log.times.gain
        if gain.steps and self.run_config.mode == "adaptive":
            self.journal.event(step, "gain", **gain.as_dict())
            self.journal.say(gain.sentence(step_log.why_exact))

    def _train_stages(self, step: int) -> int:
        """Train the remaining stages of nested iteration, or the one stage of a run without it; return the steps done."""
        while True:
            step = self._loop(step)
            if self.stop or self.stopped_early or step >= self.run_config.steps:
                return step
            self.state.deepen(step)

    def _loop(self, step: int) -> int:
        """Train chunk by chunk to the end of the stage, or until the run is stopped; return the steps done."""
        state, step_log = self.state, self.state.step_log
        while True:
            if step > state.handled_step:
                self._between_chunks(step)
                state.handled_step = step
            if step >= state.stage.end or self.stop or self.stopped_early:
                return step
            chunk = self._next_chunk(step)
            reports = self.workers.call("run", chunk, state.copies.every, timeout_s=step_log.expect(chunk))
            step_log.note_time()
            state.check_locks()
            step = state.record(reports)
            if self.recovery is not None:
                self.recovery.prepare()

    def _next_chunk(self, step: int) -> Chunk:
        """Let the number of workers and the controller change; return the steps that come next."""
        if self.resizing is not None:
            self.resizing.adapt(step)
        self.state.step_log.begin(step)
        return self.state.step_log.next_chunk(step, self.state.stage.end)

    def _between_chunks(self, step: int) -> None:
        """Evaluate and save if either is due after this chunk. After the last step, `_train_to_the_end` does both."""
        if step < self.run_config.steps:
            if self.evaluator.is_due(step):
                self.evaluator.evaluate(step)
                self._lose_patience(step)
            if self.checkpointer.is_wanted(step):
                self.state.begin_save(step)
        self.checkpointer.poll()

    def _lose_patience(self, step: int) -> None:
        """Stop early if the last `eval.patience` evaluations were no better than the best one before."""
        best = self.run.best_of_patience(self.run_config.eval)
        if best is not None and not self.stop:
            self.stopped_early = True
            patience = self.run_config.eval.patience
            reason = f"{patience} evaluations in a row were no better than {best['loss']:.4f} after step {best['step']}"
            self.journal.event(step, "stop", reason=reason)
            self.journal.say(f"step {step}: stopped early: {reason}")
