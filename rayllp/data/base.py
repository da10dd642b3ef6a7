"""The interface between data and the workers that train on it: `Batches`, and the `DatasetFacts` from which a model is sized."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rayllp.state import State

IGNORE = -100
"""Target that losses and metrics ignore (the same number as torch's cross_entropy and transformers use)."""

Inputs = State
"""Inputs of a model: a tensor or a tuple of tensors, whose dimension 0 is the sample."""


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What a model that is built for a data set has to know about it.

    Attributes:
        vocabulary: size of the vocabulary; every token (or word) id is below it.
        classes: names of the labels, indexed by class number.
        pad: id of the padding token; None where all sequences have the same length.
        bos, eos: ids of the tokens that begin and end a target sequence (translation).
        image: channels, height and width.
    """

    vocabulary: int = 0
    classes: tuple[str, ...] = ()
    pad: int | None = None
    bos: int = 0
    eos: int = 0
    image: tuple[int, int, int] | None = None


class Batches(Protocol):
    """A data set as workers see it.

    Each worker holds one. A batch depends on the arguments alone, so that resuming a run or changing its number of workers takes no more
    than the step.
    """

    def batch(self, split: str, step: int, size: int) -> tuple[Inputs, Tensor]:
        """Return the inputs and targets of a step's global batch; dimension 0 is the sample. `split` is train or validation.

        Shapes depend on `size` alone. A finite validation set is passed through in order, batch after batch; rows beyond its end have the
        target IGNORE everywhere.
        """
        ...


def passes(count: int, size: int) -> int:
    """Return the number of batches of `size` in one pass through `count` samples."""
    return -(-count // size)
