"""Rows of a `datasets` name or folder: what text, images and pairs read alike."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rayllp.config import DataSettings
from rayllp.data.files import locate
from rayllp.errors import DataError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Split:
    """One split of a data set, whole or streamed.

    Attributes:
        source: data set and split, for errors.
        loaded: what the datasets library made of it.
    """

    source: str
    loaded: Any

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        if self.loaded.features is not None:
            return list(self.loaded.features)
        # Some streams tell their columns by their rows alone.
        return list(next(iter(self.loaded), {}))

    def labels(self, column: str) -> tuple[str, ...]:
        """Names of the labels in a column; empty where the data set does not name them."""
        return tuple(getattr((self.loaded.features or {}).get(column), "names", None) or ())

    def require(self, setting: str, column: str) -> None:
        """Refuse a column that is not there.

        Raises:
            DataError: names the setting and the columns that are.
        """
        if column not in self.columns:
            raise DataError(f"{self.source} has no column {column!r}: set {setting} to one of {self.columns}")

    def rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """The rows' values in these columns.

        Raises:
            DataError: a row cannot be read.
        """
        rows = iter(self.loaded.select_columns(list(columns)))
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # the library raises whatever its files, decoders and connections do
                raise DataError(f"{self.source} cannot be read: {type(error).__name__}: {error}") from None
            if row is None:
                return
            yield tuple(row[column] for column in columns)


def load_split(settings: DataSettings, *names: str) -> Split | None:
    """The first of these splits that the data set has, else None. A folder written from one split counts as train.

    Raises:
        DataError: the datasets package is missing, a stream has no limit, or the data set cannot be loaded.
    """
    splits = _load(settings)
    for name in names:
        if name in splits:
            return Split(f"data.dataset {settings.dataset}, split {name},", splits[name])
    return None


def load_train(settings: DataSettings) -> Split:
    """The training split.

    Raises:
        DataError: as `load_split`, or there is none.
    """
    split = load_split(settings, "train")
    if split is None:
        raise DataError(f"data.dataset {settings.dataset} has no split train: choose another data set, or another data.subset")
    return split


def up_to(limit: int | None, items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[Item]:
    """Items from the first on, as long as all of them together are no larger than `limit`."""
    total = 0
    for item in items:
        total += size(item)
        if limit is not None and total > limit:
            return
        yield item


def _load(settings: DataSettings) -> Mapping[str, Any]:
    """Every split by its name."""
    name = str(settings.dataset)
    if settings.streaming and settings.max_bytes is None:
        raise DataError(f"data.dataset {name} with data.streaming=true has no end: set data.max_bytes to what is to be read of it")
    try:
        import datasets
    except ImportError:
        raise DataError(f"data.dataset {name} needs the datasets package: pip install 'rayllp[datasets]'") from None
    folder = locate(name, "data.dataset")
    try:
        if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else name, settings.subset, streaming=settings.streaming)
    except Exception as error:  # the library raises whatever its files and connections do
        hidden = "; for the data set of that name on the hub, call the folder here something else" if folder.is_dir() else ""
        raise DataError(
            f"data.dataset {name} cannot be loaded: {type(error).__name__}: {error}; give the name of a data set that this machine can "
            f"reach, or a folder written by save_to_disk{hidden}"
        ) from None
    return loaded if isinstance(loaded, dict) else {"train": loaded}
