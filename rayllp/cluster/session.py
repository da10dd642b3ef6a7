"""`rayllp.train`: what the settings name is checked, a cluster is joined or started, and a driver runs on it."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from rayllp.checkpoint import MANIFEST, Folder, check_writable, checkpoints, locate
from rayllp.checkpoint.described import read_model_json
from rayllp.cluster.driver import Driver
from rayllp.cluster.given import Loaded, TrainResult, whole_network
from rayllp.cluster.metrics import ClusterMetrics
from rayllp.cluster.places import choose_device
from rayllp.cluster.staff import Staff
from rayllp.config import TrainConfig, load_run_config
from rayllp.data import Batches, load_data
from rayllp.errors import CheckpointError, SettingsError
from rayllp.models import Architecture, LayerStack, check_batched, check_family, check_network
from rayllp.report import Listener, RunDirectory

MAY_DIFFER = set(
    "name workers resize_check_s mesh device channel receive_timeout_s hang_timeout_s snapshot_every spare_workers max_failures eval "
    "checkpoint microbatches timeline_every".split()
)
"""Settings of a run that may be others when it goes on from checkpoints alone."""


def train(
    config: TrainConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    model: Architecture | None = None,
    batches: Batches | None = None,
    console: Console | None = None,
    listeners: Sequence[Listener] = (),
) -> TrainResult:
    """Train layer-parallel on Ray: on the cluster that this process belongs to (RAY_ADDRESS, or an earlier ray.init), else on this machine.

    Args:
        config: settings; None is the embedded default.
        output: run directory; default runs/<date>_<name>. Where it holds an unfinished run with the same settings, that run goes on.
        resume: a run directory to go on with; `output` is then its own, and so is `config` unless it is given: the number of workers
            may change, and whatever does not change the network.
        model: a LayerStack of your own instead of config.model; needs `batches`.
        batches: where inputs and targets come from, instead of config.data.
        console: where progress is shown; default the standard error: a bar on a terminal, plain lines elsewhere.
        listeners: are told of each step, event and evaluation as it comes (see `Listener`).

    Raises:
        SettingsError, DataError, ClusterError: before any step was done; nothing is left behind.
        NonFiniteError: the loss or a gradient is not finite; the last good state is saved first.
        CheckpointError: nothing to resume, or the run directory could not be written to the end.
    """
    run: RunDirectory | None = None
    found: list[Folder] = []
    if resume is not None:
        run, config, found = _reopen(Path(resume), config)
    else:
        config = config or TrainConfig()
        if output is not None and _is_unfinished(Path(output), config):
            run = RunDirectory(Path(output), config)
            found = checkpoints(run.checkpoints)
        elif config.checkpoint.path is not None:  # its run directory may be lost
            found = _find_own(config.checkpoint.path, config)
    if config.checkpoint.path is not None:
        check_writable(locate(config.checkpoint.path))
    loaded = validate(config, model, batches, run)
    with join_cluster(config.fewest_workers):
        device = choose_device(config)
        staff = _kept.staff(config, device) if _kept is not None else None
        run = run or RunDirectory.create(output, config)
        told = [ClusterMetrics(run.path.name), *listeners]
        return Driver(config, run, device, model, batches, loaded, console, told, staff).train(found)


# Several trainings with the same processes ----------------------------------------------------------------------------------------


class _Kept:
    """Worker processes between trainings."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._staff: Staff | None = None

    def staff(self, config: TrainConfig, device: str) -> Staff:
        """The processes, for a run of these settings.

        Raises:
            SettingsError: they are fewer than it needs.
        """
        fewest = config.fewest_workers
        if fewest > self.count:
            raise SettingsError(f"{fewest} workers within keep_workers({self.count}): keep {fewest}, or lower workers")
        if self._staff is None or self._staff.device != device:
            self.close()
            self._staff = Staff(self.count, device, lasting=True)
        return self._staff

    def close(self) -> None:
        if self._staff is not None:
            self._staff.close()


