"""Checkpoints: one safetensors file a piece (embedding, each layer, head), so that any number of workers can load any checkpoint.

A checkpoint directory is complete or absent: workers write into a temporary folder, the driver adds the manifest and renames it.
safetensors hold numbers only; nothing here is ever unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rayllp.checkpoint.prolong import LAYER, Prolongation
from rayllp.engine.engine import Engine
from rayllp.errors import CheckpointError

FORMAT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")


def staging(root: Path, step: int) -> Path:
    """A fresh temporary folder for the checkpoint of `step`."""
    folder = root / f".step_{step}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_pieces(engine: Engine, folder: Path) -> dict[str, dict[str, Any]]:
    """Write this worker's pieces; their files with size and checksum. Replica 0 alone writes."""
    if engine.replicas.rank != 0:
        return {}
    written = {}
    for piece, tensors in _pieces(engine).items():
        path = folder / f"{piece}.safetensors"
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        written[path.name] = {"bytes": path.stat().st_size, "sha256": _checksum(path)}
    return written


def commit(folder: Path, step: int, files: Mapping[str, Any], extra: Mapping[str, Any], keep: int, best: int | None = None) -> Path:
    """Add the manifest, make the checkpoint appear, drop all but the last `keep` and that of step `best`."""
    manifest = {"format": FORMAT, "step": step, "files": dict(files), **extra}
    with (folder / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    final = folder.parent / f"step_{step}"
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    for old in checkpoints(folder.parent)[:-keep]:
        if old.name != f"step_{best}":
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in root.glob("step_*") if (path / "manifest.json").is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Steps that a checkpoint's directory is named after."""
    return int(checkpoint.name.removeprefix("step_"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against the files beside it.

    Raises:
        CheckpointError: no manifest, another format, or a file that is missing or altered.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint ({error}); use an earlier one") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.get('format')}; this rayllp reads format {FORMAT}")
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"] or _checksum(path) != facts["sha256"]:
            raise CheckpointError(f"{path} is missing or altered (its checksum differs from the manifest's); use an earlier checkpoint")
    return manifest


def count_layers(manifest: Mapping[str, Any]) -> int:
    """Layers of the network in a checkpoint, buffers included."""
    return sum(name.startswith(LAYER) for name in manifest["files"])


def load_pieces(engine: Engine, folder: Path, prolongation: Prolongation | None = None) -> None:
    """Load this worker's pieces: weights and optimizer state.

    Args:
        prolongation: how the network follows from the shallower one in the checkpoint; None: it is that one.

    Raises:
        CheckpointError: a piece is missing or has another shape: the checkpoint is of another model.
    """
    tied = {head: embed for embed, head in engine.block.architecture.tied}
    cache: dict[str, dict[str, Tensor]] = {}
    for piece, name, parameter in _owned(engine):
        source = tied.get(name, name)
        piece = piece if source == name else "embed"
        if piece not in cache:
            read = partial(_read_piece, folder)
            prefix = engine.block.architecture.layer_prefix
            cache[piece] = read(piece) if prolongation is None else prolongation.piece(piece, read, prefix)
        _load_parameter(engine, cache[piece], source, parameter, folder)


def _read_piece(folder: Path, piece: str) -> dict[str, Tensor]:
    try:
        return load_file(folder / f"{piece}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot read {piece}.safetensors ({error}); it is of another model or damaged") from None


def _load_parameter(engine: Engine, stored: Mapping[str, Tensor], name: str, parameter: nn.Parameter, folder: Path) -> None:
    value = stored.get(f"weight/{name}")
    if value is None or value.shape != parameter.shape or value.dtype != parameter.dtype:
        found = "nothing" if value is None else f"{tuple(value.shape)} {value.dtype}"
        raise CheckpointError(
            f"{folder}: {name} is {found}, the model has {tuple(parameter.shape)} {parameter.dtype}: a checkpoint of another model"
        )
    parameter.data.copy_(value)
    if f"step/{name}" in stored:
        moments = {key: stored[f"{key}/{name}"].to(parameter.device) for key in MOMENTS}
        engine.optimizer.state[parameter] = {"step": stored[f"step/{name}"].clone(), **moments}


def _pieces(engine: Engine) -> dict[str, dict[str, Tensor]]:
    pieces: dict[str, dict[str, Tensor]] = {}
    for name_of_piece, name, parameter in _owned(engine):
        if engine.block.is_counted_elsewhere(name):
            continue
        piece = pieces.setdefault(name_of_piece, {})
        piece[f"weight/{name}"] = parameter.data
        state = engine.optimizer.state.get(parameter, {})
        for key in (*MOMENTS, "step"):
            if key in state:
                piece[f"{key}/{name}"] = torch.as_tensor(state[key])
    return pieces


def _owned(engine: Engine) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Piece, full name and value of every parameter; one that two pieces share counts to the first."""
    for piece, prefix, module in engine.block.pieces():
        for own, _ in module.named_parameters():
            if prefix + own in engine.block.parameters:
                yield piece, prefix + own, engine.block.parameters[prefix + own]


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
