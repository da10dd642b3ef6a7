"""Checkpoints on disk or object storage, one file per layer, that any number of workers can load; and copies of states in memory."""

from rayllp.checkpoint.depth_prolongation import Prolongation
from rayllp.checkpoint.location import Folder, check_writable, locate, remove
from rayllp.checkpoint.store import (
    MANIFEST,
    PieceWriter,
    checkpoints,
    commit,
    count_layers,
    load_pieces,
    read_manifest,
    staging,
    step_of,
)

__all__ = [
    "MANIFEST", "Folder", "PieceWriter", "Prolongation", "check_writable", "checkpoints", "commit", "count_layers", "load_pieces", "locate",
    "read_manifest", "remove", "staging", "step_of",
]  # fmt: skip
