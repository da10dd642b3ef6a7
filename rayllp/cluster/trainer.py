"""`LayerParallelTrainer`: `rayllp.train` with the interface of Ray's trainers, which returns Ray's `Result`."""

import dataclasses
from collections.abc import Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

import pandas
import pyarrow.fs
import ray.train
from ray.air.config import ScalingConfig as AnyScalingConfig

from rayllp.checkpoint import Folder, checkpoints, step_of
from rayllp.cluster.session import train
from rayllp.config import TrainConfig, load_run_config, make_config
from rayllp.data import Batches
from rayllp.errors import DataError, RayllpError, SettingsError
from rayllp.models import Architecture
from rayllp.report import Listener, RunDirectory, read_lines
from rayllp.training.result import TrainResult

UNLIMITED = 10**9
"""The failures per hour that a run survives where Ray's max_failures=-1 sets no limit."""


class LayerParallelTrainer:
    """Trains as `rayllp.train` does, with the interface of Ray's trainers:

    trainer = rayllp.LayerParallelTrainer(config, scaling_config=ray.train.ScalingConfig(num_workers=4))
    result = trainer.fit()

    Args:
        config: settings, or a nested mapping with some of their values; None: the embedded default.
        scaling_config: `num_workers`, a number or (min, max); `use_gpu`; `elastic_resize_monitor_interval_s`. None: as `config` says.
        run_config: `name` and `storage_path`, `checkpoint_config.num_to_keep` and `failure_config.max_failures`. None: as `rayllp.train`
            without `output`. If `storage_path` is a folder, the run directory is storage_path/name, and an unfinished run there is resumed,
            as Ray does; if it is a URL, checkpoints are written there. `max_failures=0`, Ray's default, leaves the settings' value.
        model: a LayerStack of your own, in place of the network that `config` names; needs `batches`.
        batches: the data of `model`.
        listeners: are called with each step, event and evaluation as it happens, in place of Ray's callbacks.

    Raises:
        SettingsError: an option of Ray has no meaning here, or contradicts `config`.
    """

    def __init__(
        self,
        config: TrainConfig | Mapping[str, Any] | None = None,
        *,
        scaling_config: Any = None,
        run_config: Any = None,
        model: Architecture | None = None,
        batches: Batches | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        settings = config if isinstance(config, TrainConfig) else make_config(config or {})
        self.model, self.batches, self.listeners = model, batches, listeners
        self.output: Path | None = None
        if scaling_config is not None:
            settings = _scaled(settings, scaling_config)
        if run_config is not None:
            settings, self.output = _placed(settings, run_config)
        self.config = settings

    def fit(self) -> Any:
        """Train to the last step, or until the run is stopped.

        Returns: a `ray.train.Result`. `metrics` has the values of the last step, and those of the last evaluation as validation_…;
            `metrics_dataframe` has one row per step; `checkpoint` is the last one; `best_checkpoints` has all that were kept, with the
            metrics of their steps; `return_value` is the result of `rayllp.train`.

        Raises:
            SettingsError, DataError: training could not start; no actor was started.
            ray.train.TrainingFailedError: training failed; its cause is the error of `rayllp.train`.
        """
        try:
            trained = train(self.config, output=self.output, model=self.model, batches=self.batches, listeners=self.listeners)
        except (SettingsError, DataError):
            raise
        except RayllpError as error:
            failed = getattr(ray.train, "ControllerError", ray.train.TrainingFailedError)
            raise failed(error) from error
        return make_result(trained)


def make_result(trained: TrainResult) -> Any:
    """Return Ray's `Result`, made from what a run has left in its directory."""
    run = RunDirectory(trained.directory, load_run_config(trained.directory))
    rows = _rows(run)
    frame = pandas.DataFrame(rows)
    row_after = {row["training_iteration"]: row for row in rows}
    complete = [(_checkpoint(folder), row_after.get(step_of(folder), {})) for folder in checkpoints(run.checkpoints)]
    result = ray.train.Result(
        metrics=rows[-1] if rows else None,
        checkpoint=complete[-1][0] if complete else None,
        error=None,
        path=str(trained.directory.absolute()),
        metrics_dataframe=frame,
        best_checkpoints=complete,
        _storage_filesystem=pyarrow.fs.LocalFileSystem(),
    )
    result.return_value = trained
    return result


def _rows(run: RunDirectory) -> list[dict[str, Any]]:
    """Return one row per step: its numbers and words, and those of the evaluation after it. `training_iteration` counts from 1."""
    evaluated: dict[int, dict[str, Any]] = {}
    for line in run.evaluations():
        evaluated[line["step"]] = {f"validation_{name}": value for name, value in line.items() if name not in ("step", "split")}
    rows = []
    for metric in read_lines(run.path / "metrics.jsonl"):
        plain = {name: value for name, value in metric.items() if not isinstance(value, list | dict)}
        done = metric["step"] + 1
        rows.append({"training_iteration": done, **plain, **evaluated.get(done, {})})
    return rows


def _checkpoint(folder: Folder) -> Any:
    """Return a complete checkpoint as a `ray.train.Checkpoint`. `rayllp export` reads it, and a run can resume from it."""
    if isinstance(folder, Path):
        return ray.train.Checkpoint(str(folder.absolute()))
    return ray.train.Checkpoint(folder.path, filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.fs)))