_kept: _Kept | None = None


@contextlib.contextmanager
def keep_workers(count: int) -> Iterator[None]:
    """Let each `train` inside go on with the worker processes of the one before, up to `count` of them.

    A process takes seconds to start, most of them imports: several short trainings in one program, a notebook for instance, pay that
    once. Results are the same. The CPUs or GPUs stay taken until the end of the block, and `rayllp chaos` does not find these runs.

    Raises:
        SettingsError: it is within another one.
        ClusterError: no cluster could be joined or started.
    """
    global _kept
    if _kept is not None:
        raise SettingsError("keep_workers within keep_workers: end the first, or give it the larger count")
    with join_cluster(count):
        _kept = _Kept(count)
        try:
            yield
        finally:
            _kept.close()
            _kept = None


def validate(config: TrainConfig, model: Architecture | None, batches: Batches | None, run: RunDirectory | None = None) -> Loaded | None:
    """Refuse what can be refused without a cluster; the data set, where the settings name it."""
    if (model is None) != (batches is None):
        raise SettingsError("model and batches belong together: give both, or neither")
    if model is not None:
        if model.layers != config.model.layers:
            raise SettingsError(f"the model has {model.layers} layers but model.layers is {config.model.layers}: make them equal")
        if config.nested.factors and not isinstance(model, LayerStack):
            raise SettingsError(f"nested needs a LayerStack, to make shallower ones of it; got a {type(model).__name__}: leave nested out")
        check_batched(config, model)
        return None
    check_family(config)
    data, kept = load_data(config), kept_network(config, run)
    check_network(config, data.facts, kept)
    return Loaded(data, kept)


def kept_network(config: TrainConfig, run: RunDirectory | None) -> dict[str, Any] | None:
    """transformers' configuration that the run has kept; it may have been made shallower than the settings now say."""
    return whole_network(config, read_model_json(run.path)) if run is not None else None


# A run that goes on ---------------------------------------------------------------------------------------------------------------


def _reopen(path: Path, config: TrainConfig | None) -> tuple[RunDirectory, TrainConfig, list[Folder]]:
    """A run, its settings and checkpoints; other settings, where they are given, take the place of those it has."""
    before = load_run_config(path)
    found = checkpoints(RunDirectory(path, before).checkpoints)
    if not found:
        raise CheckpointError(f"{path} has no complete checkpoint to resume from; start it anew, with checkpoint.every set")
    run = RunDirectory(path, config or before)
    if config is not None and config != before:
        run.change_settings(before, config)
    return run, config or before, found


def _find_own(place: str, config: TrainConfig) -> list[Folder]:
    """Checkpoints that a run of these settings left in a place of its own.

    Raises:
        SettingsError: they are of another run.
    """
    found = checkpoints(locate(place))
    if found:
        theirs, ours = json.loads((found[-1] / MANIFEST).read_text()).get("config", {}), config.model_dump(mode="json")
        other = sorted(name for name in ours if name not in MAY_DIFFER and theirs.get(name) != ours[name])
        if other:
            raise SettingsError(
                f"checkpoint.path {place} holds checkpoints of a run with other {', '.join(other)}: give each run a place of its own"
            )
    return found


def _is_unfinished(path: Path, config: TrainConfig) -> bool:
    """Whether a directory holds a run of these settings that did not get to its last evaluation."""
    if not (path / "config.yaml").is_file() or load_run_config(path) != config:
        return False
    return (RunDirectory(path).last_evaluation() or {"step": -1})["step"] < config.steps


# Around the driver ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def join_cluster(cpus: int) -> Iterator[None]:
    """The cluster this process belongs to, else one on this machine for as long as the run lasts, with at least so many CPUs by name."""
    if ray.is_initialized():
        yield
        return
    local = "RAY_ADDRESS" not in os.environ
    if local:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, cpus),
            include_dashboard=False,
            logging_level=logging.WARNING,
            configure_logging=True,
        )
    else:
        ray.init(logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()
