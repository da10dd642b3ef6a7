"""Checkpoints: one safetensors file a piece (embedding, each layer, head), so that any number of workers can load any checkpoint.

A checkpoint directory is complete or absent: workers write into a temporary folder, the driver adds the manifest and renames it; behind a
URL, where nothing is renamed, it is complete once it has its manifest. safetensors hold numbers only; nothing here is ever unpickled.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from rayllp.channel.base import MessageTag, StateSpec
from rayllp.checkpoint.depth_prolongation import LAYER, Prolongation
from rayllp.checkpoint.location import Folder, remove, sync, write
from rayllp.checkpoint.states import BlockState, Layout, by_name, join
from rayllp.engine import Engine
from rayllp.errors import CheckpointError, DamagedCheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
NAME = re.compile(r"step_\d+")
"""Of a checkpoint's folder. What else lies beside them (a copy that somebody made, step_300_good) is none of ours."""


def staging(root: Folder, step: int) -> Folder:
    """A fresh folder to write the checkpoint of `step` to; those that were never finished go."""
    folder: Folder
    unfinished: list[Folder]
    if isinstance(root, Path):
        folder = root / f".step_{step}.partial"
        unfinished = list(root.glob(".step_*.partial"))
    else:
        folder = root / f"step_{step}"
        (folder / MANIFEST).unlink(missing_ok=True)
        complete = {path.name for path in checkpoints(root)}
        unfinished = [path for path in root.glob("step_*") if NAME.fullmatch(path.name) and path.name not in complete]
    for path in unfinished:
        remove(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class PieceWriter:
    """Writes a worker's pieces in the background: `begin` copies them, and a thread writes the copies."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._written: dict[str, dict[str, Any]] = {}
        self._failure: Exception | None = None

    def begin(self, engine: Engine, folder: Folder) -> None:
        """Copy this worker's pieces, and start to write them: of a block's pieces every replica has its turn. All replicas call it.

        Raises:
            ChannelError: a replica did not send its share of the optimizer's state.
        """
        self.wait()
        self._written, self._failure = {}, None
        pieces: dict[str, dict[str, Tensor]] = {}
        for number, (piece, names) in enumerate(_saved(engine).items()):
            writer = number % engine.replicas.size
            states = _states_at(writer, engine, names)
            if engine.replicas.rank == writer:
                pieces[piece] = _piece(engine, names, states)
        engine.replicas.finish()
        self._thread = threading.Thread(target=self._write, args=(pieces, folder), name="checkpoint", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Until all is written, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> dict[str, dict[str, Any]]:
        """Wait; the files with size and checksum.

        Raises:
            CheckpointError: they could not be written.
        """
        self.wait()
        if self._failure is not None:
            raise CheckpointError(str(self._failure)) from self._failure
        return self._written

    def _write(self, pieces: dict[str, dict[str, Tensor]], folder: Folder) -> None:
        try:
            for piece in list(pieces):
                path = folder / f"{piece}.safetensors"
                self._written[path.name] = _write_piece(path, pieces.pop(piece))
        except Exception as error:  # a full disk, a path that vanished, whatever a file system's package raises: told by finish()
            self._failure = error


def _write_piece(path: Folder, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a file; its size and checksum."""
    if not isinstance(path, Path):
        content = save(tensors)
        write(path, content)
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    save_file(tensors, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _checksum(path)}


def commit(folder: Folder, step: int, files: Mapping[str, Any], extra: Mapping[str, Any], keep: int, best: int | None = None) -> Folder:
    """Add the manifest, make the checkpoint appear, drop all but the last `keep` and that of step `best`."""
    manifest = {"format": FORMAT, "step": step, "files": dict(files), **extra}
    write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    final = folder.parent / f"step_{step}"
    if isinstance(folder, Path):
        remove(final)
        sync(folder)
        folder.rename(folder.with_name(final.name))
        sync(folder.parent)
    for old in checkpoints(folder.parent)[:-keep]:
        if old.name != f"step_{best}":
            (old / MANIFEST).unlink()  # from here on it is none
            remove(old)
    return final


def checkpoints(root: Folder) -> list[Folder]:
    """Complete checkpoints, oldest first."""
    if not isinstance(root, Path):
        root.fs.invalidate_cache()  # others have written there
    found: list[Folder] = [path.parent for path in root.glob(f"step_*/{MANIFEST}") if NAME.fullmatch(path.parent.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Folder) -> int:
    """Steps that a checkpoint's directory is named after."""
    return int(checkpoint.name.removeprefix("step_"))


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest, and that the files it names are there in their sizes. Whoever reads one of them looks at its content.

    Raises:
        DamagedCheckpointError: no manifest, or a file that is missing or has another size.
        CheckpointError: another format.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder} is not a complete checkpoint ({error}); use an earlier one") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.get('format')}; this rayllp reads format {FORMAT}")
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise DamagedCheckpointError(f"{path} is missing or altered (its size differs from the manifest's); use an earlier checkpoint")
    return manifest


def check_content(path: Folder, files: Mapping[str, Any]) -> None:
    """See that a file of a checkpoint is what was written.

    Args:
        files: of the manifest.

    Raises:
        DamagedCheckpointError: it is not.
    """
    facts = files.get(path.name)
    if facts is not None and (not path.is_file() or _checksum(path) != facts["sha256"]):
        raise DamagedCheckpointError(f"{path} is altered (its checksum differs from the manifest's); use an earlier checkpoint")