# What Ray's options mean here -----------------------------------------------------------------------------------------------------


def _scaled(config: TrainConfig, scaling: Any) -> TrainConfig:
    """Return the settings with the number of workers and the device that Ray's `ScalingConfig` asks for."""
    if not isinstance(scaling, AnyScalingConfig):
        raise SettingsError(f"scaling_config is a {type(scaling).__name__}: give a ray.train.ScalingConfig")
    used = {"num_workers", "use_gpu", "elastic_resize_monitor_interval_s"}
    _refuse_others(scaling, used, "a worker takes one CPU, and with use_gpu one GPU")
    count = scaling.num_workers
    if isinstance(count, tuple):
        count = {"min": count[0], "max": count[1]}
    elif count < 1:
        raise SettingsError(f"num_workers={count}: layer-parallel training is done by actors; give at least 1")
    changes: dict[str, Any] = {"workers": count, "device": "cuda" if scaling.use_gpu else "cpu"}
    every = getattr(scaling, "elastic_resize_monitor_interval_s", None)
    if every != getattr(type(scaling)(), "elastic_resize_monitor_interval_s", None):
        changes["resize_check_s"] = every
    return _with(config, changes, "scaling_config")


def _placed(config: TrainConfig, run: Any) -> tuple[TrainConfig, Path | None]:
    """Return the settings with the values of Ray's `RunConfig`, and the run directory; None if `storage_path` is a URL."""
    if not isinstance(run, ray.train.RunConfig):
        raise SettingsError(f"run_config is a {type(run).__module__}.{type(run).__name__}: give a ray.train.RunConfig")
    _refuse_others(
        run, {"name", "storage_path", "checkpoint_config", "failure_config", "logging_config"}, "listeners are told what happens"
    )
    changes: dict[str, Any] = {}
    checkpointing, failures = run.checkpoint_config, run.failure_config
    for part, supported in (
        (checkpointing, {"num_to_keep"}),
        (failures, {"max_failures"}),
        (getattr(run, "logging_config", None), set[str]()),
    ):
        if part is not None:
            _refuse_others(part, supported, "the settings' checkpoint and max_failures say the rest")
    if checkpointing is not None and checkpointing.num_to_keep is not None:
        changes["checkpoint"] = {"keep": checkpointing.num_to_keep}
    if failures is not None and failures.max_failures:
        changes["max_failures"] = UNLIMITED if failures.max_failures < 0 else failures.max_failures
    place = str(run.storage_path).removeprefix("file://")
    if "://" not in place:
        return _with(config, changes, "run_config"), Path(expanduser(place)) / run.name
    changes["checkpoint"] = {**changes.get("checkpoint", {}), "path": f"{place.rstrip('/')}/{run.name}"}
    return _with(config, changes, "run_config"), None


def _refuse_others(options: Any, used: set[str], instead: str) -> None:
    """Refuse options that have been set and would be ignored.

    Args:
        used: names of the options that have a meaning here.
        instead: ends the error message.
    """
    untouched = type(options)()
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if option.name not in used and value != getattr(untouched, option.name):
            raise SettingsError(
                f"{type(options).__name__}({option.name}={value!r}) has no meaning in layer-parallel training: leave it out ({instead})"
            )


def _with(config: TrainConfig, changes: Mapping[str, Any], source: str) -> TrainConfig:
    """Return the settings with changes, and refuse a change of a value that was set.

    Args:
        source: where the changes come from, for the error message.
    """
    values = config.model_dump(exclude_unset=True)
    _merge(values, changes, source)
    return make_config(values, source=source)


def _merge(values: dict[str, Any], changes: Mapping[str, Any], source: str, prefix: str = "") -> None:
    for name, value in changes.items():
        known = values.get(name)
        if isinstance(value, Mapping) and isinstance(known, dict) and name != "workers":
            _merge(known, value, source, f"{prefix}{name}.")
        elif known in (None, "auto", value):
            values[name] = value
        else:
            raise SettingsError(f"{prefix}{name}={known} in the settings, and {source} says {value}: leave it out in one of them")
