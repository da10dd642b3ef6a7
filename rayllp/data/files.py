"""What loaders share: lines of a file, faults in them, sequences of many lengths."""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from rayllp.config import DataSettings
from rayllp.errors import DataError

Sample = TypeVar("Sample")

BLOCK = 2**20
"""Bytes that are read at a time."""


def locate(name: str, what: str) -> Path:
    """The path that a setting names, ~ for a home.

    Raises:
        DataError: it can be no path: nobody's home, or longer than paths are.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise DataError(f"{what} {name}: {getattr(error, 'strerror', None) or error}; give the path of a file or folder") from None
    return path


def read_lines(path: Path, what: str, max_bytes: int | None = None) -> list[str]:
    """The lines of a UTF-8 text file or a .gz of one, without their ends.

    Args:
        path: the file.
        what: the setting that named it, for errors.
        max_bytes: lines that end beyond this are not read.

    Raises:
        DataError: missing, no file, unreadable, not UTF-8, or empty.
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
    if "\n" not in text:  # as old Macs ended lines
        text = text.replace("\r", "\n")
    # Not splitlines: U+2028, form feeds and the like belong to the text, and would shift the line numbers of errors.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not text.strip():
        raise DataError(f"{what} {path} is empty: give a file with some lines")
    return lines if lines[-1] else lines[:-1]


def read_file(what: str, path: Path) -> bytes:
    """The content of a file, or of a .gz of one.

    Raises:
        DataError: names the file, as `what`.
    """
    return b"".join(blocks(what, path))


def blocks(what: str, path: Path) -> Iterator[bytes]:
    """The content of a file, of a .gz unpacked, and an empty block at its end.

    Raises:
        DataError: names the file, as `what`.
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


def train_and_held_out(settings: DataSettings, read: Callable[[str, str, int | None], list[Sample]]) -> tuple[list[Sample], list[Sample]]:
    """Samples of data.path, and those of data.validation_path or else the end of the former.

    Args:
        read: path, the setting that names it, bytes beyond which it is not read -> samples.
    """
    assert settings.path is not None
    train = read(settings.path, "data.path", settings.max_bytes)
    if settings.validation_path is None:
        return hold_out(train, settings.validation_fraction)
    return train, read(settings.validation_path, "data.validation_path", None)


def hold_out(samples: list[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Cut off the last `fraction`, at least one sample, for validation.

    Raises:
        DataError: fewer than two samples.
    """
    if len(samples) < 2:
        raise DataError(f"data.path has {len(samples)} sample to train on and to hold out from: give more, or set data.validation_path")
    held = max(1, int(len(samples) * fraction))
    return samples[:-held], samples[-held:]


def not_utf8(content: bytes, error: UnicodeDecodeError) -> tuple[int, str]:
    """The line where a text is no UTF-8, and what is wrong there."""
    return content.count(b"\n", 0, error.start) + 1, f"not UTF-8 ({error.reason} {content[error.start]:#04x})"


def refuse_one_class(labels: Iterable[str], source: str) -> None:
    """Refuse labels that are all the same: there is nothing to learn.

    Raises:
        DataError: they are.
    """
    distinct = set(labels)
    if len(distinct) == 1:
        raise DataError(
            f"{source}: every label is {distinct.pop()!r}, so there is nothing to learn: give data with two classes or more, or set "
            "data.label_field to the column that has them"
        )


@dataclass
class Faults:
    """Broken lines and unseen labels: refused, or left out and counted.

    Attributes:
        skip: leave out and count (data.on_error=skip).
        counts: how many of each kind were left out.
    """

    skip: bool
    counts: dict[str, int] = field(default_factory=dict)

    def report(self, kind: str, message: str) -> None:
        """One fault of a kind.

        Raises:
            DataError: faults are refused.
        """
        if not self.skip:
            raise DataError(f"{message}; mend it, or leave it out by data.on_error=skip")
        self.count(kind)

    def count(self, kind: str, number: int = 1) -> None:
        """So many that are left out without being faults."""
        if number:
            self.counts[kind] = self.counts.get(kind, 0) + number


@dataclass(frozen=True)
class Rows:
    """Integer sequences of many lengths, end to end: a few large arrays travel to a worker faster than many small ones."""

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
        """The rows at `indices`, int64 of shape (indices, length), filled up with `fill`; index -1 is a row of nothing else."""
        block = np.full((len(indices), length), fill, np.int64)
        for place, index in enumerate(indices):
            if index >= 0:
                row = self.values[self.bounds[index] : self.bounds[index + 1]]
                block[place, : len(row)] = row
        return block
