"""Per-layer checkpoints that any number of workers can load."""

from rayllp.checkpoint.prolong import Prolongation
from rayllp.checkpoint.store import PieceWriter, checkpoints, commit, count_layers, load_pieces, read_manifest, staging, step_of

__all__ = ["PieceWriter", "Prolongation", "checkpoints", "commit", "count_layers", "load_pieces", "read_manifest", "staging", "step_of"]
