"""The data that workers train on: `Batches`, the base class for data of your own, and `Dataset`, a data set that the settings name."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from torch import Tensor

from rayllp.data.cache import CacheEntry
from rayllp.data.sampling import SampleOrder, in_order
from rayllp.data.tokenizer_kinds import Tokenizer
from rayllp.errors import SettingsError
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


class Batches(ABC):
    """The source of inputs and targets. For data of your own, derive from it and define `batch`, and `count` if an evaluation can end.

    Each worker holds one. A batch depends on the arguments alone, so that resuming a run or changing its number of workers takes no more
    than the step.

    Attributes:
        is_stream: True if a held-out split may be too long for a full pass at the end of training.
    """

    is_stream: bool = False

    @abstractmethod
    def batch(self, split: str, step: int, size: int) -> tuple[Inputs, Tensor]:
        """Return the inputs and targets of a step's global batch; dimension 0 is the sample. `split` is train or validation.

        Shapes depend on `size` alone. A finite validation set is passed through in order, batch after batch; rows beyond its end have the
        target IGNORE everywhere.
        """

    def count(self, split: str) -> int | None:
        """Return the number of samples in one pass through a split; None: it has no end, and an evaluation takes whole batches of it."""
        return None

    @property
    def facts(self) -> DatasetFacts:
        """What a model that the settings name has to know about the data; a network of the user's own needs none of it."""
        return DatasetFacts()

    @property
    def entries(self) -> tuple[CacheEntry, ...]:
        """Cache entries whose files a host needs; none for data in memory."""
        return ()

    def with_entries(self, change: Callable[[CacheEntry], CacheEntry]) -> Self:
        """Return a copy in which each cache entry is replaced by `change(entry)`."""
        return self

    def ensure_present(self) -> None:
        """Make sure that this host has the cache entries.

        Raises:
            DataError: see `CacheEntry.ensure_present`.
        """
        for entry in self.entries:
            entry.ensure_present()

    def with_files(self) -> Self:
        """Return a copy whose small cache entries carry their files, for hosts that lack the data they are made from."""
        return self.with_entries(CacheEntry.with_files)

    @staticmethod
    def of(batches: object) -> "Batches":
        """Return a user's batches as `Batches`: an object that merely has a method `batch` gets the defaults for everything else.

        Raises:
            SettingsError: it has no such method.
        """
        if isinstance(batches, Batches):
            return batches
        if not callable(getattr(batches, "batch", None)):
            raise SettingsError(
                f"batches is a {type(batches).__name__} without a method batch(split, step, size) that returns inputs and targets: derive "
                "from rayllp.data.Batches and define it"
            )
        return _Plain(batches)


@dataclass(frozen=True)
class _Plain(Batches):
    """Wraps a user's object that has a method `batch` but does not derive from `Batches`."""

    inner: Any

    def batch(self, split: str, step: int, size: int) -> tuple[Inputs, Tensor]:
        return self.inner.batch(split, step, size)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Dataset(Batches):
    """A data set that the settings name, with all that it was read and tokenised into.

    Attributes:
        order: the order in which training takes its samples.
        tokenizer: the tokenizer of its texts; None where there are no texts, or where words are numbered whole.
        classes: names of the labels, indexed by class number.
        skipped: how many lines, rows, labels and so on were left out or cut, by cause.
    """

    order: SampleOrder
    tokenizer: Tokenizer | None = None
    classes: tuple[str, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, train and validation first."""
        return ("train", "validation")

    @abstractmethod
    def count(self, split: str) -> int:
        """Return the number of samples in one pass through a split."""

    @abstractmethod
    def content(self, split: str) -> list[Any]:
        """Return all that the data set holds of a split, as `checksum` reads it."""

    def fingerprint(self, split: str) -> str:
        """Return a checksum of a split's samples. Runs store it to recognise their data, so `content` must not change its form."""
        return checksum(self.content(split))

    @property
    def meaning(self) -> str:
        """A checksum of what inputs and outputs stand for: the text of every token id, every word, every class name."""
        return checksum([None if self.tokenizer is None else self.tokenizer.texts(), None, self.classes])

    def chosen(self, split: str, step: int, size: int) -> np.ndarray:
        """Return the indices of a batch's samples: by `order` for the split train; else one after the other, and -1 beyond the end."""
        count = self.count(split)
        return self.order.take(step, count, size) if split == "train" else in_order(step, count, size)


def checksum(value: Any) -> str:
    """Return the SHA-256 of an array, a plain value, or a list of these."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Feed a value into a digest, lists element by element."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode("utf-8", "surrogatepass"))
