"""Data sets, tokenizers and batches. A batch is a pure function of (seed, step), so that resuming a run needs no state of a reader."""

from rayllp.data.base import IGNORE, Batches, DatasetFacts, Inputs
from rayllp.data.load import load_data
from rayllp.data.text import StreamBatches, TextBatches, load_text, read_text

__all__ = ["IGNORE", "Batches", "DatasetFacts", "Inputs", "StreamBatches", "TextBatches", "load_data", "load_text", "read_text"]
