"""Word classification: one label for each word of a treebank in CoNLL-U, or of a table with lists of words and labels."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, Facts, passes
from rayllp.data.files import Faults, Rows, locate, read_lines, refuse_one_class
from rayllp.data.hub import Split, name_of, up_to
from rayllp.data.sampling import Order, select
from rayllp.data.sources import Table, read_splits
from rayllp.errors import DataError

PADDING, UNKNOWN, FIRST_WORD = 0, 1, 2
COLUMNS = 10
LABEL_COLUMNS = {"upos": 3, "xpos": 4, "feats": 5}
_WORD = re.compile(r"[1-9][0-9]*")
_RANGE_OR_EMPTY_NODE = re.compile(r"[0-9]+[-.][0-9]+")


@dataclass
class _Sentence:
    """Words, their labels, and their places (file:line) for errors."""

    words: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class WordBatches:
    """Sentences as word ids; targets are the words' labels.

    Attributes:
        words: of each split, the word ids of each sentence, or of each piece of one that is too long.
        labels: of each split, the class numbers of these words.
        sequence_length: largest number of words in a piece.
        order: the order in which training takes its samples.
        index: id of each word of the vocabulary.
        classes: names of the labels.
        skipped: how many sentences and labels were left out (data.on_error=skip).
    """

    words: dict[str, Rows]
    labels: dict[str, Rows]
    sequence_length: int
    order: Order
    index: dict[str, int]
    classes: tuple[str, ...]
    skipped: dict[str, int]

    @property
    def facts(self) -> Facts:
        """Size of the vocabulary, the class names, and the padding id."""
        return Facts(vocabulary=FIRST_WORD + len(self.index), classes=self.classes, pad=PADDING)

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return word ids and class numbers, both of shape (size, sequence_length)."""
        indices = select(self.order, split, step, len(self.words[split]), size)
        inputs = self.words[split].padded(indices, self.sequence_length, PADDING)
        # Attention needs at least one token that is not padding, so rows beyond the end hold an unknown word.
        inputs[indices < 0, 0] = UNKNOWN
        targets = self.labels[split].padded(indices, self.sequence_length, IGNORE)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def batches(self, split: str, size: int) -> int:
        """Return the number of batches in one pass through a split."""
        return passes(len(self.words[split]), size)


def load_words(settings: DataSettings, sequence_length: int, seed: int) -> WordBatches:
    """Read a treebank, number its words and labels, and cut sentences longer than `sequence_length` into pieces.

    Words that occur fewer than `data.min_count` times in training share one id with words that do not occur there. With min_count 1 that id
    is never trained.

    Raises:
        DataError: there is no file, it cannot be read, or it has no sentences; a line is broken, or a held-out label does not occur in
            training, and faults are not skipped.
    """
    faults = Faults(settings.on_error == "skip")
    train, validation = _read_splits(settings, faults)
    index = _number_words(train, settings.min_count)
    classes = tuple(sorted({label for sentence in train for label in sentence.labels}))
    refuse_one_class(classes, f"data.path {settings.path}")
    numbers = {name: number for number, name in enumerate(classes)}
    words: dict[str, Rows] = {}
    labels: dict[str, Rows] = {}
    for split, sentences in (("train", train), ("validation", validation)):
        ids = [[index.get(word, UNKNOWN) for word in sentence.words] for sentence in sentences]
        targets = [_number_labels(sentence, numbers, faults) for sentence in sentences]
        words[split], labels[split] = Rows.of(_cut(ids, sequence_length)), Rows.of(_cut(targets, sequence_length))
    return WordBatches(words, labels, sequence_length, Order(seed, settings.sampling), index, classes, faults.counts)


def _read_splits(settings: DataSettings, faults: Faults) -> tuple[list[_Sentence], list[_Sentence]]:
    if settings.path is None and settings.dataset is None:
        raise DataError(
            "there is no data.path: word classification needs one, a treebank in CoNLL-U (.conllu or .conllu.gz; universaldependencies.org "
            "has them for many languages) or a table with a list of words and one of labels in each row; or data.dataset"
        )
    return read_splits(
        settings,
        lambda table, limit: _read_table(table, settings, faults, limit),
        lambda name, what, limit: _read_treebank(name, what, settings, faults, limit),
    )


def _read_table(table: Table, settings: DataSettings, faults: Faults, max_bytes: int | None) -> list[_Sentence]:
    """Read the rows of a table, a list of words and a list of labels each, up to `max_bytes` of words."""
    split = table.open()
    for setting, column in (("data.text_field", settings.text_field), ("data.label_field", settings.label_field)):
        split.require(setting, column)
    rows = _sentences(split, settings, faults)
    sentences = list(up_to(max_bytes, rows, lambda sentence: sum(len(word.encode()) + 1 for word in sentence.words)))
    if not sentences:
        limit = "" if max_bytes is None else f" within data.max_bytes={max_bytes}"
        raise DataError(f"{split.source} has no row with words and labels{limit}: give some")
    return sentences