def count_layers(manifest: Mapping[str, Any]) -> int:
    """Layers of the network in a checkpoint, buffers included."""
    return sum(name.startswith(LAYER) for name in manifest["files"])


def load_pieces(engine: Engine, folder: Folder, prolongation: Prolongation | None = None, files: Mapping[str, Any] | None = None) -> None:
    """Load this worker's pieces: weights and optimizer state.

    Args:
        files: of the manifest, which those that are read are checked against.
        prolongation: how the network follows from the shallower one in the checkpoint; None: it is that one.

    Raises:
        DamagedCheckpointError: a piece is not what was written.
        CheckpointError: a piece is missing or has another shape: the checkpoint is of another model.
    """
    tied = engine.block.architecture.tied_to
    cache: dict[str, dict[str, Tensor]] = {}
    for piece, name, parameter in engine.block.owned():
        source = tied.get(name, name)
        piece = piece if source == name else "embed"
        if piece not in cache:
            read = partial(_read_piece, folder, files or {})
            prefix = engine.block.architecture.layer_prefix
            cache[piece] = read(piece) if prolongation is None else prolongation.piece(piece, read, prefix)
        _load_parameter(engine, cache[piece], source, parameter, folder)


def _read_piece(folder: Folder, files: Mapping[str, Any], piece: str) -> dict[str, Tensor]:
    path = folder / f"{piece}.safetensors"
    check_content(path, files)
    try:
        return load_file(path) if isinstance(path, Path) else load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot read {piece}.safetensors ({error}); it is of another model or damaged") from None


def _load_parameter(engine: Engine, stored: Mapping[str, Tensor], name: str, parameter: nn.Parameter, folder: Folder) -> None:
    value = stored.get(f"weight/{name}")
    if value is None or value.shape != parameter.shape or value.dtype != parameter.dtype:
        found = "nothing" if value is None else f"{tuple(value.shape)} {value.dtype}"
        raise CheckpointError(
            f"{folder}: {name} is {found}, the model has {tuple(parameter.shape)} {parameter.dtype}: a checkpoint of another model"
        )
    parameter.data.copy_(value)
    state = {part: stored[key] for key in stored for part, _, owner in [key.partition("/")] if owner == name and part != "weight"}
    kept = engine.optimizer.moments_of(parameter)
    if state and set(state) - {"step", "ema"} != set(kept) - {"ema"}:  # an average of the weights may begin or end here
        raise CheckpointError(
            f"{folder}: of {name} it has the optimizer's {', '.join(sorted(state))}, but optimizer.name={engine.config.optimizer.name} "
            f"goes on from {', '.join(kept) or 'none'}: put optimizer.name back to what the checkpoint was made with"
        )
    engine.optimizer.set_state(parameter, state)


def _saved(engine: Engine) -> dict[str, list[str]]:
    """By piece, the names of its parameters, but for those that another worker's copy stands for."""
    pieces: dict[str, list[str]] = {}
    for piece, name, _ in engine.block.owned():
        if not engine.block.is_counted_elsewhere(name):
            pieces.setdefault(piece, []).append(name)
    return pieces


def _piece(engine: Engine, names: Sequence[str], states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What a file has: copies, on the host."""
    piece: dict[str, Tensor] = {}
    for name in names:
        parameter = engine.block.parameters[name]
        shapes = engine.optimizer.moments_of(parameter)
        piece[f"weight/{name}"] = parameter.detach().to("cpu", copy=True)
        for part, value in states[name].items():
            piece[f"{part}/{name}"] = value.reshape({"step": (), **shapes}[part]).to("cpu", copy=True)
    return piece


def _states_at(writer: int, engine: Engine, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of these parameters, on the replica that writes them; where it is shared out, all others send theirs."""
    optimizer, replicas = engine.optimizer, engine.replicas
    if not optimizer.is_sharded:
        return {name: optimizer.state_of(engine.block.parameters[name]) for name in names}
    own = BlockState(engine, names, has_weights=False)
    state = torch.empty(own.size, dtype=own.dtype, device=engine.device)
    own.take(state)
    others = [rank for rank in range(replicas.size) if rank != writer] if replicas.rank == writer else []
    layouts = [Layout.of(engine, names, rank, has_weights=False) for rank in others]
    coming = [
        (StateSpec((torch.Size((layout.size,)),), (own.dtype,), engine.device), rank) for layout, rank in zip(layouts, others, strict=True)
    ]
    tag = MessageTag(0, "checkpoint", "optimizer's state")
    received: Sequence[Any] = replicas.exchange([] if replicas.rank == writer else [(state, writer)], coming, tag)
    if replicas.rank != writer:
        return {}
    parts = by_name([(own.layout, state), *zip(layouts, received, strict=True)])
    owned = {name: engine.block.parameters[name] for name in names}
    kept = {name: range(p.numel() if p.requires_grad else 0) for name, p in owned.items()}  # of a frozen one no state is kept
    return {name: join(parts[name], kept[name], counted=optimizer.counts_steps(p)) for name, p in owned.items()}


def _checksum(path: Folder) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
