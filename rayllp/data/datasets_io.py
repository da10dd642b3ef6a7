"""Access to the datasets library: data sets by name, folders written by save_to_disk, and files of tables."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from rayllp.config import DataSettings
from rayllp.data.cache import stamp
from rayllp.data.files import BadRows, NoTextError, local_path, read_text_file
from rayllp.errors import DataError

Item = TypeVar("Item")
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")
"""Names that a data set's own held-out split may have, the most likely one first."""
TABLES = {
    "json": (".json", ".jsonl", ".ndjson"), "csv": (".csv", ".tsv"), "parquet": (".parquet",), "arrow": (".arrow",),
}  # fmt: skip
"""Builders of the datasets library that read tables, with the file endings they read; a compression ending may follow."""
CSV = {"keep_default_na": False, "na_values": [""]}
"""How files of csv are read: NA, null and None are texts like any other."""
TSV = {**CSV, "sep": "\t", "quoting": csv.QUOTE_NONE}
"""How files of tsv are read: a quotation mark is text, as in GLUE's files and in `formats.read_tsv`."""
ROW_NAMES = "__index_level_0__"
"""What the library calls the first column of a csv file whose lines have one more than its first line names."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
ROWS_AT_ONCE = 1000
"""Rows read per batch: one at a time, each row takes the library ten times as long."""
SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files that mark a folder written by save_to_disk."""


@dataclass(frozen=True)
class Split:
    """One split of a data set, in memory-mapped files or streamed.

    Attributes:
        source: names data set and split, for errors.
        loaded: the object of the datasets library.
        place: where it lies, if it is a file or folder.
    """

    source: str
    loaded: Any
    place: Path

    @property
    def columns(self) -> list[str]:
        """Names of the columns.

        Raises:
            DataError: lines of a csv have more columns than the first line names, so that all names would be those of the next column.
        """
        # Some streams know their columns only from the rows themselves.
        columns = list(self.loaded.features or next(self._guarded(iter(self.loaded)), {}))
        if ROW_NAMES in columns and self.loaded.info.builder_name == "csv":
            raise DataError(f"{self.source} has lines with more columns than its first line names: name all of them, or fix the lines")
        return columns

    def labels(self, column: str) -> tuple[str, ...]:
        """Return the class names of a column; empty where the data set does not name them."""
        feature = (self.loaded.features or {}).get(column)
        return tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())  # a list column has them at its elements

    def require(self, columns: Mapping[str, str]) -> None:
        """Refuse columns that do not exist.

        Args:
            columns: names of columns, each by the setting that names it.

        Raises:
            DataError: names the setting and the existing columns.
        """
        existing = self.columns
        if not existing:
            raise DataError(f"{self.source} has no rows: give some")
        for setting, column in columns.items():
            if column not in existing:
                raise DataError(f"{self.source} has no column {column!r}: set {setting} to one of {existing}")

    def rows(self, *columns: str, label: str | None = None, at_once: int = ROWS_AT_ONCE) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield each row's place, for errors, and its values in these columns.

        Args:
            columns: names of the columns.
            label: one more column, whose class numbers are replaced by the names of the classes where the data set has them.
            at_once: rows that are read together; use few where values are large or slow to decode.

        Raises:
            DataError: a row cannot be read.
        """
        chosen = [*columns] if label is None else [*columns, label]
        names = () if label is None else self.labels(label)
        number = count()
        for some in self._guarded(self.loaded.select_columns(chosen).iter(batch_size=at_once)):
            values = [some[column] for column in chosen]
            if names:
                values[-1] = _name(values[-1], names)
            for row in zip(*values, strict=True):
                yield f"{self.source} row {next(number)}", row

    def texts(self, setting: str, column: str, bad_rows: BadRows) -> Iterator[str]:
        """Yield the texts of a column.

        Raises:
            DataError: there is no such column, or it holds something other than text; or a row is empty and bad rows are not skipped.
        """
        self.require({setting: column})
        for place, (text,) in self.rows(column):
            if isinstance(text, str):
                yield text
                continue
            where = f"{place}: column {column!r} holds {'nothing' if text is None else type(text).__name__}, not text"
            if text is not None:
                raise DataError(f"{where}: set {setting} to a column of strings")
            bad_rows.refuse_or_count("rows", where)

    def _guarded(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Turn any error while rows are read into a DataError that names the data set."""
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # the library raises whatever its files, decoders and connections raise
                raise DataError(f"{self.source} cannot be read: {self._reason(error)}") from None
            if row is None:
                return
            yield row

    def _reason(self, error: Exception) -> str:
        """Return why rows cannot be read. The library does not name the line of a text file that is not UTF-8."""
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError) and self.place.is_file() and self.place.suffix not in COMPRESSED[1:]:
            try:
                for _ in read_text_file("", self.place):
                    pass
            except NoTextError as fault:
                return f"{self.place.name}{fault}"
        return f"{type(error).__name__}: {error or cause}"


