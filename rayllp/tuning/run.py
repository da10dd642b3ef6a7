"""`rayllp.tune`: run a sweep on Ray Tune and write its results."""

import json
import math
import os
import shutil
import stat
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune
from ray.tune import PlacementGroupFactory, ResultGrid
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from rich.console import Console

from rayllp.checkpoint.run_metadata import read_data_json, write_data_json
from rayllp.cluster.joining import join_cluster
from rayllp.cluster.placement import choose_device
from rayllp.config import to_text
from rayllp.data.record import DataRecord, load_recorded
from rayllp.errors import ClusterError, SettingsError
from rayllp.models import FAMILIES
from rayllp.plan.measure import measure_costs
from rayllp.report import RunDirectory
from rayllp.report.progress import tell
from rayllp.report.run_directory import refusing
from rayllp.report.run_lock import lock_directory
from rayllp.tuning.results import write_results
from rayllp.tuning.searchers import FeasibleSearch, GridSearch, build_searcher
from rayllp.tuning.sweep import Sweep, load_sweep, make_sweep
from rayllp.tuning.switching import SwitchingScheduler
from rayllp.tuning.trial import train_trial

SWEEP = "sweep.json"
EXPERIMENT = "tune"
"""Folder of Tune's own files in the sweep's directory."""


def tune(
    sweep: Sweep | str | Path | None = None,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    console: Console | None = None,
) -> ResultGrid:
    """Run a sweep on Ray: on the cluster that this process belongs to, else on this machine.

    The output directory contains `best.yaml`, a config for `rayllp train`; `trials.csv`; `index.html` with plots; a run directory for each
    trial in `trials/`; and Tune's own files.

    Args:
        sweep: a sweep, or the path of its file.
        output: the directory; default: runs/<date>_<name>.
        resume: directory of a sweep whose driver was stopped or lost. Finished trials are kept, others resume from their checkpoints.
        console: where to show progress; default: standard error.

    Raises:
        SettingsError: the sweep, its base config or its space is wrong, no trial is feasible, or another user may have written the files to
            resume from.
        ClusterError: a trial needs more resources than the cluster has.
    """
    console = console or Console(stderr=True)
    if resume is not None:
        folder = Path(resume).absolute()
        _refuse_others_files(folder)
        sweep = _read_sweep(folder)
    elif sweep is None:
        raise SettingsError("a sweep file or --resume DIRECTORY is needed")
    else:
        sweep = sweep if isinstance(sweep, Sweep) else load_sweep(sweep)
    data, record = _load_shared_data(sweep, None if resume is None else folder)
    if sweep.shares_data:
        sweep = sweep.with_facts(data.facts)
        if (sweep.begins_with_base or sweep.objective.cluster is not None) and (why := sweep.problem({})) is not None:
            raise SettingsError(f"the sweep's base config: {why}")
    searcher = build_searcher(sweep)
    if isinstance(searcher, GridSearch) and not searcher.points:
        raise SettingsError(f"no trial is feasible: {_first(searcher)}")
    if resume is None:
        folder = _create(output, sweep, record)
    # A cluster that is started on this machine gets enough CPUs for as many trials as are to run at a time.
    with (
        lock_directory(folder, partial(tell, console)),
        join_cluster((sweep.concurrent or 1) * (sweep.base_config.world + math.ceil(sweep.driver_cpus)), console),
    ):
        try:
            results = _fit(sweep, folder, searcher, data, resumed=resume is not None, console=console)
        except BaseException:
            if resume is None and not (folder / EXPERIMENT).exists():
                shutil.rmtree(folder)
            raise
        if not len(results):
            raise SettingsError(f"no trial is feasible: {_first(searcher)}")
        write_results(sweep, results, folder, searcher.infeasible, console)
        return results


def _load_shared_data(sweep: Sweep, resumed: Path | None) -> tuple[Any, DataRecord | None]:
    """Load the data that all trials share, or that are needed for predictions, once; return them and their record."""
    if not sweep.shares_data and sweep.objective.cluster is None:
        return None, None
    known = read_data_json(resumed) if resumed is not None else None
    data, record, _ = load_recorded(sweep.base_config, known or DataRecord())
    return data, record


