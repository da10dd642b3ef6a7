"""Per-layer checkpoints that any number of workers can load."""

from rayllp.checkpoint.store import checkpoints, commit, load_pieces, read_manifest, staging, write_pieces

__all__ = ["checkpoints", "commit", "load_pieces", "read_manifest", "staging", "write_pieces"]
