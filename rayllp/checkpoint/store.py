"""Checkpoint files: one safetensors file per piece (embedding, each layer, head), so that any number of workers can load a checkpoint.

A checkpoint is either complete or not there. Locally the workers write to a temporary folder, which the driver renames after adding the
manifest. On object storage, which cannot rename, a checkpoint is complete once it has its manifest. safetensors files contain tensors only;
nothing is ever unpickled here.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from rayllp.channel.base import MessageTag, StateSpec
from rayllp.checkpoint.depth_prolongation import LAYER, Prolongation
from rayllp.checkpoint.location import Folder, remove, sync, write
from rayllp.checkpoint.states import BlockState, StateLayout, join_optimizer_state, states_by_name
from rayllp.engine import Engine
from rayllp.errors import CheckpointError, DamagedCheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
NAME = re.compile(r"step_\d+")
"""Pattern of the names of checkpoint folders. Other folders beside them, such as a user's copy step_300_good, are left alone."""


def staging(root: Folder, step: int) -> Folder:
    """Return an empty folder to write the checkpoint of `step` to. Unfinished checkpoints are removed."""
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
    """Writes a worker's pieces of a checkpoint: `begin` copies them, and a background thread writes the copies."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._written: dict[str, dict[str, Any]] = {}
        self._failure: Exception | None = None

    def begin(self, engine: Engine, folder: Folder) -> None:
        """Copy this worker's pieces and start to write them. The pieces of a block are written by its replicas in turn; all must call this.

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
        """True if nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until all pieces are written or writing them has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> dict[str, dict[str, Any]]:
        """Wait until all pieces are written; return the files with their sizes and checksums.

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
        except Exception as error:  # `finish` reports it
            self._failure = error