def _fit(sweep: Sweep, folder: Path, searcher: FeasibleSearch | GridSearch, data: Any, *, resumed: bool, console: Console) -> ResultGrid:
    device = choose_device(sweep.base_config)
    _check_room(sweep, device)
    trainable = _trainable(sweep, folder, data, device)
    if resumed:
        tuner = ray_tune.Tuner.restore(str(folder / EXPERIMENT), trainable, resume_unfinished=True, resume_errored=True)
        return tuner.fit()
    count = len(searcher.points) if isinstance(searcher, GridSearch) else sweep.trials
    each = _describe(_resources(sweep, device, sweep.base_config.world))
    tell(console, f"sweep {sweep.name}: up to {count} trials, {each} each; directory {folder}")
    # Population based training takes no searcher: its population is the first points that our searcher suggests.
    population = _population(searcher, count) if sweep.scheduler == "pbt" else None
    run_config = ray_tune.RunConfig(
        name=EXPERIMENT,
        storage_path=str(folder),
        failure_config=ray_tune.FailureConfig(max_failures=sweep.max_failures),
        verbose=1,
    )
    tuner = ray_tune.Tuner(
        trainable,
        param_space=None if population is None else {"settings": ray_tune.grid_search(population)},
        tune_config=_tune_config(sweep, device, searcher if population is None else None, count),
        run_config=run_config,
    )
    return tuner.fit()


def _trainable(sweep: Sweep, folder: Path, data: Any, device: str) -> Any:
    """Return Tune's trainable, which runs a trial, with its arguments and resources."""
    cluster = sweep.objective.cluster
    arguments = {
        "sweep": sweep,
        "working_directory": os.getcwd(),
        "output": str(folder),
        "data": data if sweep.shares_data else None,
        "costs": None if cluster is None else measure_costs(sweep.base_config, data, message_s=cluster.message_s, device=device),
        "families": dict(FAMILIES),
    }
    return ray_tune.with_resources(
        ray_tune.with_parameters(train_trial, **arguments),
        lambda config: _resources(sweep, device, sweep.config(config["settings"]).world),
    )


def _tune_config(sweep: Sweep, device: str, searcher: FeasibleSearch | GridSearch | None, count: int) -> ray_tune.TuneConfig:
    """Return Tune's settings for the search.

    Args:
        searcher: suggests `count` trials; None: they are a population, whose members all train at the same time.
    """
    single = len(sweep.objective.metrics) == 1
    return ray_tune.TuneConfig(
        metric=sweep.objective.metrics[0] if single else None,
        mode="min" if single else None,
        search_alg=searcher,
        scheduler=SwitchingScheduler(_scheduler(sweep), sweep, partial(_resources, sweep, device)),
        num_samples=1 if searcher is None else count,
        max_concurrent_trials=None if searcher is None else sweep.concurrent,
        time_budget_s=sweep.time_budget_s,
        reuse_actors=True,
        trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
    )


def _scheduler(sweep: Sweep) -> TrialScheduler | None:
    base = sweep.base_config
    if sweep.scheduler == "asha":
        every = base.eval.every or base.steps
        return ASHAScheduler(time_attr="step", max_t=base.steps + 1, grace_period=min(base.steps, sweep.grace * every), reduction_factor=2)
    if sweep.scheduler == "pbt":
        mutations = {parameter.name: _mutation(parameter) for parameter in sweep.search_space.active({})}
        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=max(1, sweep.grace * (base.eval.every or base.steps)),
            hyperparam_mutations={"settings": mutations},
            custom_explore_fn=partial(_valid, sweep),
        )
    return None


def _population(searcher: FeasibleSearch | GridSearch, count: int) -> list[dict[str, Any]]:
    members: list[dict[str, Any]] = []
    while len(members) < count and isinstance(suggested := searcher.suggest(f"member{len(members)}"), dict):
        members.append(suggested["settings"])
    return members


def _mutation(parameter: Any) -> Any:
    if parameter.kind == "choice":
        return list(parameter.values)
    low, high = parameter.values
    return {"int": ray_tune.randint, "float": ray_tune.uniform, "log": ray_tune.loguniform}[parameter.kind](low, high)


