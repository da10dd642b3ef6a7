"""Data sets, tokenizers and batches. A batch is a pure function of (seed, step), so that resuming a run needs no state of a reader."""

from rayllp.data.base import IGNORE, Batches, Dataset, DatasetFacts, Inputs
from rayllp.data.load import load_data
from rayllp.data.pairs import PairBatches
from rayllp.data.text import TextBatches

__all__ = ["IGNORE", "Batches", "Dataset", "DatasetFacts", "Inputs", "PairBatches", "TextBatches", "load_data"]
