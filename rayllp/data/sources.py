"""Where data come from: text files, folders, tables, data sets. Text is read in pieces, so it may be larger than memory."""

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rayllp.config import DataSettings
from rayllp.data.cache import stamp
from rayllp.data.datasets_io import Split, is_table, load_split, named, own_held_out, stamp_of, up_to, visible_files
from rayllp.data.files import BadRows, NoTextError, Sample, hold_out, local_path, read_text_file
from rayllp.data.formats import read_tsv
from rayllp.errors import DataError

DEFAULT_TEXT_BYTES = 4_000_000
TABLE_KINDS = "json, jsonl, csv, tsv, parquet, arrow, or a folder written by save_to_disk"
Document = Iterable[str]
"""A text in pieces of any length."""


class Source(Protocol):
    """A sequence of texts that can be read any number of times."""

    @property
    def name(self) -> str:
        """The setting that names the source, and its value, for errors."""
        ...

    @property
    def max_bytes(self) -> int | None:
        """How much of it is read at most; None: all."""
        ...

    def stamp(self) -> Any:
        """Return plain values that identify the content."""
        ...

    def documents(self, bad_rows: BadRows) -> Iterator[Document]:
        """Yield the texts; each has to be read to its end before the next one.

        Raises:
            DataError: something is not text, or cannot be read.
        """
        ...


@dataclass(frozen=True)
class Files:
    """Text files, plain or .gz.

    Attributes:
        setting: the setting that names them.
        path: the file, or the folder in which they were found, where some may not be text.
        paths: the files.
        max_bytes: how much of them is read at most.
    """

    setting: str
    path: Path
    paths: tuple[Path, ...]
    max_bytes: int | None = None

    @property
    def name(self) -> str:
        """The setting and its value."""
        return f"{self.setting} {self.path}"

    def stamp(self) -> Any:
        """Return the files' names, sizes and times, and for small files a hash of the content."""
        return stamp(self.paths)

    def documents(self, bad_rows: BadRows) -> Iterator[Document]:
        """Yield each file as one text."""
        for path in self.paths:
            if path == self.path or not bad_rows.skip or self._is_text(path, bad_rows):
                yield self._read(path)

    def _read(self, path: Path) -> Iterator[str]:
        try:
            yield from read_text_file(self.setting, path)
        except NoTextError as error:
            if path == self.path:
                raise DataError(f"{self.name}{error}") from None
            raise DataError(
                f"{self.name} is read as a folder of texts, and {path}{error}; fix it, or leave it out by data.on_error=skip"
            ) from None

    def _is_text(self, path: Path, bad_rows: BadRows) -> bool:
        """True if a file is text to its end; otherwise it is counted as left out."""
        try:
            for _ in read_text_file(self.setting, path):
                pass
        except NoTextError as error:
            bad_rows.refuse_or_count("files", f"{path}{error}")
            return False
        return True


@dataclass(frozen=True)
class Table:
    """A table that the datasets library reads.

    Attributes:
        setting: the setting that names it.
        settings: the data settings that say which data set it is.
        split_setting, split: one of its splits, and the setting that names it.
        max_bytes: how much of it is read at most.
    """

    setting: str
    settings: DataSettings
    split_setting: str
    split: str
    max_bytes: int | None = None

    @property
    def name(self) -> str:
        """The setting and its value."""
        return f"{self.setting} {self.settings.dataset or self.path}"

    @property
    def path(self) -> Path | None:
        """The file or folder, if it is one."""
        return None if self.settings.path is None else local_path(self.settings.path, self.setting)

    def rows_stamp(self) -> list[Any]:
        """Return plain values that identify the rows: those of its files, or the library's hash of the data set."""
        return [stamp_of(self.settings), self.settings.subset, self.split, *([self.max_bytes] if self.settings.streaming else [])]

    def stamp(self) -> Any:
        """Return plain values that identify the texts: those that identify the rows, and the name of the column."""
        return [self.rows_stamp(), self.settings.text_field]

    def documents(self, bad_rows: BadRows) -> Iterator[Document]:
        """Yield the text of each row, from the column `data.text_field`."""
        return ((text,) for text in self.open().texts("data.text_field", self.settings.text_field, bad_rows))

    def open(self) -> Split:
        """Open the split for reading its rows in order."""
        what = None if self.settings.dataset else self.name
        return load_split(self.settings, self.split_setting, self.split, stream=True, what=what)


# Training and held-out data ---------------------------------------------------------------------------------------------------


def sources(settings: DataSettings) -> tuple[Table | Files, Table | Files | None]:
    """Return what to train on and what is held out; None: the end of the training data is held out.

    Raises:
        DataError: there is no such file.
    """
    train = _training(settings)
    return train, _held_out(settings, train)


def tables(settings: DataSettings) -> tuple[Table, Table | None]:
    """Return the training and the held-out table; None: the end of the training table is held out.

    Raises:
        DataError: there is no such file, or it is not a table.
    """
    train, held_out = sources(settings)
    if not isinstance(train, Table):
        raise DataError(f"data.path {settings.path or '(none)'} is not a table: give one ({TABLE_KINDS}), or data.dataset")
    if isinstance(held_out, Files):
        raise DataError(f"{held_out.name} is not a table: give one ({TABLE_KINDS})")
    return train, held_out