def load_split(settings: DataSettings, setting: str, name: str, *, stream: bool = False, what: str | None = None) -> Split:
    """Return one split. A folder saved from a single split has just train.

    Args:
        settings: name the data set.
        setting, name: the split, and the setting that names it.
        stream: the rows are read just once, in order, so local files need not be copied into the library's cache.
        what: the data set, for errors, where a setting other than data.dataset and data.path names it.

    Raises:
        DataError: the data set cannot be loaded, is streamed without data.max_bytes, or has no such split.
    """
    splits, what = load_splits(settings, stream=stream, what=what), what or named(settings)
    if name not in splits:
        raise DataError(f"{what} has no split {name}, but {', '.join(splits)}: set {setting}, or choose another data set or data.subset")
    return Split(f"{what}, split {name},", splits[name], _place(settings)[2])


def own_held_out(settings: DataSettings, training: str, *, stream: bool = True) -> str | None:
    """Return the name of the data set's own held-out split, other than the one to train on; None if it has none."""
    if _place(settings)[2].is_file():
        return None
    splits = load_splits(settings, stream=stream)
    return next((name for name in HELD_OUT_SPLITS if name in splits and name != training), None)


def named(settings: DataSettings) -> str:
    """Return how errors refer to the data set."""
    return f"data.dataset {settings.dataset}" if settings.dataset else f"data.path {settings.path}"


def _name(label: Any, names: tuple[str, ...]) -> Any:
    """Return the class name of a class number, or of each in a list. Other values, such as -1 (the library's "no label"), are unchanged."""
    if isinstance(label, list):
        return [_name(each, names) for each in label]
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else label


def up_to(limit: int | None, items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[Item]:
    """Yield items from the first on while their total size is at most `limit`; None: yield all."""
    total = 0
    for item in items:
        if limit is not None:
            total += size(item)
            if total > limit:
                return
        yield item


# What the library reads -------------------------------------------------------------------------------------------------------


def builder_of(path: Path) -> str | None:
    """Return the name of the builder that reads a file, by the file's ending; None if it is not a table."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return next((builder for builder, endings in TABLES.items() if name.endswith(endings)), None)


def is_table(path: Path) -> bool:
    """True if a file, or a folder whose files are all of one kind, is read by the datasets library rather than as text."""
    if path.is_file():
        return builder_of(path) is not None
    if any((path / name).exists() for name in SAVED):
        return True
    kinds = {builder_of(file) for file in visible_files(path)}
    return len(kinds) == 1 and None not in kinds


def visible_files(folder: Path) -> list[Path]:
    """Return all files below a folder, except hidden ones."""
    paths = (path for path in sorted(folder.rglob("*")) if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return [path for path in paths if path.is_file()]


def stamp_of(settings: DataSettings) -> Any:
    """Return plain values that identify the content of a data set: those of its files, or the library's hash."""
    setting, name, place = _place(settings)
    if place.exists():
        files = visible_files(place) if place.is_dir() else [place]
        return [*stamp(files), *([TSV] if any(builder_of(file) == "csv" for file in files) else [])]
    with _in_words(f"{setting} {name}", place):
        return _make_builder(settings).hash


def load_splits(settings: DataSettings, *, stream: bool, what: str | None = None) -> Mapping[str, Any]:
    """Return all splits by name."""
    setting, name, place = _place(settings)
    what = what or f"{setting} {name}"
    if place.is_file() and not place.stat().st_size:
        raise DataError(f"{what} is empty: give a table with some rows")
    if settings.streaming and settings.max_bytes is None:
        raise DataError(f"{setting} {name} with data.streaming=true has no end: set data.max_bytes to how much of it to read")
    with _in_words(what, place):
        if any((place / file).exists() for file in SAVED):
            import datasets

            loaded = datasets.load_from_disk(str(place))
        else:
            builder = _make_builder(settings)
            if settings.streaming or (stream and place.exists()):
                loaded = builder.as_streaming_dataset()
            else:
                builder.download_and_prepare()
                loaded = builder.as_dataset()
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _place(settings: DataSettings) -> tuple[str, str, Path]:
    """Return the setting that names the data set, its value, and that value as a path."""
    setting, name = ("data.dataset", settings.dataset) if settings.dataset else ("data.path", settings.path)
    return setting, str(name), local_path(str(name), setting)


@contextmanager
def _in_words(what: str, place: Path) -> Iterator[None]:
    """Turn any error of the library into a DataError that says what to give instead."""
    try:
        yield
    except Exception as error:  # the library raises whatever its files and connections raise
        if place.is_file():
            raise DataError(
                f"{what} cannot be read: {type(error).__name__}: {error}; give an undamaged table whose ending names its format"
            ) from None
        hidden = "; for the data set of that name on the hub, call the folder here something else" if place.is_dir() else ""
        raise DataError(
            f"{what} cannot be loaded: {type(error).__name__}: {error}; give the name of a data set that this machine can "
            f"reach, or a folder written by save_to_disk{hidden}"
        ) from None


def _make_builder(settings: DataSettings) -> Any:
    """Return the library's builder for a data set's name, a folder or a file."""
    import datasets  # importing takes a second, and plain text does not need it

    _, name, place = _place(settings)
    if not place.exists():
        return datasets.load_dataset_builder(name, settings.subset)
    if place.is_dir():
        load = partial(datasets.load_dataset_builder, str(place), settings.subset)
    else:
        load = partial(datasets.load_dataset_builder, builder_of(place) or "text", data_files={"train": str(place)})
    builder = load()
    if builder.name != "csv":
        return builder
    return load(**(TSV if builder.config.sep == "\t" or ".tsv" in place.name.lower() else CSV))
