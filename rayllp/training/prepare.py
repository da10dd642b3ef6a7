"""Prepares a run before workers start: finds its directory and the checkpoints to resume from, and checks all that needs no cluster."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import nn

from rayllp.channel.mpi import check_mpi
from rayllp.checkpoint import MANIFEST, Folder, check_writable, checkpoints, locate
from rayllp.checkpoint.run_metadata import TOKENIZER_JSON, read_data_json, read_model_json
from rayllp.config import MAY_DIFFER, TrainConfig, load_run_config
from rayllp.data import Batches, Dataset
from rayllp.data.record import DataRecord, load_recorded
from rayllp.engine.block import PARAMETER_DTYPES
from rayllp.engine.check_draws import check_draws
from rayllp.engine.torchbraid_solver import check_installed
from rayllp.errors import CheckpointError, RayllpError, SettingsError
from rayllp.models import Architecture, LayerStack, check_batched, check_family, check_muon, check_network, refuse_unnamed_code
from rayllp.report import RunDirectory
from rayllp.report.loggers import check_loggers
from rayllp.report.progress import tell
from rayllp.report.run_lock import RunLock, lock_directory
from rayllp.training.inputs import Network, TrainingInputs, at_full_depth


class Prepared(NamedTuple):
    """What a driver needs.

    Attributes:
        run: the directory of the run that is resumed; None for a new run, whose directory does not exist yet.
        config: the settings to train with.
        resume_from: complete checkpoints, oldest first.
        inputs: the network and the data.
        before: the settings that a resumed run had, if `config` differs from them.
    """

    run: RunDirectory | None
    config: TrainConfig
    resume_from: list[Folder]
    inputs: TrainingInputs
    before: TrainConfig | None = None


def prepare(
    config: TrainConfig | None,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    model: Architecture | None = None,
    batches: Batches | None = None,
) -> Prepared:
    """Prepare a run; takes the arguments of `rayllp.train`.

    Raises:
        SettingsError: the settings cannot be trained, or the directory belongs to another run.
        DataError: the data cannot be read, or are not those that the run began with.
        CheckpointError: there is no checkpoint to resume from.
    """
    run: RunDirectory | None = None
    before: TrainConfig | None = None
    resume_from: list[Folder] = []
    if resume is not None:
        run, before, resume_from = _reopen(Path(resume), config)
        config = config or before
    else:
        config = config or TrainConfig()
        if output is not None and _is_unfinished(Path(output), config):
            run = RunDirectory(Path(output), config)
            resume_from = checkpoints(run.checkpoints)
        elif config.checkpoint.path is not None:  # the run directory may have been lost, but not its checkpoints
            resume_from = _find_own(config.checkpoint.path, config)
    if run is None:
        RunDirectory.find_place(output, config.name)
    if config.checkpoint.path is not None:
        check_writable(locate(config.checkpoint.path))
    inputs = validate(config, model, batches, run, resume_from)
    return Prepared(run, config, resume_from, inputs, before if before != config else None)


@contextlib.contextmanager
def open_run(prepared: Prepared, output: str | Path | None, console: Console | None) -> Iterator[tuple[RunDirectory, list[RunLock]]]:
    """Open the run's directory for this process alone. It is created if needed, and removed again if nothing was recorded in it.

    Yields the run, and the locks that are held: on the directory, and on the place of its checkpoints if that is elsewhere.

    Raises:
        LockedError: another process trains in that directory, or writes its checkpoints to the same place.
        SettingsError: the directory cannot be written.
    """
    run = prepared.run or RunDirectory.create(output, prepared.config)
    say = partial(tell, console or Console(stderr=True))
    with lock_directory(run.path, say) as run_lock, contextlib.ExitStack() as stack:
        try:
            locks = [run_lock]
            if prepared.config.checkpoint.path is not None and run.checkpoints.absolute() != run.path.absolute():
                locks.append(stack.enter_context(lock_directory(run.checkpoints, say)))
            if prepared.before is not None:
                run.change_settings(prepared.before, prepared.config)
            yield run, locks
        except BaseException:
            run.discard_if_unused()
            raise


def validate(
    config: TrainConfig,
    model: Architecture | None = None,
    batches: Batches | None = None,
    run: RunDirectory | None = None,
    resume_from: Sequence[Folder] = (),
) -> TrainingInputs:
    """Check what can be checked without a cluster, and load what the settings name.

    Args:
        run, resume_from: the resumed run and its checkpoints, if there are any.

    Raises:
        SettingsError: the settings, the network and the data do not fit together.
        DataError: the data cannot be read, or are not those that the run began with.
    """
    if config.channel == "mpi":
        check_mpi()
    check_installed(config)
    check_loggers(config)
    if (model is None) != (batches is None):
        raise SettingsError("model and batches belong together: give both, or neither")
    if model is not None and batches is not None:
        if model.layers != config.model.layers:
            raise SettingsError(f"the model has {model.layers} layers but model.layers is {config.model.layers}: make them equal")
        if config.nested.factors and not isinstance(model, LayerStack):
            raise SettingsError(f"nested needs a LayerStack, to make shallower ones of it; got a {type(model).__name__}: leave nested out")
        check_muon(config, model)
        check_batched(config, model, _drawing(config, model, batches))
        return TrainingInputs(Network(model), batches)
    check_family(config)
    inputs = load_inputs(config, run, resume_from)
    check_network(config, inputs.batches.facts, inputs.network.stored_config)
    return inputs


def load_inputs(
    config: TrainConfig, run: RunDirectory | None, resume_from: Sequence[Folder] = (), data: Dataset | None = None
) -> TrainingInputs:
    """Load a run's data set and configuration, with the tokenizer that the run began with.

    Args:
        run, resume_from: the resumed run and its checkpoints, if there are any.
        data: the data set, if it is already loaded.

    Raises:
        DataError: the data cannot be read, or are not those that the run began with.
    """
    known = read_data_json(run.path) if run is not None else None
    if known is None:
        known = DataRecord.read(_newest_manifest(resume_from).get("data") or {})
    data, record, changed = load_recorded(config, known, run.path / TOKENIZER_JSON if run is not None else None, data)
    return TrainingInputs(Network(None, read_stored_config(config, run)), data, record, changed)


def _drawing(config: TrainConfig, model: Architecture, batches: Batches) -> str | None:
    """Return a part of the user's network that draws random numbers (by dropout, say), or None if none was found.

    Only parts that are likely to differ are tried: embedding, head, and the first and last middle layers.

    Raises:
        SettingsError: a part draws random numbers in a way that cannot be repeated.
    """
    layers = {config.buffers.open, config.model.layers - config.buffers.close - 1}
    dtype, seed = PARAMETER_DTYPES[config.dtype], config.seed
    try:
        inputs = batches.batch("train", 0, config.batch_size)[0]
        pieces: dict[int | str, nn.Module] = {"embed": model.build("embed", seed)}
        pieces |= {n: model.build(n, seed) for n in layers}
        pieces["head"] = model.build("head", seed)
        common = model.build("common", seed)
        placed = {piece: module.to(dtype) for piece, module in pieces.items()}
        return check_draws(model, placed, None if common is None else common.to(dtype), inputs, dtype)
    except RayllpError:
        raise
    except Exception:  # the layer may need a GPU, say; workers check again, and report what fails there
        return None


def read_stored_config(config: TrainConfig, run: RunDirectory | None) -> dict[str, Any] | None:
    """Return the network's transformers configuration as the run has stored it, at the run's full depth; None if there is none."""
    return at_full_depth(read_model_json(run.path), config) if run is not None else None


# Resuming a run -------------------------------------------------------------------------------------------------------------------


def _reopen(path: Path, config: TrainConfig | None) -> tuple[RunDirectory, TrainConfig, list[Folder]]:
    """Return the run at this path, the settings that it has had, and its checkpoints.

    Args:
        config: settings to resume with; None: those of the run. They may name another place for checkpoints than the run has used.

    Raises:
        SettingsError: the settings have another optimizer.
        CheckpointError: there is no complete checkpoint.
        LockedError: there is none, and another process trains in that directory.
    """
    before = load_run_config(path)
    if config is None:
        refuse_unnamed_code(before, path)
    if config is not None and config.optimizer.name != before.optimizer.name:
        raise SettingsError(
            f"{path} was trained by {before.optimizer.name}, and {config.optimizer.name} cannot go on from its state: leave "
            "optimizer.name as it was, or export the network and begin a run with model.from_pretrained"
        )
    complete = checkpoints(RunDirectory(path, before).checkpoints)
    if not complete:
        with lock_directory(path, partial(tell, Console(stderr=True))):  # if the run is in progress, raise that error instead
            pass
        raise CheckpointError(f"{path} has no complete checkpoint to resume from: start it again, with its settings and --output {path}")
    return RunDirectory(path, config or before), before, complete


def _find_own(place: str, config: TrainConfig) -> list[Folder]:
    """Return the checkpoints that an earlier session with these settings left at `checkpoint.path`.

    Raises:
        SettingsError: the checkpoints there are of a run with other settings.
    """
    complete = checkpoints(locate(place))
    theirs = _newest_manifest(complete).get("config")
    if theirs is not None:
        ours = config.model_dump(mode="json")
        theirs.get("data", {})["on_change"] = config.data.on_change
        theirs.get("optimizer", {})["sharded"] = config.optimizer.sharded  # both choices write the same files
        other = sorted(name for name in ours if name not in MAY_DIFFER and theirs.get(name) != ours[name])
        if other:
            raise SettingsError(
                f"checkpoint.path {place} holds checkpoints of a run with other {', '.join(other)}: give each run a place of its own"
            )
    return complete


def _newest_manifest(candidates: Sequence[Folder]) -> dict[str, Any]:
    """Return the newest manifest that can be read, else an empty one. Damaged checkpoints are reported when they are loaded."""
    for checkpoint in reversed(candidates):
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
    return {}


def _is_unfinished(path: Path, config: TrainConfig) -> bool:
    """True if the directory holds a run with these settings that has not reached its last evaluation."""
    if not os.path.isfile(path / "config.yaml") or load_run_config(path) != config:
        return False
    run = RunDirectory(path)
    last = (run.last_evaluation() or {"step": -1})["step"]
    stop = run.last_event("stop")
    return last < config.steps and (stop is None or stop["step"] != last)
