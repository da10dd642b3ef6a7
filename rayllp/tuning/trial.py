"""One trial: the driver loop of `rayllp train`, in the trial's own placement group, reporting to Tune at each evaluation."""

import contextlib
import json
import os
import tempfile
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
from rayllp.models import FAMILIES
from rayllp.plan import Costs, predict_step
from rayllp.report import RunDirectory, read_lines
from rayllp.training.driver import Driver
from rayllp.training.prepare import load_known, validate
from rayllp.tuning.reporter import Reporter
from rayllp.tuning.sweep import Sweep

POINTER = "rayllp.json"
"""Tune's checkpoint of a trial: where its run is, which has its own."""
LEAVE_S = 30
"""A trial that was stopped lets its workers go before the next one takes its process; Tune's own limit of 2 s may be too short for that."""

_pool: ActorPool | None = None
"""The workers' processes of this one's last trial: Tune reuses a trial's process, with its placement group, for the next one like it."""


class TrialDriver(Driver):
    """Reports, and ends when the trial's budget is used up."""

    reporter: Reporter

    def _between_chunks(self, step: int) -> None:
        super()._between_chunks(step)
        over = self.reporter.is_exhausted
        if over and self.evaluator.last != step:
            self.evaluator.evaluate(step, self.journal)
        if self.evaluator.last == step and step < self.whole.steps:
            # Tune may end this process in report(): what it is to go on from must be complete.
            report(self.reporter.report(), self.state.save(step), self.run)
        self.stop = self.stop or over


def train_trial(
    choices: dict[str, Any], *, sweep: Sweep, here: str, output: str, data: Any, costs: Costs | None, families: dict[str, str]
) -> None:
    """Tune's trainable.

    Args:
        here: the folder that the sweep's relative paths start from.
    """
    with contextlib.suppress(OSError):  # Tune has gone to a folder of its own; on a node without this one, paths have to be absolute
        os.chdir(here)
    FAMILIES.update(families)
    trial = str(tune.get_context().get_trial_id())
    config = apart(sweep.config(choices["settings"]), trial)
    path = Path(output) / "trials" / trial
    run, found = _open(path, config)
    reporter = Reporter(sweep.objective, _predict(sweep, config, costs))
    done = step_of(found[-1]) if found else 0  # what came after is done again
    metrics, events, evaluations = (read_lines(path / f"{name}.jsonl") for name in ("metrics", "events", "evals"))
    evaluations = [e for e in evaluations if e["step"] <= done]
    reporter.resume([m for m in metrics if m["step"] < done], [e for e in events if e["step"] < done], evaluations)
    if done == config.steps and evaluations and evaluations[-1]["step"] == done:  # all was done, but Tune was not told any more
        tune.report(reporter.report())
        return
    pool = _pool_for(config, get_current_placement_group(), 1 if sweep.driver_cpus else 0)
    # What the sweep has checked with its data is not checked again: that alone would need transformers, whose import takes seconds.
    loaded = load_known(config, run, found, data) if data is not None else validate(config, None, None, run, found)
    workers = RayGroup.for_run(config, run.path, pool.device, pool)
    driver = TrialDriver(config, run, workers, None, None, loaded, Console(quiet=True), [reporter])
    driver.reporter = reporter
    try:
        driver.train(found)
    except NonFiniteError as error:
        (path / "diverged.txt").write_text(f"{error}\n", encoding="utf-8")
        tune.report(reporter.report(diverged=True))
        return
    tune.report(reporter.report())


def apart(config: TrainConfig, trial: str) -> TrainConfig:
    """A trial's settings with a place for its checkpoints that no other trial has, below the one that the sweep names."""
    place = config.checkpoint.path
    if place is None:
        return config
    checkpoint = config.checkpoint.model_copy(update={"path": f"{place.rstrip('/')}/{trial}"})
    return config.model_copy(update={"checkpoint": checkpoint})


def report(result: dict[str, Any], checkpoint: Folder, run: RunDirectory) -> None:
    """To Tune, with a checkpoint that says where the run's own is."""
    with tempfile.TemporaryDirectory() as folder:
        place = {"run": str(run.path.absolute()), "checkpoint": str(checkpoint.absolute())}
        (Path(folder) / POINTER).write_text(json.dumps(place), encoding="utf-8")
        tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))


def _open(path: Path, config: TrainConfig) -> tuple[RunDirectory, list[Folder]]:
    """The trial's run directory, and checkpoints to go on from: its own, or another trial's whose place it takes."""
    given = tune.get_checkpoint()
    place: dict[str, str] = {}
    if given is not None:
        with given.as_directory() as folder:
            place = json.loads((Path(folder) / POINTER).read_text(encoding="utf-8"))
    if not (path / "config.yaml").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        run, own = RunDirectory.create(path, config), []
    else:
        before = load_run_config(path)
        run = RunDirectory(path, config)
        if before != config:
            run.change_settings(before, config)
        own = checkpoints(run.checkpoints)
    if place and place["run"] != str(path.absolute()):
        return run, take_over(run, own, locate(place["checkpoint"]))
    return run, own


def take_over(run: RunDirectory, own: list[Folder], checkpoint: Folder) -> list[Folder]:
    """Go on from another trial's checkpoint (population based training): what this one had done beyond it is void.

    Args:
        run: this trial's.
        own: its checkpoints.
        checkpoint: the other trial's.

    Returns:
        the checkpoint, or where it has gone since, the first later one of the other trial.

    Raises:
        CheckpointError: none is left.
    """
    later = [found for found in checkpoints(checkpoint.parent) if step_of(found) >= step_of(checkpoint)]
    if not later:
        raise CheckpointError(
            f"{checkpoint.parent} has no checkpoint of step {step_of(checkpoint)} or later any more: raise checkpoint.keep"
        )
    for stale in own:
        if step_of(stale) > step_of(later[0]):
            remove(stale)
    run.forget_best()
    return later[:1]


def _predict(sweep: Sweep, config: TrainConfig, costs: Costs | None) -> float | None:
    large = sweep.enlarged(config)
    return None if large is None or costs is None else predict_step(large, Controller(large).chosen, costs)


def _pool_for(config: TrainConfig, group: PlacementGroup, first_bundle: int) -> ActorPool:
    global _pool
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(LEAVE_S))
    if _pool is None or _pool.group.id != group.id:
        device = "cuda" if any(bundle.get("GPU") for bundle in group.bundle_specs) else "cpu"
        _pool = ActorPool(config.world, device, group, first_bundle, lasting=True)
    return _pool
