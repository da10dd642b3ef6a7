"""Sentence classification: one label for each sentence or pair of sentences, from a tab-separated file or a table."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, Dataset, DatasetFacts
from rayllp.data.datasets_io import named
from rayllp.data.files import BadRows, RaggedArray, bytes_of, refuse_one_class
from rayllp.data.sampling import SampleOrder
from rayllp.data.sources import Files, Table, read_samples, read_splits
from rayllp.data.special_tokens import SpecialTokens
from rayllp.data.tokenizer import load_tokenizer
from rayllp.data.tokenizer_kinds import Tokenizer
from rayllp.errors import DataError

FREQUENT = 10
"""A label that occurs only once is taken for a mistake if labels occur at least this many times on average."""


@dataclass(frozen=True)
class _Example:
    """One or two sentences, their label, and their place (file:line) for errors."""

    texts: tuple[str, ...]
    label: str
    place: str


@dataclass(frozen=True, kw_only=True)
class SentenceBatches(Dataset):
    """Sentences as token ids: cls, tokens, sep, and for a pair the second sentence and another sep. Targets are class numbers.

    Attributes:
        sequences: for each split, token ids.
        labels: for each split, class numbers.
        sequence_length: largest number of tokens in a sequence.
        tokenizer: the tokenizer of the sentences.
    """

    sequences: dict[str, RaggedArray]
    labels: dict[str, np.ndarray]
    sequence_length: int
    tokenizer: Tokenizer

    @property
    def facts(self) -> DatasetFacts:
        """Size of the vocabulary, the class names, and the padding id."""
        special = SpecialTokens.of(self.tokenizer)
        return DatasetFacts(vocabulary=special.vocabulary, classes=self.classes, pad=special.pad)

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return token ids of shape (size, sequence_length) and class numbers of shape (size,)."""
        special = SpecialTokens.of(self.tokenizer)
        indices = self.chosen(split, step, size)
        inputs = self.sequences[split].padded(indices, self.sequence_length, special.pad)
        # Attention needs at least one token that is not padding, so rows beyond the end hold cls and sep.
        inputs[indices < 0, :2] = special.cls, special.sep
        targets = np.where(indices < 0, IGNORE, self.labels[split][indices])
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def count(self, split: str) -> int:
        """Return the number of sentences, or pairs of them, in a split."""
        return len(self.sequences[split])

    def content(self, split: str) -> list[Any]:
        """Return a split's token ids and class numbers."""
        return [["sequences", self.sequences[split].parts], ["labels", self.labels[split]]]


def load_sentences(settings: DataSettings, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None) -> SentenceBatches:
    """Read sentences, number their labels, and tokenise them. `data.on_long` says whether long sequences are cut, skipped or refused.

    Raises:
        DataError: there is no file, it cannot be read, or it lacks the columns; sequence_length leaves no room for text; a line is broken,
            or a held-out label does not occur in training, and bad rows are not skipped.
    """
    _check_room(settings, sequence_length)
    bad_rows = BadRows(settings.on_error == "skip")
    read = _read_splits(settings, bad_rows)
    train = read["train"] = _leave_out_single(read["train"], settings, bad_rows)
    classes = tuple(sorted({example.label for example in train}))
    numbers = {name: number for number, name in enumerate(classes)}
    tokenizer = tokenizer or load_tokenizer(settings.tokenizer, ["\n".join(text for example in train for text in example.texts)])
    sequences: dict[str, RaggedArray] = {}
    labels: dict[str, np.ndarray] = {}
    for split, examples in read.items():
        known = [example for example in examples if _has_label(example, numbers, bad_rows)]
        encoded = [(_encode(example, tokenizer, sequence_length, settings.on_long, bad_rows), numbers[example.label]) for example in known]
        kept = [(sequence, number) for sequence, number in encoded if sequence is not None]
        if not kept:
            raise DataError(
                f"no {split} sentence is left, {bad_rows.counts} were left out: give more, or set data.on_error=refuse to see why"
            )
        sequences[split] = RaggedArray.of(sequence for sequence, _ in kept)
        labels[split] = np.array([number for _, number in kept], np.int64)
    return SentenceBatches(
        sequences=sequences, labels=labels, sequence_length=sequence_length, order=SampleOrder(seed, settings.sampling),
        tokenizer=tokenizer, classes=classes, skipped=bad_rows.counts,
    )  # fmt: skip


