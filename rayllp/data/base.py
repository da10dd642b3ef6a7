"""What a worker draws its batches from."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rayllp.state import State

IGNORE = -100
"""Target that no loss or metric counts (as torch's cross_entropy and transformers have it)."""

Inputs = State
"""A tensor or a tuple of tensors; dimension 0 is the sample."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a data set tells the model that is built for it.

    Attributes:
        vocabulary: token (or word) ids are below this.
        classes: names of the labels, in order of their numbers.
        pad: id that fills up short sequences; None where all are equally long.
        bos, eos: ids that begin and end a target sequence (translation).
        image: channels, height and width.
    """

    vocabulary: int = 0
    classes: tuple[str, ...] = ()
    pad: int | None = None
    bos: int = 0
    eos: int = 0
    image: tuple[int, int, int] | None = None


class Batches(Protocol):
    """Every worker holds one; a batch is a pure function of its arguments, so that resuming and resizing need one integer."""

    def batch(self, split: str, step: int, size: int) -> tuple[Inputs, Tensor]:
        """The global batch of a step: inputs and targets, dimension 0 the sample. `split` is train or validation.

        Shapes depend on `size` alone. A finite validation set is passed through in order, batch after batch; places beyond its end
        are filled with targets IGNORE.
        """
        ...


def passes(count: int, size: int) -> int:
    """Batches of `size` in one pass through `count` samples."""
    return -(-count // size)
