"""Text, tokenizers, and batches that are a pure function of (seed, step)."""

from rayllp.data.text import Batches, TextBatches, load_text, read_text

__all__ = ["Batches", "TextBatches", "load_text", "read_text"]
