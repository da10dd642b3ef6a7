"""Word classification: one label for each word of a treebank in CoNLL-U, or of a table with lists of words and labels."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, Dataset, DatasetFacts, checksum
from rayllp.data.datasets_io import named
from rayllp.data.files import BadRows, RaggedArray, bytes_of, refuse_one_class
from rayllp.data.formats import LABEL_COLUMNS, LabelledWord, read_conllu
from rayllp.data.sampling import SampleOrder
from rayllp.data.sources import Files, Table, is_tsv, read_samples, read_splits
from rayllp.errors import DataError

PADDING, UNKNOWN, FIRST_WORD = 0, 1, 2
_Sentence = list[LabelledWord]


@dataclass(frozen=True, kw_only=True)
class WordBatches(Dataset):
    """Sentences as word ids; targets are the words' labels.

    Attributes:
        words: for each split, the word ids of each sentence, or of each piece of one that is too long.
        labels: for each split, the class numbers of these words.
        sequence_length: largest number of words in a piece.
        index: id of each word of the vocabulary.
    """

    words: dict[str, RaggedArray]
    labels: dict[str, RaggedArray]
    sequence_length: int
    index: dict[str, int]

    @property
    def facts(self) -> DatasetFacts:
        """Size of the vocabulary, the class names, and the padding id."""
        return DatasetFacts(vocabulary=FIRST_WORD + len(self.index), classes=self.classes, pad=PADDING)

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return word ids and class numbers, both of shape (size, sequence_length)."""
        indices = self.chosen(split, step, size)
        inputs = self.words[split].padded(indices, self.sequence_length, PADDING)
        # Attention needs at least one token that is not padding, so rows beyond the end hold an unknown word.
        inputs[indices < 0, 0] = UNKNOWN
        targets = self.labels[split].padded(indices, self.sequence_length, IGNORE)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def count(self, split: str) -> int:
        """Return the number of sentences, or pieces of them, in a split."""
        return len(self.words[split])

    def content(self, split: str) -> list[Any]:
        """Return a split's word ids and class numbers."""
        return [["words", self.words[split].parts], ["labels", self.labels[split].parts]]

    @property
    def meaning(self) -> str:
        """A checksum of what word ids and class numbers stand for."""
        return checksum([None, list(self.index.items()), self.classes])


def load_words(settings: DataSettings, sequence_length: int, seed: int) -> WordBatches:
    """Read a treebank, number its words and labels, and cut sentences longer than `sequence_length` into pieces.

    Words that occur fewer than `data.min_count` times in training share one id with words that do not occur there. With min_count 1 that id
    is never trained.

    Raises:
        DataError: there is no file, it cannot be read, or it has no sentences; a line is broken, or a held-out label does not occur in
            training, and bad rows are not skipped.
    """
    bad_rows = BadRows(settings.on_error == "skip")
    read = _read_splits(settings, bad_rows)
    index = _number_words(read["train"], settings.min_count)
    classes = tuple(sorted({word.label for sentence in read["train"] for word in sentence}))
    refuse_one_class(classes, named(settings))
    numbers = {name: number for number, name in enumerate(classes)}
    words: dict[str, RaggedArray] = {}
    labels: dict[str, RaggedArray] = {}
    for split, sentences in read.items():
        ids = [[index.get(word.word, UNKNOWN) for word in sentence] for sentence in sentences]
        targets = [_number_labels(sentence, numbers, bad_rows) for sentence in sentences]
        words[split], labels[split] = RaggedArray.of(_cut(ids, sequence_length)), RaggedArray.of(_cut(targets, sequence_length))
    return WordBatches(
        words=words, labels=labels, sequence_length=sequence_length, order=SampleOrder(seed, settings.sampling), index=index,
        classes=classes, skipped=bad_rows.counts,
    )  # fmt: skip


def _read_splits(settings: DataSettings, bad_rows: BadRows) -> dict[str, list[_Sentence]]:
    columns = {"data.text_field": settings.text_field, "data.label_field": settings.label_field}

    make = partial(_of_row, columns=tuple(columns.values()), bad_rows=bad_rows)

    def read(source: Table | Files) -> list[_Sentence]:
        if isinstance(source, Table) and not is_tsv(source):  # cells of a .tsv hold no lists, but a treebank may have that ending
            return read_samples(source, columns, make, _bytes, "words and labels", bad_rows)
        label = "upos" if settings.label_field == "label" else settings.label_field
        if label not in LABEL_COLUMNS:
            raise DataError(f"data.label_field {label!r} is not a label of words: set it to one of {', '.join(LABEL_COLUMNS)}")
        assert source.path is not None
        sentences = list(read_conllu(source.path, source.setting, label, bad_rows, source.max_bytes))
        if not sentences:
            left_out = f" ({bad_rows.counts['sentences']} were left out as broken)" if "sentences" in bad_rows.counts else ""
            raise DataError(f"{source.name} has no sentence with words{left_out}: give a treebank in CoNLL-U")
        return sentences

    needed = (
        "word classification needs one, a treebank in CoNLL-U (.conllu or .conllu.gz; universaldependencies.org has them for many "
        "languages) or a table with a list of words and one of labels in each row; or data.dataset"
    )
    return read_splits(settings, read, needed)


def _bytes(sentence: _Sentence) -> int:
    return bytes_of(word.word for word in sentence)


def _of_row(place: str, values: tuple[Any, ...], columns: tuple[str, ...], bad_rows: BadRows) -> _Sentence | None:
    """Return the sentence in a row of a table; None if it has no words, or is broken and bad rows are skipped."""
    words, labels = values
    if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels) or None in (*words, *labels):
        fault = f"{place} has no list of words in column {columns[0]!r}, with as many labels in {columns[1]!r}"
        bad_rows.refuse_or_count("sentences", fault)
        return None
    return [LabelledWord(str(word), str(label), place) for word, label in zip(words, labels, strict=True)] or None


def _number_words(sentences: list[_Sentence], min_count: int) -> dict[str, int]:
    """Number the words that occur often enough, the most frequent first."""
    counts = Counter(word.word for sentence in sentences for word in sentence)
    kept = sorted((word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word))
    if not kept:
        raise DataError(f"no word occurs data.min_count={min_count} times, the most frequent {max(counts.values())} times: lower it")
    return {word: number for number, word in enumerate(kept, FIRST_WORD)}


def _number_labels(sentence: _Sentence, numbers: dict[str, int], bad_rows: BadRows) -> list[int]:
    """Return the class numbers of a sentence's labels; IGNORE for one that does not occur in training, if bad rows are skipped."""
    for word in sentence:
        if word.label not in numbers:
            bad_rows.refuse_or_count("labels", f"{word.place}: label {word.label!r} is in no training sentence")
    return [numbers.get(word.label, IGNORE) for word in sentence]


def _cut(sequences: list[list[int]], length: int) -> Iterator[list[int]]:
    """Yield pieces of at most `length` elements."""
    for sequence in sequences:
        for start in range(0, len(sequence), length):
            yield sequence[start : start + length]