def read_splits(settings: DataSettings, read: Callable[[Table | Files], list[Sample]], needed: str) -> dict[str, list[Sample]]:
    """Return training and held-out samples. Where there is no held-out table or file, the end of the training samples is held out.

    Args:
        settings: name the tables or files.
        read: reads the samples of either.
        needed: what data.path should be, for the error if neither it nor data.dataset is set.

    Raises:
        DataError: neither is set, or the data cannot be read.
    """
    if settings.path is None and settings.dataset is None:
        raise DataError(f"there is no data.path: {needed}")
    source, held_out = sources(settings)
    train = read(source)
    train, validation = hold_out(train, settings.validation_fraction, named(settings)) if held_out is None else (train, read(held_out))
    return {"train": train, "validation": validation}


def read_samples(
    source: Table | Files,
    columns: Mapping[str, str],
    make: Callable[[str, tuple[Any, ...]], Sample | None],
    size: Callable[[Sample], int],
    wanted: str,
    bad_rows: BadRows,
) -> list[Sample]:
    """Return the samples in a table's rows, or in the lines of a tab-separated file.

    Args:
        source: the table or file.
        columns: names of the columns to read, each by the setting that names it; the last one holds labels.
        make: (place of a row, its values in these columns) -> sample; None: the row is left out.
        size: sample -> bytes of text in it.
        wanted: what a row should hold, for errors.
        bad_rows: refuses or counts broken lines.

    Raises:
        DataError: a column does not exist, or there is no sample.
    """
    made = (make(place, values) for place, values in _rows(source, columns, bad_rows))
    samples = list(up_to(source.max_bytes, (sample for sample in made if sample is not None), size))
    if not samples:
        within = "" if source.max_bytes is None else f" within data.max_bytes={source.max_bytes}"
        left_out = f" ({bad_rows.counts} were left out)" if bad_rows.counts else ""
        raise DataError(f"{source.name} has no row with {wanted}{within}{left_out}: give some")
    return samples


def _rows(source: Table | Files, columns: Mapping[str, str], bad_rows: BadRows) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the place of each row and its values in these columns. A file of lines is read here, 30 times as fast as by the library."""
    if isinstance(source, Files) or is_tsv(source):
        assert source.path is not None
        yield from read_tsv(source.path, source.setting, columns, bad_rows, source.max_bytes)
        return
    split = source.open()
    split.require(columns)
    *others, label = columns.values()
    yield from split.rows(*others, label=label)


def is_tsv(source: Table | Files) -> bool:
    """True if a table is a single file of tab-separated lines."""
    return source.path is not None and source.path.is_file() and source.path.name.lower().removesuffix(".gz").endswith(".tsv")


def _training(settings: DataSettings) -> Table | Files:
    """Return what the settings name to train on; the source files of Python's standard library if they name nothing."""
    if settings.dataset:
        return Table("data.dataset", settings, "data.split", settings.split, settings.max_bytes)
    if settings.path:
        return _at("data.path", settings.path, settings, settings.split, settings.max_bytes)
    return Files("the", Path("standard library"), tuple(_standard_library()), settings.max_bytes)


def _held_out(settings: DataSettings, train: Table | Files) -> Table | Files | None:
    """Return what is held out: the split or file that the settings name, else a split that the data set holds out itself.

    None: it has none, and the end of the training data is held out. Of a stream, whose end may be far, no more is read than to train on.
    """
    if settings.validation_path:
        return _at("data.validation_path", settings.validation_path, settings, "train", None)
    if not isinstance(train, Table):
        if settings.validation_split:
            raise DataError(f"data.validation_split {settings.validation_split}: {train.name} has no splits; set data.validation_path")
        return None
    split = settings.validation_split or own_held_out(train.settings, train.split)
    limit = settings.max_bytes if train.settings.streaming else None
    return replace(train, split_setting="data.validation_split", split=split, max_bytes=limit) if split else None


def _at(setting: str, name: str, settings: DataSettings, split: str, max_bytes: int | None) -> Table | Files:
    """Return the table, file or folder of texts at a path.

    Raises:
        DataError: the path does not exist.
    """
    path = local_path(name, setting)
    if not path.exists():
        raise DataError(f"{setting} {path}: no such file or folder; give a text file, a .gz of one, or a folder of them")
    if is_table(path):
        settings = settings.model_copy(update={"path": name, "dataset": None, "streaming": False})
        return Table(setting, settings, "data.split", split, max_bytes)
    return Files(setting, path, tuple(visible_files(path)) if path.is_dir() else (path,), max_bytes)


def _standard_library() -> Iterator[Path]:
    """Yield source files of Python's standard library: real text that every machine has."""
    size = 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield file
        size += file.stat().st_size
        if size > DEFAULT_TEXT_BYTES:
            return


# Texts in pieces --------------------------------------------------------------------------------------------------------------


def joined(documents: Iterable[Document], limit: int | None = None) -> Iterator[str]:
    """Yield the pieces of all texts, with a line end between texts, up to `limit` bytes of UTF-8."""
    left, first = limit, True
    for document in documents:
        for piece in document if first else _behind("\n", document):
            if left is not None:
                content = piece.encode()
                if len(content) > left:
                    yield cut(content, left).decode()
                    return
                left -= len(content)
            yield piece
        first = False


def _behind(start: str, document: Document) -> Iterator[str]:
    yield start
    yield from document


def cut(text: bytes, limit: int) -> bytes:
    """Return the first `limit` bytes, or a few less where that would split a character."""
    # In UTF-8, up to three bytes of the form 10xxxxxx follow a character's first byte.
    return text[: next((end for end in range(limit, max(limit - 4, 0), -1) if text[end] & 0xC0 != 0x80), limit)]
