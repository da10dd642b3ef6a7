"""A trial of a sweep: it trains as `rayllp train` does, in the trial's own placement group, and reports to Tune at each evaluation."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup
from rich.console import Console

from rayllp.checkpoint import Folder, checkpoints, locate, remove, step_of
from rayllp.cluster.actor_pool import ActorPool
from rayllp.cluster.ray_group import RayGroup
from rayllp.config import TrainConfig, load_run_config
from rayllp.control import Controller
from rayllp.errors import CheckpointError, NonFiniteError
from rayllp.models import FAMILIES, Family
from rayllp.plan import Costs, predict_step
from rayllp.report import RunDirectory, read_lines
from rayllp.training.driver import Driver, train_session
from rayllp.training.prepare import load_inputs, validate
from rayllp.tuning.reporter import Reporter, Step
from rayllp.tuning.sweep import Sweep

POINTER = "rayllp.json"
"""The file in Tune's checkpoint of a trial, which says where the run and the run's own checkpoint are."""
LEAVE_S = 30
"""Seconds that a stopped trial has to release its workers before its process gets the next trial. Tune's default of 2 s may be too few."""

_pool: ActorPool | None = None
"""Worker processes of the last trial in this process. Tune reuses a trial's process and placement group for the next similar trial."""


class TrialDriver(Driver):
    """Trains a trial: it reports to Tune, and ends when the trial's budget is used up.

    Args:
        reporter: collects what is reported.
    """

    def __init__(self, reporter: Reporter, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.reporter = reporter

    def _between_chunks(self, step: int) -> None:
        super()._between_chunks(step)
        over = self.reporter.is_exhausted
        if over and self.evaluator.last != step:
            self.evaluator.evaluate(step)
        if self.evaluator.last == step and step < self.run_config.steps:
            # Tune may end this process in report(), so the checkpoint that it would resume from must be complete before.
            report(self.reporter.report(), self.state.save(step), self.run)
        self.ends = self.ends or over


def train_trial(
    choices: dict[str, Any],
    *,
    sweep: Sweep,
    working_directory: str,
    output: str,
    data: Any,
    costs: Costs | None,
    families: dict[str, Family | str],
) -> None:
    """Run a trial; this is Tune's trainable.

    Args:
        choices: the trial's config: "settings" has the values of the settings that vary.
        sweep: the sweep.
        working_directory: working directory of the sweep's driver, where its relative paths start.
        output: the sweep's directory.
        data: the data set, if all trials share it; else None.
        costs: measured costs of a layer, if step times are predicted; else None.
        families: the model families by name.
    """
    # Tune has changed to a folder of its own. On a node without the driver's folder, paths in the sweep have to be absolute.
    with contextlib.suppress(OSError):
        os.chdir(working_directory)
    FAMILIES.update(families)
    trial = str(tune.get_context().get_trial_id())
    config = apart(sweep.config(choices["settings"]), trial)
    path = Path(output) / "trials" / trial
    run, resume_from = _open(path, config)
    reporter = Reporter(sweep.objective, _predictor(sweep, config, costs))
    done = step_of(resume_from[-1]) if resume_from else 0  # later steps will be done again
    metrics, events, evaluations = (read_lines(path / f"{name}.jsonl") for name in ("metrics", "events", "evals"))
    evaluations = [e for e in evaluations if e["step"] <= done]
    reporter.resume([m for m in metrics if m["step"] < done], [e for e in events if e["step"] < done], evaluations)
    if done == config.steps and evaluations and evaluations[-1]["step"] == done:  # the trial had finished, but Tune was not told
        tune.report(reporter.report())
        return
    pool = _pool_for(config, get_current_placement_group(), 1 if sweep.driver_cpus else 0)
    # What the sweep has checked is not checked again: the check alone would import transformers, which takes seconds.
    inputs = load_inputs(config, run, resume_from, data) if data is not None else validate(config, run=run, resume_from=resume_from)
    workers = RayGroup.for_run(config, run.path, pool.device, pool)
    try:
        train_session(
            config, run, workers, inputs, resume_from, console=Console(quiet=True), listeners=[reporter],
            make_driver=partial(TrialDriver, reporter),
        )  # fmt: skip
    except NonFiniteError as error:
        (path / "diverged.txt").write_text(f"{error}\n", encoding="utf-8")
        tune.report(reporter.report(diverged=True))
        return
    tune.report(reporter.report())


def apart(config: TrainConfig, trial: str) -> TrainConfig:
    """Return the settings with a path for this trial's checkpoints below that of the sweep, so that trials do not share one."""
    path = config.checkpoint.path
    if path is None:
        return config
    checkpoint = config.checkpoint.model_copy(update={"path": f"{path.rstrip('/')}/{trial}"})
    return config.model_copy(update={"checkpoint": checkpoint})


def report(result: dict[str, Any], checkpoint: Folder, run: RunDirectory) -> None:
    """Report to Tune, with a checkpoint that says where the run's own checkpoint is."""
    with tempfile.TemporaryDirectory() as folder:
        pointer = {"run": str(run.path.absolute()), "checkpoint": str(checkpoint.absolute())}
        (Path(folder) / POINTER).write_text(json.dumps(pointer), encoding="utf-8")
        tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))


