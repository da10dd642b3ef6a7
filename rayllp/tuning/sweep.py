"""Sweep files: a base config, which settings vary, the objective, and how to search. Everything is checked without a cluster."""

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from rayllp.config import Settings, TrainConfig, kind_in, kind_of_setting, make_config, read_yaml, set_value, setting_names
from rayllp.data.base import DatasetFacts
from rayllp.errors import CheckpointError, DataError, SettingsError, fault_text, nearest_name
from rayllp.models import check_network
from rayllp.tuning.space import Space

Kind = Literal["loss", "time_to_loss", "step_time", "pareto"]
DATA = {"sequence_length", "seed", "model.family", "model.architecture", "model.head", "model.from_pretrained"}
"""Settings that change the data set, besides those of `data`. The model decides which kind of data is read, a checkpoint its tokenizer."""
COSTS = ("model.", "sequence_length", "batch_size", "accumulate", "dtype", "step.buffer")
"""Settings that change the cost of a layer."""


class Cluster(Settings):
    """A cluster, other than that of the trials, for which the time of a step is predicted."""

    workers: int = Field(ge=1, description="number of workers")
    message_s: float = Field(2e-5, ge=0, description="seconds that a state takes to the neighbour")


class Objective(Settings):
    """What a sweep minimises, and the budget of each trial."""

    kind: Kind = Field("loss", description="loss; time_to_loss; step_time (with bias at most `bias`); pareto (step time against bias)")
    steps: int | None = Field(None, ge=1, description="budget of a trial, optimizer steps; default the base config's")
    tokens: int | None = Field(None, ge=1, description="budget of a trial, tokens (images count as one, pairs one side)")
    seconds: float | None = Field(None, gt=0, description="budget of a trial, seconds of training steps")
    target: float | None = Field(None, description="time_to_loss: the validation loss to reach")
    bias: float | None = Field(None, gt=0, description="step_time: the largest gradient bias that a probe may find")
    cluster: Cluster | None = Field(None, description="step_time, pareto: predict the step's time for this cluster instead of measuring it")

    @model_validator(mode="after")
    def _complete(self) -> "Objective":
        if self.kind == "time_to_loss" and self.target is None:
            raise ValueError("time_to_loss needs a target: set objective.target to a validation loss")
        if self.kind == "step_time" and self.bias is None:
            raise ValueError("step_time needs a bound on the gradient's bias, else one iteration always wins: set objective.bias")
        if self.cluster is not None and self.kind not in ("step_time", "pareto"):
            raise ValueError(f"cluster is for step_time and pareto; the objective is {self.kind}: leave objective.cluster out")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the reported values that are to be minimised."""
        return {
            "loss": ("validation_loss",), "time_to_loss": ("seconds_to_target",), "step_time": ("constrained_step_time",),
            "pareto": ("step_time", "bias"),
        }[self.kind]  # fmt: skip

    @property
    def needs_bias(self) -> bool:
        """True if trials are judged by the bias of the gradient, for which they must probe."""
        return self.kind in ("step_time", "pareto")


class Limits(Settings):
    """A trial that exceeds one of these is switched to serial mode by the scheduler."""

    rho: float | None = Field(None, gt=0, description="largest ρ of a probe, forward or backward")
    bias: float | None = Field(None, gt=0, description="largest gradient bias of a probe")


class Sweep(Settings):
    """The content of a sweep file."""

    name: str = Field("sweep", description="part of the output directory's name")
    base: str | None = Field(None, description="training config that trials start from, relative to the sweep file; none: the default")
    settings: dict[str, Any] = Field(default_factory=dict, description="changes to it, by dotted name, for all trials")
    space: dict[str, Any] = Field(description="what varies, by the setting's dotted name")
    objective: Objective = Objective()
    searcher: Literal["optuna", "random", "grid"] = Field("optuna", description="optuna: tree-structured Parzen estimator")
    scheduler: Literal["asha", "none", "pbt"] = Field("asha", description="asha: stop the worse half early; pbt: population based")
    trials: int = Field(16, ge=1, description="number of trials; a grid tries all of its points")
    concurrent: int | None = Field(None, ge=1, description="trials at a time; default: as many as fit")
    time_budget_s: float | None = Field(None, gt=0, description="time limit of the whole sweep")
    grace: int = Field(2, ge=1, description="evaluations that asha lets every trial do")
    seed: int = Field(0, ge=0, description="seed of the searcher")
    default_first: bool = Field(True, description="the first trial is the base config as it is")
    driver_cpus: float = Field(0.0, ge=0, description="CPUs that a trial's driver asks for, besides one per worker")
    max_failures: int = Field(2, ge=0, description="times that a trial is restarted from its checkpoint after its driver was lost")
    limits: Limits = Limits()
    on_serial: Literal["keep", "shrink"] = Field("keep", description="shrink: a trial in serial mode for good goes on with serial_workers")
    serial_workers: int = Field(1, ge=1, description="workers of a trial in serial mode, with on_serial: shrink")

    _base: dict[str, Any] = PrivateAttr()
    _facts: DatasetFacts | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        """Read the base config, and check it and the space.

        Args:
            context: the folder where the relative path `base` starts; None: the working directory.
        """
        self._base = _read_base(self.base, Path(context or "."))
        for name in (*self.settings, *self.space):
            _check_name(name)
        _check(self)

    @cached_property
    def search_space(self) -> Space:
        """The settings that vary, and how."""
        return Space.parse(self.space)

    @cached_property
    def base_config(self) -> TrainConfig:
        """The settings of a trial that changes nothing."""
        return self.config({})

    @property
    def begins_with_base(self) -> bool:
        """True if the first trial is the base config.

        A grid has this trial only if it is one of its points, and population based training would change its settings.
        """
        return self.default_first and self.searcher != "grid" and self.scheduler != "pbt"

    @property
    def shares_data(self) -> bool:
        """True if all trials have the same data set."""
        return not any(name.startswith("data.") or name in DATA for name in self.space)

    def values(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the nested settings of a trial.

        Args:
            chosen: values of settings that vary, by dotted name.
        """
        merged = copy.deepcopy(self._base)
        for name, value in {**self.settings, **chosen}.items():
            _put(merged, name, value)
        return merged

    def config(self, chosen: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of a trial.

        Args:
            chosen: values of settings that vary, by dotted name.

        Raises:
            SettingsError: the settings do not fit together.
        """
        values = self.values(chosen)
        if self.objective.steps is not None:
            values["steps"] = self.objective.steps
        config = make_config(values, source="trial")
        cluster = self.objective.cluster
        if cluster is not None and config.solver == "windows" and config.windows.length is None:
            # As many layers are evaluated at once as there, so that biases and sweeps are those of the cluster.
            _put(values, "windows.length", cluster.workers)
            config = make_config(values, source="trial")
        if self.objective.tokens is not None:
            per_step = config.batch_size * (config.sequence_length if config.model.task != "images" else 1)
            config = config.model_copy(update={"steps": max(1, self.objective.tokens // per_step)})
        if self.scheduler == "pbt":  # other trials may resume from this one's checkpoints, so more are kept
            config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep": max(4, config.checkpoint.keep)})})
        return config

    def base_values(self) -> dict[str, Any]:
        """Return the base config's values of the settings that vary, by dotted name."""
        base = self.base_config.model_dump(mode="json")
        return {name: _get(base, name) for name in self.space}

    def enlarged(self, config: TrainConfig) -> TrainConfig | None:
        """Return a trial's settings on the cluster for which step times are predicted; None if they are measured instead.

        Raises:
            SettingsError: the settings do not fit that number of workers.
        """
        cluster = self.objective.cluster
        if cluster is None:
            return None
        return make_config(config.model_dump(mode="json") | {"workers": cluster.workers, "mesh": {"data": 1}}, source="on the cluster")

    def with_facts(self, facts: DatasetFacts) -> "Sweep":
        """Return this sweep with the facts of the data that all trials share, so that `problem` also checks that networks fit them."""
        sweep = self.model_copy()
        sweep._facts = facts
        return sweep

    def problem(self, chosen: Mapping[str, Any]) -> str | None:
        """Return why these choices cannot be a trial; None if they can."""
        try:
            config = self.config(chosen)
            self.enlarged(config)
            if self._facts is not None:
                check_network(config, self._facts)
        except (SettingsError, CheckpointError, DataError) as error:
            return str(error)
        return None


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read a sweep file, and check it with its base config and its space.

    Args:
        overrides: changes as `key=value`.

    Raises:
        SettingsError: something is wrong; the message says what to change.
    """
    path = Path(path)
    loaded = read_yaml(path, "a sweep's YAML file", _kind_in_sweep)
    if not isinstance(loaded, dict):
        raise SettingsError(f"{path} holds a {type(loaded).__name__}; it must be a mapping with a `space`")
    for override in overrides:
        _override(loaded, override)
    return make_sweep(loaded, path.parent, source=str(path))


def make_sweep(values: Mapping[str, Any], folder: str | Path = ".", *, source: str = "sweep") -> Sweep:
    """Make a sweep from nested values, and check it.

    Args:
        folder: where the relative path `base` starts.
        source: where the values come from, for error messages.

    Raises:
        SettingsError: something is wrong; the message says what to change.
    """
    try:
        return Sweep.model_validate(dict(values), context=folder)
    except ValidationError as error:
        raise SettingsError(f"{source}: " + "; ".join(_explain(fault) for fault in error.errors())) from None


def _check(sweep: Sweep) -> None:
    base, space = sweep.base_config, sweep.search_space  # both raise an error if they are invalid
    objective, names = sweep.objective, set(sweep.space)
    if not isinstance(base.workers, int | None) or any(isinstance(value, dict) for value in space.all_values("workers")):
        raise SettingsError("a trial's workers live in its own placement group, so their number is fixed: give workers as a number")
    if objective.needs_bias and not base.adaptive.probe_every and "adaptive.probe_every" not in names:
        raise SettingsError(f"objective {objective.kind} needs the gradient's bias, which probes measure: set adaptive.probe_every")
    if objective.kind == "pareto" and sweep.scheduler != "none":
        raise SettingsError(f"scheduler {sweep.scheduler} compares one number a trial, and pareto has two: use scheduler: none")
    if objective.kind == "pareto" and sweep.searcher != "optuna":
        raise SettingsError(f"searcher {sweep.searcher} looks for one number, and pareto has two: use searcher: optuna")
    if sweep.scheduler == "asha" and not base.eval.every and "eval.every" not in names:
        raise SettingsError("asha compares trials during training, by their evaluations: set eval.every, or use scheduler: none")
    if sweep.scheduler == "pbt" and sweep.searcher == "grid":
        raise SettingsError("scheduler pbt changes settings during training, and searcher grid fixes them: change one of the two")
    if objective.cluster is not None:
        varied = sorted(name for name in names if name.startswith(COSTS))
        if varied:
            raise SettingsError(
                f"objective.cluster predicts with one set of layer costs, but {', '.join(varied)} changes them: leave it out of "
                "the space, or leave out objective.cluster"
            )
    if sweep.searcher == "grid":
        space.grid()  # raises an error if the grid would be infinite


def _read_base(base: str | None, folder: Path) -> dict[str, Any]:
    if base is None:
        return {}
    path = folder / base
    if not path.is_file():
        raise SettingsError(f"base {base} does not exist (looked for {path}): give a training config's path, relative to the sweep file")
    loaded = read_yaml(path, "a training config") or {}
    if not isinstance(loaded, dict):
        raise SettingsError(f"base {path} holds a {type(loaded).__name__}; it must be a mapping of settings")
    return loaded


def _override(values: dict[str, Any], override: str) -> None:
    """Apply a change such as `trials=8` or `settings.NAME=…`, where NAME is the dotted name of a training setting."""
    key, _, _ = override.partition("=")
    if key.startswith("settings."):
        name = key.removeprefix("settings.")
        found: dict[str, Any] = {}
        set_value(found, f"value={override.partition('=')[2]}", lambda path: kind_of_setting((*name.split("."), *path[1:])))
        values.setdefault("settings", {})[name] = found["value"]
    else:
        set_value(values, override, _kind_in_sweep)


def _kind_in_sweep(path: tuple[str, ...]) -> Any:
    """Return the type of an entry of a sweep file. An entry for a training setting has the type of that setting."""
    if path[:1] == ("settings",):
        return kind_of_setting(tuple(".".join(path[1:]).split(".")))
    if path[:1] == ("space",):
        form = path[2:3]
        name = path[-1] if form == ("when",) else path[1] if form == ("choice",) else ""
        return kind_of_setting(tuple(name.split(".")))
    return kind_in(Sweep, path)


def _check_name(name: str) -> None:
    known = setting_names()
    if name in known or any(name.startswith(f"{whole}.") for whole in known):
        return
    meant = nearest_name(name, known, cutoff=0.5)
    hint = f"; did you mean {meant}?" if meant else "; `rayllp settings` lists them all"
    raise SettingsError(f"unknown setting {name}{hint}")


def _get(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[last] = value


def _explain(fault: Any) -> str:
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"unknown entry {name} (a sweep has {', '.join(Sweep.model_fields)}; a training setting goes into `settings` or `space`)"
    return f"{name}: {fault_text(fault)}" if name else fault_text(fault)
