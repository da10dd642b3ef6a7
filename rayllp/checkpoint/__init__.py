"""Per-layer checkpoints that any number of workers can load."""

from rayllp.checkpoint.prolong import Prolongation
from rayllp.checkpoint.store import checkpoints, commit, count_layers, load_pieces, read_manifest, staging, step_of, write_pieces

__all__ = ["Prolongation", "checkpoints", "commit", "count_layers", "load_pieces", "read_manifest", "staging", "step_of", "write_pieces"]