def _valid(sweep: Sweep, explored: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's config as changed by population based training, made valid: settings go back to the base config until it is."""
    settings = sweep.search_space.complete(explored["settings"])
    while sweep.problem(settings) is not None and settings:
        settings.popitem()  # the last one goes back to the value of the base config
    return {**explored, "settings": settings}


# Resources --------------------------------------------------------------------------------------------------------------------------


def _resources(sweep: Sweep, device: str, workers: int) -> PlacementGroupFactory:
    """Return the bundles of a trial: one for its driver, which may be empty, and one for each worker."""
    one = {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
    driver = {"CPU": sweep.driver_cpus} if sweep.driver_cpus else {}
    return PlacementGroupFactory([driver, *([one] * workers)], strategy="PACK")


def _describe(resources: PlacementGroupFactory) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.required_resources.items() if amount)


def _check_room(sweep: Sweep, device: str) -> None:
    """Refuse a sweep with a trial that needs more resources than the cluster has, for which it would wait forever.

    Raises:
        ClusterError: there is such a trial.
    """
    resources_of_cluster = ray.cluster_resources()
    for workers in {sweep.base_config.world, *(value for value in sweep.search_space.all_values("workers") if isinstance(value, int))}:
        resources = _resources(sweep, device, workers)
        needed = resources.required_resources
        if any(resources_of_cluster.get(name, 0) < amount for name, amount in needed.items()):
            has = ", ".join(f"{resources_of_cluster.get(name, 0):g} {name}" for name in needed)
            raise ClusterError(
                f"a trial with {workers} workers needs {_describe(resources)}, but the cluster has {has}: lower "
                "workers or driver_cpus, or add nodes"
            )


# The sweep's directory --------------------------------------------------------------------------------------------------------------


def _create(output: str | Path | None, sweep: Sweep, record: DataRecord | None) -> Path:
    path = RunDirectory.find_place(output, sweep.name)
    with refusing(path):
        path.mkdir(parents=True, exist_ok=True)
        stored = {"sweep": sweep.model_dump(mode="json"), "base": sweep.values({}), "folder": str(path.absolute())}
        (path / SWEEP).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        write_data_json(path, record)
    return path.absolute()


def _refuse_others_files(folder: Path) -> None:
    """Refuse to resume a sweep whose files another user may have written. Tune's state is pickled, so loading it can run any code.

    Raises:
        SettingsError: a file belongs to another user, or every user can write it.
    """
    if not folder.is_dir():
        return  # `_read_sweep` reports that
    files = [folder, *(Path(parent) / name for parent, folders, names in os.walk(folder) for name in (*folders, *names))]
    for path in files:
        status = path.lstat()
        whose = "belongs to another user" if status.st_uid != os.getuid() else "can be written by every user"
        if status.st_uid != os.getuid() or (status.st_mode & stat.S_IWOTH and not stat.S_ISLNK(status.st_mode)):
            raise SettingsError(
                f"{path} {whose}, and going on with a sweep runs code that its directory holds (Ray Tune's state is pickled): if you trust "
                f"all of it, make it your own (chown -R, chmod -R o-w) and then resume; see docs/security.md"
            )


def _read_sweep(folder: Path) -> Sweep:
    """Return the sweep of a directory, with its base config as it was at the start.

    Raises:
        SettingsError: it is not the directory of a sweep, or it was moved.
    """
    try:
        stored = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder} is not a sweep's directory ({error}): give the directory that `rayllp tune` printed") from None
    began = Path(stored.get("folder", folder))
    if began != folder:
        raise SettingsError(
            f"{folder} is a sweep that began in {began}, where Ray Tune still looks for its trials: move it back, or make that path a link "
            f"to it (ln -s {folder} {began}), and go on with --resume {began}"
        )
    base = folder / "base.yaml"
    base.write_text(to_text(stored["base"]), encoding="utf-8")
    return make_sweep({**stored["sweep"], "base": base.name}, folder, source=str(folder))


def _first(searcher: FeasibleSearch | GridSearch) -> str:
    refused = searcher.infeasible
    return f"{len(refused)} were refused, the first, {refused[0][0]}, because {refused[0][1]}" if refused else "none was suggested"
