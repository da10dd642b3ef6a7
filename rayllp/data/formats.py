"""File formats that are read here and not by the datasets library: tab-separated lines, CoNLL-U, idx.

The library reads no idx. Its csv and conll builders read the other two, but neither names the line of a fault nor counts what is left out:
they fill up short lines in silence, and conll cuts long ones. They are also slower: 4.8 s instead of 0.9 s for a treebank of 177,000 words.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rayllp.data.files import BadRows, read_file, read_lines
from rayllp.errors import DataError

COLUMNS = 10
LABEL_COLUMNS = {"upos": 3, "xpos": 4, "feats": 5}
"""Columns of CoNLL-U that may be a word's label."""
_WORD = re.compile(r"[1-9][0-9]*")
_RANGE_OR_EMPTY_NODE = re.compile(r"[0-9]+[-.][0-9]+")
IDX_IMAGES, IDX_LABELS = 0x0803, 0x0801
"""The first four bytes of an idx file: unsigned bytes, in three dimensions or in one."""
MNIST_FILES = "MNIST's files (train*-images-idx3-ubyte, train*-labels-idx1-ubyte, t10k-images-…, t10k-labels-…, plain or .gz)"


# Tab-separated lines ----------------------------------------------------------------------------------------------------------


def read_tsv(
    path: Path, what: str, columns: Mapping[str, str], bad_rows: BadRows, max_bytes: int | None
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the place (file:line) and the chosen cells of each line. Quotation marks are text, as in GLUE's files.

    Args:
        path, what: the file (or .gz), and the setting that names it.
        columns: the columns to read, each by the setting that chooses it: names in the first line, or numbers if the first one is a number.
        bad_rows: refuses or counts lines that have too few or too many columns, or an empty cell in a column to be read.
        max_bytes: lines that end beyond this are not read.

    Raises:
        DataError: the file cannot be read, or has no such columns; or a line is broken and bad rows are not skipped.
    """
    lines = read_lines(path, what, max_bytes)
    first = lines[0].split("\t")
    header = int(not next(iter(columns.values())).isdecimal())
    numbers = [_find_column(setting, column, first, path, bool(header)) for setting, column in columns.items()]
    for number, line in enumerate(lines[header:], header + 1):
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) != len(first):
            fault = f"{len(cells)} columns between tabs, the first line has {len(first)}"
        elif not all(cells[column].strip() for column in numbers):
            fault = "a sentence or the label is empty"
        else:
            yield f"{path}:{number}", tuple(cells[column] for column in numbers)
            continue
        bad_rows.refuse_or_count("lines", f"{path}:{number}: {fault}")


def _find_column(setting: str, name: str, first: list[str], path: Path, named: bool) -> int:
    if named:
        if name not in first:
            raise DataError(
                f"{setting} {name!r} is not a column of {path}, whose first line names {first}: "
                "set it to one of them, or all fields to numbers from 0 if that line is a sentence"
            )
        return first.index(name)
    if not name.isdecimal():
        raise DataError(f"{setting} {name!r}: data.text_field is a number, so {path} has no column names; give a number here too")
    if int(name) >= len(first):
        raise DataError(f"{setting} {name}: {path}:1 has {len(first)} columns between tabs; give a number below that")
    return int(name)


# CoNLL-U ----------------------------------------------------------------------------------------------------------------------


class LabelledWord(NamedTuple):
    """A word of a treebank, its label, and its place (file:line) for errors."""

    word: str
    label: str
    place: str


def read_conllu(path: Path, what: str, label: str, bad_rows: BadRows, max_bytes: int | None) -> Iterator[list[LabelledWord]]:
    """Yield the words of each sentence. Multiword tokens and empty nodes are left out.

    Args:
        path, what: the file (or .gz), and the setting that names it.
        label: the column that holds the labels, a key of LABEL_COLUMNS.
        bad_rows: refuses or counts sentences with a broken line.
        max_bytes: lines that end beyond this are not read.

    Raises:
        DataError: the file cannot be read; or a line is broken and bad rows are not skipped.
    """
    sentence, whole = list[LabelledWord](), True
    for number, line in enumerate([*read_lines(path, what, max_bytes), ""], 1):
        if not line.strip():
            if sentence and whole:
                yield sentence
            sentence, whole = [], True
        elif whole and not line.startswith("#"):
            columns = line.split("\t")
            if fault := _find_fault(columns, len(sentence) + 1, label):
                bad_rows.refuse_or_count("sentences", f"{path}:{number}: {fault}")
                whole = False
            elif _WORD.fullmatch(columns[0]):
                sentence.append(LabelledWord(columns[1], columns[LABEL_COLUMNS[label]], f"{path}:{number}"))


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


# idx --------------------------------------------------------------------------------------------------------------------------


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Return the content of an idx file (or .gz) of unsigned bytes.

    Args:
        path: the file.
        magic: the number that it has to begin with, IDX_IMAGES or IDX_LABELS; its last byte is the number of dimensions.

    Raises:
        DataError: the file cannot be read, begins with another number, or is not as long as its header says.
    """
    content = read_file("data.path", path)
    dimensions = magic & 0xFF
    start = 4 + 4 * dimensions
    if len(content) < start or int.from_bytes(content[:4], "big") != magic:
        kind = "images" if magic == IDX_IMAGES else "labels"
        raise DataError(
            f"data.path {path} begins with 0x{content[:4].hex()}, not with an idx file of {kind}' 0x{magic:08x}: give MNIST's files"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    if len(content) - start != math.prod(shape) or not math.prod(shape):
        raise DataError(
            f"data.path {path} names {' × '.join(map(str, shape))} bytes in its header, but {len(content) - start} follow: "
            "it is empty, cut short or altered; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
