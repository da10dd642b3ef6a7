"""Where text comes from: files, folders, tables, data sets. It is read in pieces, so it may be larger than memory."""

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rayllp.config import DataSettings
from rayllp.data.cache import stamp
from rayllp.data.datasets_io import Split, is_table, load_named, load_splits, stamp_of, up_to, visible_files
from rayllp.data.files import BadRows, NoTextError, Sample, hold_out, local_path, read_text_file
from rayllp.errors import DataError

DEFAULT_TEXT_BYTES = 4_000_000
TABLE_KINDS = "json, jsonl, csv, tsv, parquet, arrow, or a folder written by save_to_disk"
HELD_OUT_SPLITS = ("validation", "valid", "dev", "test")
"""Splits under which a data set may hold out data itself, the most likely one first."""
Document = Iterable[str]
"""A text in pieces of any length."""


class Source(Protocol):
    """A sequence of texts that can be read any number of times."""

    @property
    def name(self) -> str:
        """The setting that names the source, and its value, for errors."""
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
        name: the setting that names them, and its value.
        paths: the files.
        folder: True if they were found in a folder, where some files may not be text.
    """

    name: str
    paths: tuple[Path, ...]
    folder: bool = False

    def stamp(self) -> Any:
        """Return the files' names, sizes and times, and for small files a hash of the content."""
        return stamp(self.paths)

    def documents(self, bad_rows: BadRows) -> Iterator[Document]:
        """Yield each file as one text."""
        for path in self.paths:
            if self.folder and bad_rows.skip and not self._is_text(path, bad_rows):
                continue
            yield self._read(path)

    def _read(self, path: Path) -> Iterator[str]:
        try:
            yield from read_text_file(self.name.partition(" ")[0], path)
        except NoTextError as error:
            message = f"{self.name} is read as a folder of texts, and {path}{error}" if self.folder else f"{self.name}{error}"
            end = "; mend it, or leave it out by data.on_error=skip" if self.folder else ""
            raise DataError(message + end) from None

    def _is_text(self, path: Path, bad_rows: BadRows) -> bool:
        """True if a file is text to its end; otherwise it is counted as left out."""
        try:
            for _ in read_text_file(self.name.partition(" ")[0], path):
                pass
        except NoTextError as error:
            bad_rows.refuse_or_count("files", f"{path}{error}")
            return False
        return True


@dataclass(frozen=True)
class Table:
    """A table that the datasets library reads.

    Attributes:
        name: the setting that names it, and its value.
        settings: the data settings that say which data set it is.
        setting, split: one of its splits, and the setting that names it.
    """

    name: str
    settings: DataSettings
    setting: str
    split: str

    def stamp(self) -> Any:
        """Return plain values that identify the content: those of its files, or the library's hash of the data set."""
        return [stamp_of(self.settings), self.settings.subset, self.split]

    def open(self) -> Split:
        """Open the split for reading its rows in order."""
        return load_named(self.settings, self.setting, self.split, stream=True, what=None if self.settings.dataset else self.name)


@dataclass(frozen=True)
class Column:
    """The texts in one column of a table (`data.text_field`)."""

    table: Table
    field: str

    @property
    def name(self) -> str:
        """The table's name."""
        return self.table.name

    def stamp(self) -> Any:
        """Return the table's stamp and the column's name."""
        return [self.table.stamp(), self.field]

    def documents(self, bad_rows: BadRows) -> Iterator[Document]:
        """Yield each row as one text."""
        for text in self.table.open().texts("data.text_field", self.field, bad_rows):
            yield (text,)


def training_text(settings: DataSettings) -> Source:
    """Return the training text that the settings name; the source files of Python's standard library if they name none.

    Raises:
        DataError: there is no such file.
    """
    if not settings.dataset and not settings.path:
        return Files("the standard library", tuple(_standard_library()))
    table = _training(settings)
    return _files("data.path", str(settings.path)) if table is None else Column(table, settings.text_field)


def held_out_text(settings: DataSettings) -> Source | None:
    """Return the held-out text if it is a file or a split of its own; None: it is cut from the end of the training text."""
    table = _held_out(settings)
    if table is not None:
        return Column(table, settings.text_field)
    return _files("data.validation_path", settings.validation_path) if settings.validation_path else None


def training_table(settings: DataSettings) -> Table:
    """Return the table to train on.

    Raises:
        DataError: there is no such file, or it is not a table.
    """
    table = _training(settings)
    if table is None:
        raise DataError(f"data.path {settings.path or '(none)'} is no table: give one ({TABLE_KINDS}), or data.dataset")
    return table


def held_out_table(settings: DataSettings) -> Table | None:
    """Return the held-out table if the settings name a file or a split for it, else None.

    Raises:
        DataError: see `training_table`.
    """
    table = _held_out(settings)
    if table is None and settings.validation_path:
        raise DataError(f"data.validation_path {settings.validation_path} is no table: give one ({TABLE_KINDS})")
    return table