def _sentences(split: Split, settings: DataSettings, faults: Faults) -> Iterator[_Sentence]:
    names = split.labels(settings.label_field)
    for number, (words, labels) in enumerate(split.rows(settings.text_field, settings.label_field)):
        place = f"{split.source} row {number}"
        if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels) or None in (*words, *labels):
            faults.refuse_or_count(
                "sentences",
                f"{place} has no list of words in column {settings.text_field!r}, with as many labels in {settings.label_field!r}",
            )
        elif words:
            yield _Sentence([str(word) for word in words], [name_of(label, names) for label in labels], [place] * len(words))


def _read_treebank(name: str, what: str, settings: DataSettings, faults: Faults, max_bytes: int | None) -> list[_Sentence]:
    label = "upos" if settings.label_field == "label" else settings.label_field
    if label not in LABEL_COLUMNS:
        raise DataError(f"data.label_field {label!r} is no label of words: set it to one of {', '.join(LABEL_COLUMNS)}")
    path = locate(name, what)
    blocks = _blocks(read_lines(path, what, max_bytes))
    sentences = [sentence for block in blocks if (sentence := _parse(path, block, label, faults)) and sentence.words]
    if not sentences:
        left_out = f" ({faults.counts['sentences']} were left out as broken)" if "sentences" in faults.counts else ""
        raise DataError(f"{what} {path} has no sentence with words{left_out}: give a treebank in CoNLL-U")
    return sentences


def _blocks(lines: list[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield the numbered lines of each sentence, without comments."""
    block: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            yield block
            block = []
        elif not line.startswith("#"):
            block.append((number, line))
    yield block


def _parse(path: Path, block: list[tuple[int, str]], label: str, faults: Faults) -> _Sentence | None:
    """Return the sentence of a block of lines; None if it is broken and faults are skipped."""
    sentence = _Sentence()
    for number, line in block:
        columns = line.split("\t")
        fault = _find_fault(columns, len(sentence.words) + 1, label)
        if fault:
            faults.refuse_or_count("sentences", f"{path}:{number}: {fault}")
            return None
        if _WORD.fullmatch(columns[0]):
            sentence.words.append(columns[1])
            sentence.labels.append(columns[LABEL_COLUMNS[label]])
            sentence.places.append(f"{path}:{number}")
    return sentence


def _find_fault(columns: list[str], next_id: int, label: str) -> str | None:
    """Return what is wrong with a line of CoNLL-U; None if nothing is."""
    if len(columns) != COLUMNS:
        return f"CoNLL-U has {COLUMNS} columns between tabs, this line {len(columns)}"
    if _RANGE_OR_EMPTY_NODE.fullmatch(columns[0]):
        return None
    if not _WORD.fullmatch(columns[0]):
        return f"id {columns[0]!r} is none of CoNLL-U's: a number such as 1, a range 1-2 or an empty node 1.1"
    if int(columns[0]) != next_id:
        return f"id {columns[0]} where {next_id} should follow (an empty line ends a sentence)"
    if not columns[1]:
        return "the word (column 2) is empty"
    value = columns[LABEL_COLUMNS[label]]
    # An underscore means "no features" in feats, but "not given" elsewhere.
    if not value or (value == "_" and label != "feats"):
        return f"{label} (column {LABEL_COLUMNS[label] + 1}) is {value!r}, no label"
    return None


def _number_words(sentences: list[_Sentence], min_count: int) -> dict[str, int]:
    """Number the words that occur often enough, the most frequent first."""
    counts = Counter(word for sentence in sentences for word in sentence.words)
    kept = sorted((word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word))
    if not kept:
        raise DataError(f"no word occurs data.min_count={min_count} times, the most frequent {max(counts.values())} times: lower it")
    return {word: number for number, word in enumerate(kept, FIRST_WORD)}


def _number_labels(sentence: _Sentence, numbers: dict[str, int], faults: Faults) -> list[int]:
    """Return the class numbers of a sentence's labels; IGNORE for one that does not occur in training, if faults are skipped."""
    for label, place in zip(sentence.labels, sentence.places, strict=True):
        if label not in numbers:
            faults.refuse_or_count("labels", f"{place}: label {label!r} is in no training sentence")
    return [numbers.get(label, IGNORE) for label in sentence.labels]


def _cut(sequences: list[list[int]], length: int) -> Iterator[list[int]]:
    """Yield pieces of at most `length` elements."""
    for sequence in sequences:
        for start in range(0, len(sequence), length):
            yield sequence[start : start + length]
