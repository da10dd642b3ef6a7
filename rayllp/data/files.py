"""Helpers of several loaders: reading files, counting bad rows in them, and packing sequences of different lengths into one array."""

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import numpy as np

from rayllp.errors import DataError

Sample = TypeVar("Sample")

BLOCK = 2**20
"""Bytes that are read at a time."""


def chunks(items: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Yield the items in lists of `size`; the last list may be shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def local_path(name: str, what: str) -> Path:
    """Return the path that a setting names, with ~ expanded.

    Raises:
        DataError: it cannot be a path: ~ names an unknown user, or the name is too long.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise DataError(f"{what} {name}: {getattr(error, 'strerror', None) or error}; give the path of a file or folder") from None
    return path


def plain_or_gz(path: Path) -> Path | None:
    """Return a file's path, or that of its .gz; None if there is neither."""
    return next((each for each in (path, path.with_name(f"{path.name}.gz")) if each.is_file()), None)


@contextmanager
def opened(what: str, path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, uncompressed if it is a .gz.

    Raises:
        DataError: the file cannot be read, now or while it is open; `what` is the setting that named it.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{what} {path} cannot be read: {error}; give a file, or a whole .gz of one") from None


def read_file(what: str, path: Path) -> bytes:
    """Return the content of a file, uncompressed if it is a .gz; see `opened` for errors."""
    with opened(what, path) as file:
        return file.read()


def read_lines(path: Path, what: str, max_bytes: int | None = None) -> list[str]:
    """Return the lines of a UTF-8 text file (or .gz), without line ends.

    Args:
        path: the file.
        what: the setting that named it, for errors.
        max_bytes: lines that end beyond this are not read.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, or empty; or `path` is a folder.
    """
    if not path.exists():
        raise DataError(f"{what} {path}: no such file; give a text file or a .gz of one")
    if path.is_dir():
        raise DataError(f"{what} {path} is a folder: give one text file in it, or a .gz of one")
    lines, size, ended = list[str](), 0, True
    with opened(what, path) as file:
        # Bytes are split at \n alone. Text would also be split at a lone \r, and by splitlines at U+2028, form feeds and the like. These
        # belong to the text, and splitting there would shift the line numbers of errors.
        for line in file:
            size += len(line)
            if max_bytes is not None and size > max_bytes:
                break
            ended = line.endswith(b"\n")
            try:
                lines.append(line.decode("utf-8" if lines else "utf-8-sig").removesuffix("\n").removesuffix("\r"))
            except UnicodeDecodeError as error:
                raise DataError(f"{what} {path}:{len(lines) + 1}: {not_utf8(error)[1]}; save the file as UTF-8") from None
    if size and not lines:
        raise DataError(f"{what} {path}: the first line is longer than data.max_bytes={max_bytes}; raise it")
    if len(lines) == 1 and not ended:  # the line ends of old Macs
        lines = lines[0].split("\r")
    if not any(line.strip() for line in lines):
        raise DataError(f"{what} {path} is empty: give a file with some lines")
    return lines


class NoTextError(ValueError):
    """A file is not text. The message says why, and is written to follow the file's path."""


def read_text_file(what: str, path: Path) -> Iterator[str]:
    """Yield the content of a UTF-8 file (or .gz) in pieces, without its byte order mark.

    Raises:
        NoTextError: it is not text; the message gives the line.
        DataError: it cannot be read.
    """
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    with opened(what, path) as file:
        for number, block in enumerate(chain(iter(partial(file.read, BLOCK), b""), [b""])):
            if number == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise NoTextError(" is UTF-16: save it as UTF-8")
            if (zero := block.find(0)) >= 0:
                at = line + block.count(b"\n", 0, zero)
                raise NoTextError(f":{at} holds a zero byte: it is not text, damaged, or UTF-16; fix it and save it as UTF-8")
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                within, why = not_utf8(error)
                raise NoTextError(f":{line + within - 1}: {why}; save the file as UTF-8") from None
            line += text.count("\n")
            if text:
                yield text


def not_utf8(error: UnicodeDecodeError) -> tuple[int, str]:
    """Return the number of the line where a text is not UTF-8, and what is wrong there."""
    return error.object.count(b"\n", 0, error.start) + 1, f"not UTF-8 ({error.reason} {error.object[error.start]:#04x})"


def bytes_of(texts: Iterable[str]) -> int:
    """Return the size of some texts in UTF-8, each with a line end."""
    return sum(len(text.encode()) + 1 for text in texts)


def hold_out(samples: list[Sample], fraction: float, source: str) -> tuple[list[Sample], list[Sample]]:
    """Cut off the last `fraction` of samples, at least one, for validation.

    Args:
        samples: all samples.
        fraction: share of them to hold out.
        source: where they come from, for the error.

    Raises:
        DataError: there are fewer than two samples.
    """
    kept = count_kept(len(samples), fraction, source, "sample", ", or set data.validation_path")
    return samples[:kept], samples[kept:]


def count_kept(count: int, fraction: float, source: str, unit: str, otherwise: str = "") -> int:
    """Return how many of `count` samples are left to train on if the last `fraction` of them, at least one, is held out.

    Args:
        count: number of samples.
        fraction: share of them to hold out.
        source, unit: where they come from, and what one is, for errors.
        otherwise: end of the error message: what helps besides giving more samples.

    Raises:
        DataError: there are fewer than two samples.
    """
    if count < 2:
        raise DataError(f"{source} has {count} {unit} to train on and to hold out from: give more{otherwise}")
    return count - max(1, int(count * fraction))


def refuse_one_class(labels: Iterable[str], source: str) -> None:
    """Refuse labels that are all the same, since there would be nothing to learn.

    Raises:
        DataError: all labels are the same.
    """
    distinct = set(labels)
    if len(distinct) == 1:
        raise DataError(
            f"{source}: every label is {distinct.pop()!r}, so there is nothing to learn: give data with two classes or more, or set "
            "data.label_field to the column that has them"
        )


@dataclass
class BadRows:
    """Counts broken lines, unseen labels and the like, or refuses the first of them.

    Attributes:
        skip: leave faulty items out and count them (data.on_error=skip).
        counts: how many were left out, by kind.
    """

    skip: bool
    counts: dict[str, int] = field(default_factory=dict)

    def refuse_or_count(self, kind: str, message: str) -> None:
        """Refuse a faulty item, or count it as left out.

        Raises:
            DataError: bad rows are refused.
        """
        if not self.skip:
            raise DataError(f"{message}; fix it, or leave it out by data.on_error=skip")
        self.count_skipped(kind)

    def count_skipped(self, kind: str, number: int = 1) -> None:
        """Count items that are left out though nothing is wrong with them."""
        if number:
            self.counts[kind] = self.counts.get(kind, 0) + number


@dataclass(frozen=True)
class RaggedArray:
    """Integer sequences of different lengths, end to end in one array: faster to send to a worker than many small arrays.

    Attributes:
        values: all sequences, int32.
        bounds: where each sequence starts, and the end of the last.
    """

    values: np.ndarray
    bounds: np.ndarray

    @staticmethod
    def of(sequences: Iterable[Iterable[int]]) -> "RaggedArray":
        """Pack sequences."""
        arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
        bounds = np.cumsum([0, *(len(array) for array in arrays)])
        return RaggedArray(np.concatenate([np.zeros(0, np.int32), *arrays]), bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def parts(self) -> list[np.ndarray]:
        """The two arrays that hold it."""
        return [self.values, self.bounds]

    def padded(self, indices: np.ndarray, length: int, fill: int) -> np.ndarray:
        """Return the sequences at `indices`, int64 of shape (indices, length), padded with `fill`; index -1 gives a row of `fill` alone."""
        block = np.full((len(indices), length), fill, np.int64)
        for place, index in enumerate(indices):
            if index >= 0:
                row = self.values[self.bounds[index] : self.bounds[index + 1]]
                block[place, : len(row)] = row
        return block
