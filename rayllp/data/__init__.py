"""Text, tokenizers, and batches that are a pure function of (seed, step)."""

from rayllp.data.base import IGNORE, Batches, Facts, Inputs
from rayllp.data.text import TextBatches, load_text, read_text

__all__ = ["Batches", "TextBatches", "load_text", "read_text"]