def tables(settings: DataSettings) -> tuple[Table, Table | None]:
    """Return the training and the held-out table. If the settings name no held-out one, it is a split that the data set itself holds out.

    Raises:
        DataError: see `training_table`.
    """
    train, held_out = training_table(settings), held_out_table(settings)
    if held_out is None:
        splits = load_splits(train.settings, stream=True)
        own = next((name for name in HELD_OUT_SPLITS if name in splits and name != train.split), None)
        held_out = replace(train, setting="data.validation_split", split=own) if own else None
    return train, held_out


def read_splits(
    settings: DataSettings,
    read_table: Callable[[Table, int | None], list[Sample]],
    read_file: Callable[[str, str, int | None], list[Sample]],
    needed: str,
) -> dict[str, list[Sample]]:
    """Return training and held-out samples. Where there is no held-out table or file, the end of the training samples is held out.

    Args:
        settings: name the tables or files.
        read_table: (table, number of bytes to read at most) -> samples.
        read_file: (path, the setting that names it, number of bytes to read at most) -> samples.
        needed: what data.path should be, for the error if neither it nor data.dataset is set.

    Raises:
        DataError: neither is set, or the data cannot be read.
    """
    if settings.path is None and settings.dataset is None:
        raise DataError(f"there is no data.path: {needed}")
    if reads_tables(settings):
        train_table, held_out = tables(settings)
        train = read_table(train_table, settings.max_bytes)
        validation = None if held_out is None else read_table(held_out, None)
    else:
        assert settings.path is not None
        train = read_file(settings.path, "data.path", settings.max_bytes)
        name = settings.validation_path
        validation = None if name is None else read_file(name, "data.validation_path", None)
    if validation is None:
        train, validation = hold_out(train, settings.validation_fraction)
    return {"train": train, "validation": validation}


def read_samples(
    table: Table,
    columns: Mapping[str, str],
    make: Callable[[str, tuple[Any, ...]], Sample | None],
    size: Callable[[Sample], int],
    limit: int | None,
    wanted: str,
) -> list[Sample]:
    """Return the samples in a table's rows.

    Args:
        table: the table.
        columns: names of the columns to read, each by the setting that names it; the last one holds labels.
        make: (place of a row, its values in these columns) -> sample; None: the row is left out.
        size: sample -> bytes of text in it.
        limit: size of all samples from which on no more are read; None: read all.
        wanted: what a row should hold, for errors.

    Raises:
        DataError: a column does not exist, or there is no sample.
    """
    split = table.open()
    split.require(columns)
    *texts, label = columns.values()
    made = (make(place, values) for place, values in split.placed_rows(*texts, label=label))
    samples = list(up_to(limit, (sample for sample in made if sample is not None), size))
    if not samples:
        within = "" if limit is None else f" within data.max_bytes={limit}"
        raise DataError(f"{split.source} has no row with {wanted}{within}: give some")
    return samples


def reads_tables(settings: DataSettings) -> bool:
    """True if labelled rows are read by the datasets library: from a data set, or from a table with named columns (not .tsv)."""
    if settings.dataset:
        return True
    path = None if settings.path is None else local_path(settings.path, "data.path")
    return path is not None and path.exists() and ".tsv" not in path.name and is_table(path)


def _training(settings: DataSettings) -> Table | None:
    """Return the table to train on; None if the settings name text, or nothing."""
    if settings.dataset:
        return Table(f"data.dataset {settings.dataset}", settings, "data.split", settings.split)
    return _table("data.path", settings.path, settings) if settings.path else None


def _held_out(settings: DataSettings) -> Table | None:
    """Return the held-out table that the settings name; None if they name text, or nothing."""
    if settings.validation_split:
        return Table(f"data.validation_split {settings.validation_split}", settings, "data.validation_split", settings.validation_split)
    return _table("data.validation_path", settings.validation_path, settings) if settings.validation_path else None


def _table(setting: str, name: str, settings: DataSettings) -> Table | None:
    path = _existing(setting, name)
    if not is_table(path):
        return None
    table_settings = settings.model_copy(update={"path": name, "dataset": None, "streaming": False})
    return Table(f"{setting} {path}", table_settings, "data.split", settings.split if setting == "data.path" else "train")


def _files(setting: str, name: str) -> Files:
    path = _existing(setting, name)
    return Files(f"{setting} {path}", tuple(visible_files(path)), True) if path.is_dir() else Files(f"{setting} {path}", (path,))


def _existing(setting: str, name: str) -> Path:
    path = local_path(name, setting)
    if not path.exists():
        raise DataError(f"{setting} {path}: no such file or folder; give a text file, a .gz of one, or a folder of them")
    return path


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