def _write_piece(path: Folder, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a file; return its size and checksum."""
    content = save(tensors)
    write(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def commit(folder: Folder, step: int, files: Mapping[str, Any], extra: Mapping[str, Any], keep: int, best: int | None = None) -> Folder:
    """Make a checkpoint complete by adding its manifest, and remove old ones.

    Args:
        folder: the folder that `staging` returned.
        files: names of the files, with their sizes and checksums.
        extra: further content of the manifest.
        keep: number of checkpoints to keep.
        best: step of a checkpoint to keep besides these.

    Returns: the folder of the checkpoint.
    """
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
            (old / MANIFEST).unlink()  # without its manifest it no longer counts as a checkpoint
            remove(old)
    return final


def checkpoints(root: Folder) -> list[Folder]:
    """Return the complete checkpoints in a folder, oldest first."""
    if not isinstance(root, Path):
        root.fs.invalidate_cache()  # other processes may have written there
    complete: list[Folder] = [path.parent for path in root.glob(f"step_*/{MANIFEST}") if NAME.fullmatch(path.parent.name)]
    return sorted(complete, key=step_of)


def find_checkpoint(run: Path, folder: Folder, step: int | None) -> Folder:
    """Return the checkpoint of a step, or the latest.

    Args:
        run: the run, for errors.
        folder: the folder of its checkpoints.
        step: step of the checkpoint; None: the latest.

    Raises:
        CheckpointError: there is no complete checkpoint, or none of this step.
    """
    by_step = {step_of(path): path for path in checkpoints(folder)}
    if not by_step:
        raise CheckpointError(f"{run} has no complete checkpoint to export: let the run end, stop it by Ctrl-C, or set checkpoint.every")
    chosen = list(by_step)[-1] if step is None else step
    if chosen not in by_step:
        raise CheckpointError(f"{run} has no checkpoint of step {step}: give --step one of {', '.join(map(str, by_step))}")
    return by_step[chosen]


def step_of(checkpoint: Folder) -> int:
    """Return the number of steps in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def read_manifest(folder: Folder) -> dict[str, Any]:
    """Read a checkpoint's manifest, and check that its files exist and have the right size. Their content is checked when they are read.

    Raises:
        DamagedCheckpointError: the manifest or a file is missing, or a file has another size.
        CheckpointError: the checkpoint has another format.
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
    """Check that a file's content is what was written.

    Args:
        files: the files of the manifest, with their checksums.

    Raises:
        DamagedCheckpointError: the file is missing or altered.
    """
    checksum = ""
    if path.is_file():
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    _compare(path, checksum, files)


def _compare(path: Folder, checksum: str, files: Mapping[str, Any]) -> None:
    facts = files.get(path.name)
    if facts is not None and checksum != facts["sha256"]:
        raise DamagedCheckpointError(f"{path} is altered (its checksum differs from the manifest's); use an earlier checkpoint")


def count_layers(manifest: Mapping[str, Any]) -> int:
    """Return the number of layers in a checkpoint, including buffer layers."""
    return sum(name.startswith(LAYER) for name in manifest["files"])


def load_pieces(engine: Engine, folder: Folder, prolongation: Prolongation | None = None, files: Mapping[str, Any] | None = None) -> None:
    """Load this worker's pieces of a checkpoint: weights and optimizer state.

    Args:
        prolongation: how to read the checkpoint of a shallower network; None: it is of the same network.
        files: the files of the manifest, with the checksums to check.

    Raises:
        DamagedCheckpointError: a file is altered.
        CheckpointError: a piece is missing or has other shapes: the checkpoint is of another model.
    """
    tied = engine.block.architecture.tied_to
    cache: dict[str, dict[str, Tensor]] = {}
    for piece, name, parameter in engine.block.owned():
        source = tied.get(name, name)
        piece = piece if source == name else "embed"
        if piece not in cache:
            read = partial(_read_piece, folder, files or {})
            prefix = engine.block.architecture.prefix
            cache[piece] = read(piece) if prolongation is None else prolongation.piece(piece, read, prefix)
        _load_parameter(engine, cache[piece], source, parameter, folder)


def _read_piece(folder: Folder, files: Mapping[str, Any], piece: str) -> dict[str, Tensor]:
    path = folder / f"{piece}.safetensors"
    try:
        content = path.read_bytes()
        _compare(path, hashlib.sha256(content).hexdigest(), files)
        return load(content)
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
    moments = engine.optimizer.moments_of(parameter)
    if state and set(state) - {"step", "ema"} != set(moments) - {"ema"}:  # an average of the weights may be new, or no longer wanted
        raise CheckpointError(
            f"{folder}: of {name} it has the optimizer's {', '.join(sorted(state))}, but optimizer.name={engine.config.optimizer.name} "
            f"goes on from {', '.join(moments) or 'none'}: put optimizer.name back to what the checkpoint was made with"
        )
    engine.optimizer.set_state(parameter, state)


def _saved(engine: Engine) -> dict[str, list[str]]:
    """Return the names of the parameters in each piece, without those whose copies another worker saves."""
    pieces: dict[str, list[str]] = {}
    for piece, name, _ in engine.block.owned():
        if not engine.block.is_counted_elsewhere(name):
            pieces.setdefault(piece, []).append(name)
    return pieces


def _piece(engine: Engine, names: Sequence[str], states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a file, copied to host memory."""
    piece: dict[str, Tensor] = {}
    for name in names:
        parameter = engine.block.parameters[name]
        shapes = engine.optimizer.moments_of(parameter)
        piece[f"weight/{name}"] = parameter.detach().to("cpu", copy=True)
        for part, value in states[name].items():
            piece[f"{part}/{name}"] = value.reshape({"step": (), **shapes}[part]).to("cpu", copy=True)
    return piece


def _states_at(writer: int, engine: Engine, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state of these parameters on replica `writer`. If it is sharded, all others send that replica their shares."""
    optimizer, replicas = engine.optimizer, engine.replicas
    if not optimizer.is_sharded:
        return {name: optimizer.state_of(engine.block.parameters[name]) for name in names}
    own = BlockState(engine, names, has_weights=False)
    state = torch.empty(own.size, dtype=own.dtype, device=engine.device)
    own.copy_into(state)
    others = [rank for rank in range(replicas.size) if rank != writer] if replicas.rank == writer else []
    layouts = [StateLayout.of(engine, names, rank, has_weights=False) for rank in others]
    coming = [
        (StateSpec((torch.Size((layout.size,)),), (own.dtype,), engine.device), rank) for layout, rank in zip(layouts, others, strict=True)
    ]
    tag = MessageTag(0, "checkpoint", "optimizer's state")
    received: Sequence[Any] = replicas.exchange([] if replicas.rank == writer else [(state, writer)], coming, tag)
    if replicas.rank != writer:
        return {}
    parts = states_by_name([(own.layout, state), *zip(layouts, received, strict=True)])
    owned = {name: engine.block.parameters[name] for name in names}
    ranges = {name: range(p.numel() if p.requires_grad else 0) for name, p in owned.items()}  # a frozen parameter has no state
    return {name: join_optimizer_state(parts[name], ranges[name], counted=optimizer.counts_steps(p)) for name, p in owned.items()}