def _open(path: Path, config: TrainConfig) -> tuple[RunDirectory, list[Folder]]:
    """Return the trial's run directory, and the checkpoints to resume from.

    They are the trial's own, or in population based training those of a better trial that Tune lets this one continue.
    """
    offered = tune.get_checkpoint()
    pointer: dict[str, str] = {}
    if offered is not None:
        with offered.as_directory() as folder:
            pointer = json.loads((Path(folder) / POINTER).read_text(encoding="utf-8"))
    if not (path / "config.yaml").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        run, own = RunDirectory.create(path, config), []
    else:
        before = load_run_config(path)
        run = RunDirectory(path, config)
        if before != config:
            run.change_settings(before, config)
        own = checkpoints(run.checkpoints)
    if pointer and pointer["run"] != str(path.absolute()):
        return run, take_over(run, own, locate(pointer["checkpoint"]))
    return run, own


def take_over(run: RunDirectory, own: list[Folder], checkpoint: Folder) -> list[Folder]:
    """Continue from another trial's checkpoint (population based training). This trial's own later checkpoints are removed.

    Args:
        run: this trial's run.
        own: this trial's checkpoints.
        checkpoint: the other trial's checkpoint.

    Returns: the other trial's checkpoint; if it has been removed meanwhile, the next later one.

    Raises:
        CheckpointError: the other trial has no such checkpoint any more.
    """
    later = [folder for folder in checkpoints(checkpoint.parent) if step_of(folder) >= step_of(checkpoint)]
    if not later:
        raise CheckpointError(
            f"{checkpoint.parent} has no checkpoint of step {step_of(checkpoint)} or later any more: raise checkpoint.keep"
        )
    for stale in own:
        if step_of(stale) > step_of(later[0]):
            remove(stale)
    run.forget_best()
    return later[:1]


def _predictor(sweep: Sweep, config: TrainConfig, costs: Costs | None) -> Callable[[Step], float] | None:
    """Return what predicts a trial's steps on the sweep's cluster; None if they are measured instead."""
    large = sweep.enlarged(config)
    if large is None or costs is None:
        return None
    chosen = Controller(large).chosen
    return lambda step: predict_step(large, replace(chosen, serial=step.exact), costs, sweeps=step.sweeps)


def _pool_for(config: TrainConfig, group: PlacementGroup, first_bundle: int) -> ActorPool:
    global _pool
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(LEAVE_S))
    if _pool is None or _pool.group.id != group.id:
        device = "cuda" if any(bundle.get("GPU") for bundle in group.bundle_specs) else "cpu"
        _pool = ActorPool(config.world, device, group, first_bundle, lasting=True)
    return _pool