def _leave_out_single(train: list[_Example], settings: DataSettings, bad_rows: BadRows) -> list[_Example]:
    """Leave out labels that occur once where others are frequent: they are mistakes, or a header line that was read as a sentence."""
    counts = Counter(example.label for example in train)
    refuse_one_class(counts, named(settings))
    frequent = len(train) >= FREQUENT * len(counts)
    kept = []
    for example in train:
        if not frequent or counts[example.label] > 1:
            kept.append(example)
            continue
        hint = ""
        if example.place.endswith(":1"):
            hint = "; if this line names the columns, set data.text_field and data.label_field to names in it instead of numbers"
        fault = f"label {example.label!r} is on this line alone, where others have {len(train) // len(counts)} lines each"
        bad_rows.refuse_or_count("labels", f"{example.place}: {fault}{hint}")
    refuse_one_class((example.label for example in kept), named(settings))
    return kept


def _check_room(settings: DataSettings, sequence_length: int) -> None:
    needed = 3 if settings.pair_field is None else 5
    if sequence_length < needed:
        raise DataError(f"sequence_length {sequence_length} leaves no room for text between cls and sep: set at least {needed}")


def _read_splits(settings: DataSettings, bad_rows: BadRows) -> dict[str, list[_Example]]:
    fields = {"data.text_field": settings.text_field, "data.pair_field": settings.pair_field, "data.label_field": settings.label_field}
    columns = {setting: column for setting, column in fields.items() if column is not None}

    make = partial(_of_row, columns=tuple(columns.values()), bad_rows=bad_rows)

    def read(source: Table | Files) -> list[_Example]:
        return read_samples(source, columns, make, lambda example: bytes_of(example.texts), "a text and a label", bad_rows)

    needed = "sentence classification needs one, a tab-separated file (.tsv or .tsv.gz) such as GLUE's or a table, or data.dataset"
    return read_splits(settings, read, needed)


def _of_row(place: str, values: tuple[Any, ...], columns: tuple[str, ...], bad_rows: BadRows) -> _Example | None:
    """Return the example in a row of a table; None if a value is missing and bad rows are skipped."""
    empty = next((column for column, value in zip(columns, values, strict=True) if value is None or value == ""), None)
    if empty is not None:
        bad_rows.refuse_or_count("rows", f"{place} has nothing in column {empty!r}")
        return None
    *texts, label = values
    other = next((text for text in texts if not isinstance(text, str)), None)
    if other is not None:
        raise DataError(f"{place}: a text is a {type(other).__name__}: set data.text_field and data.pair_field to columns of strings")
    return _Example(tuple(texts), str(label), place)


def _has_label(example: _Example, numbers: dict[str, int], bad_rows: BadRows) -> bool:
    """True if an example's label occurs in training; otherwise the example is refused or counted."""
    if example.label not in numbers:
        bad_rows.refuse_or_count("labels", f"{example.place}: label {example.label!r} is none of training's {_listed(numbers)}")
    return example.label in numbers


def _listed(names: dict[str, int], most: int = 12) -> str:
    return ", ".join(list(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _encode(example: _Example, tokenizer: Tokenizer, length: int, on_long: str, bad_rows: BadRows) -> list[int] | None:
    """Return cls, tokens, sep (tokens, sep) in at most `length` ids; None if the example is left out."""
    special = SpecialTokens.of(tokenizer)
    try:
        texts = [special.encode(text) for text in example.texts]
    except KeyError as error:
        # An alphabet that is read off the training text lacks characters that occur only in the held-out text.
        fault = f"{error.args[0]!r} is in no training sentence, so data.tokenizer=characters has no token for it (bytes has)"
        bad_rows.refuse_or_count("characters", f"{example.place}: {fault}")
        return None
    size = 1 + sum(len(text) + 1 for text in texts)
    if size > length:
        if on_long == "refuse":
            raise DataError(
                f"{example.place} has {size} tokens, more than sequence_length={length}: raise it, or set data.on_long to cut or skip"
            )
        bad_rows.count_skipped("long sentences" if on_long == "skip" else "ends of long sentences")
        if on_long == "skip":
            return None
    sequence = [special.cls]
    for text in _truncate(texts, length - 1 - len(texts)):
        sequence += [*text.tolist(), special.sep]
    return sequence


def _truncate(texts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """Cut to `room` tokens in all; of a pair, the longer text is cut first."""
    if len(texts) == 1:
        return [texts[0][:room]]
    first, second = texts
    kept = min(len(second), max(room - len(first), room // 2))
    return [first[: room - kept], second[:kept]]
