"""What several loaders share: reading files, counting faults in them, and packing sequences of different lengths."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from rayllp.errors import DataError

Sample = TypeVar("Sample")

BLOCK = 2**20
"""Bytes that are read at a time."""


def locate(name: str, what: str) -> Path:
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


def read_lines(path: Path, what: str, max_bytes: int | None = None) -> list[str]:
    """Return the lines of a UTF-8 text file (or .gz), without line ends.

    Args:
        path: the file.
        what: the setting that named it, for errors.
        max_bytes: lines that end beyond this are left out.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, or empty; or `path` is a folder.
    """
    content = _read_bytes(path, what)
    if max_bytes is not None and len(content) > max_bytes:
        content = content[: content.rfind(b"\n", 0, max_bytes) + 1]
        if not content:
            raise DataError(f"{what} {path}: the first line is longer than data.max_bytes={max_bytes}; raise it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, why = not_utf8(content, error)
        raise DataError(f"{what} {path}:{line}: {why}; save the file as UTF-8") from None
    if "\n" not in text:  # the line ends of old Macs
        text = text.replace("\r", "\n")
    # splitlines would also split at U+2028, form feeds and the like, which belong to the text, and so shift the line numbers of errors.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not text.strip():
        raise DataError(f"{what} {path} is empty: give a file with some lines")
    return lines if lines[-1] else lines[:-1]


def read_file(what: str, path: Path) -> bytes:
    """Return the content of a file, uncompressed if it is a .gz.

    Raises:
        DataError: the file cannot be read; `what` is the setting that named it.
    """
    return b"".join(blocks(what, path))


def blocks(what: str, path: Path) -> Iterator[bytes]:
    """Yield the content of a file (uncompressed if it is a .gz) in blocks, and an empty block at its end.

    Raises:
        DataError: the file cannot be read; `what` is the setting that named it.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while True:
                block = file.read(BLOCK)
                yield block
                if not block:
                    return
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{what} {path} cannot be read: {error}; give a file, or a whole .gz of one") from None


def _read_bytes(path: Path, what: str) -> bytes:
    if not path.exists():
        raise DataError(f"{what} {path}: no such file; give a text file or a .gz of one")
    if not path.is_file():
        raise DataError(f"{what} {path} is a folder: give one text file in it, or a .gz of one")
    return read_file(what, path)


def hold_out(samples: list[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Cut off the last `fraction` of samples, at least one, for validation.

    Raises:
        DataError: there are fewer than two samples.
    """
    kept = count_kept(len(samples), fraction, "data.path", "sample", ", or set data.validation_path")
    return samples[:kept], samples[kept:]


def count_kept(count: int, fraction: float, source: str, unit: str, otherwise: str = "") -> int:
    """Return how many of `count` samples are left to train on if the last `fraction` of them, at least one, is held out.

    Args:
        count: number of samples.
        fraction: of them, to be held out.
        source, unit: where they come from, and what one is, for errors.
        otherwise: what helps beside giving more.

    Raises:
        DataError: there are fewer than two samples.
    """
    if count < 2:
        raise DataError(f"{source} has {count} {unit} to train on and to hold out from: give more{otherwise}")
    return count - max(1, int(count * fraction))


def not_utf8(content: bytes, error: UnicodeDecodeError) -> tuple[int, str]:
    """Return the number of the line where a text is not UTF-8, and what is wrong there."""
    return content.count(b"\n", 0, error.start) + 1, f"not UTF-8 ({error.reason} {content[error.start]:#04x})"


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
class Faults:
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
            DataError: faults are refused.
        """
        if not self.skip:
            raise DataError(f"{message}; mend it, or leave it out by data.on_error=skip")
        self.count_skipped(kind)

    def count_skipped(self, kind: str, number: int = 1) -> None:
        """Count items that are left out though nothing is wrong with them."""
        if number:
            self.counts[kind] = self.counts.get(kind, 0) + number


@dataclass(frozen=True)
class Rows:
    """Integer sequences of different lengths, end to end in one array: faster to send to a worker than many small arrays.

    Attributes:
        values: all sequences, int32.
        bounds: where each sequence starts, and the end of the last.
    """

    values: np.ndarray
    bounds: np.ndarray

    @staticmethod
    def of(sequences: Iterable[Iterable[int]]) -> "Rows":
        """Pack sequences."""
        arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
        bounds = np.cumsum([0, *(len(array) for array in arrays)])
        return Rows(np.concatenate([np.zeros(0, np.int32), *arrays]), bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def padded(self, indices: np.ndarray, length: int, fill: int) -> np.ndarray:
        """Return the sequences at `indices`, int64 of shape (indices, length), padded with `fill`; index -1 gives a row of `fill` alone."""
        block = np.full((len(indices), length), fill, np.int64)
        for place, index in enumerate(indices):
            if index >= 0:
                row = self.values[self.bounds[index] : self.bounds[index + 1]]
                block[place, : len(row)] = row
        return block
