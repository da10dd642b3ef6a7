"""What a run stores about its data: checksums that show whether they have changed, and any tokenizer that was trained on them."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayllp.config import TrainConfig
from rayllp.data.cache import ArraySlice, ensure_present
from rayllp.data.lazy_images import LazyImages
from rayllp.data.load import load_data
from rayllp.data.tokenizer import Tokenizer, restore_tokenizer
from rayllp.errors import DataError

NOT_OF_THE_DATA = ("on_change", "on_error", "cache", "sampling")
"""Settings under `data` that do not determine what the data are."""


@dataclass(frozen=True)
class DataRecord:
    """Checksums of a run's data.

    Attributes:
        settings: the settings that determine the data.
        splits: a checksum of the samples of each split.
        meaning: a checksum of what the network's inputs and outputs stand for: the text of every token id, every word, every class name.
        tokenizer: the serialised tokenizer, where it was made from the text; `restore_tokenizer` reads it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    meaning: str = ""
    tokenizer: str | None = None

    @classmethod
    def of(cls, config: TrainConfig, data: Any) -> "DataRecord":
        """Return the record of a data set that was loaded by these settings."""
        tokenizer: Any = getattr(data, "tokenizer", None)
        tokens = tokenizer.texts() if tokenizer is not None else None
        meaning = [tokens, getattr(data, "index", None), getattr(data, "classes", ())]
        splits = {split: checksum(content) for split, content in _splits(data).items()}
        return cls(_settings(config), splits, checksum(meaning), getattr(tokenizer, "serialised", None))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "DataRecord":
        """Return the record that `as_dict` wrote."""
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)

    def kept_tokenizer(self, config: TrainConfig, file: Path | None) -> Tokenizer | None:
        """Return the tokenizer that the run began with, if it was stored and the settings still ask for it.

        Args:
            config: the settings with which the run is resumed.
            file: the run's copy of a tokenizer of the tokenizers library, if there is one.

        Returns:
            The tokenizer; None: load the one that the settings name.
        """
        if self.settings and self.settings["data"]["tokenizer"] != config.data.tokenizer:
            return None
        return restore_tokenizer(config.data.tokenizer, self.tokenizer, file)

    def changes(self, config: TrainConfig, now: "DataRecord") -> tuple[str, ...]:
        """Return the names of the splits whose samples have changed since the run began.

        Args:
            config: the settings with which the run is resumed.
            now: the record of the data as they are now.

        Raises:
            DataError: token ids or classes would mean something else to the network; or the data have changed although the settings have
                not, and `data.on_change` refuses that.
        """
        if not self.meaning:  # the run was written before there were records
            return ()
        if now.meaning != self.meaning:
            raise DataError(
                "the run's weights were trained with other numbers for its tokens, words or classes than the data and data.tokenizer now "
                "give them: go on with those it began with, or start a new run from an export, by model.from_pretrained"
            )
        changed = tuple(split for split in now.splits if now.splits[split] != self.splits.get(split))
        if changed and config.data.on_change == "refuse" and now.settings == self.settings:
            raise DataError(
                f"the data are not those that the run began with ({' and '.join(changed)}), though the settings name the same: give it "
                "those back, or go on with these by data.on_change=accept"
            )
        return changed


def load_recorded(
    config: TrainConfig, stored: DataRecord, file: Path | None = None, data: Any = None
) -> tuple[Any, DataRecord, tuple[str, ...]]:
    """Load the data of a run, with the tokenizer that the run began with, and compare them with its record.

    Args:
        config: the settings of the run.
        stored: the record that was stored; an empty one if none was.
        file: the run's copy of a tokenizer of the tokenizers library, if there is one.
        data: the data set, if it is loaded already.

    Returns:
        The data set, its record as of now, and the names of the splits that have changed.

    Raises:
        DataError: the data are broken, or not those that the run began with.
    """
    if data is None:
        data = load_data(config, stored.kept_tokenizer(config, file))
    else:
        ensure_present(data)  # the data set may come from another host, whose cached files this one lacks
    record = DataRecord.of(config, data)
    return data, record, stored.changes(config, record)


def checksum(value: Any) -> str:
    """Return the SHA-256 of arrays, texts, and containers of them."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine the data: those that must be equal for unchanged data to be expected."""
    data = {name: value for name, value in config.data.model_dump(mode="json").items() if name not in NOT_OF_THE_DATA}
    return {"data": data, "sequence_length": config.sequence_length, "task": config.model.task}


def _splits(data: Any) -> dict[str, list[Any]]:
    """Return, for each split, all that a data set holds of it, with the names of its fields."""
    if (sets := getattr(data, "sets", None)) is not None:
        parts = [_splits(data_set) for data_set in sets]
        return {split: [part.get(split) for part in parts] for split in parts[0]}
    content: dict[str, list[Any]] = {split: [["", checksums]] for split, checksums in getattr(data, "checksums", {}).items()}
    for each in fields(data):
        value = getattr(data, each.name)
        if isinstance(value, dict) and "train" in value:
            for split, part in value.items():
                content.setdefault(split, []).append([each.name, part])
    return content


def _feed(digest: Any, value: Any) -> None:
    """Feed a value into a digest, containers element by element."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif isinstance(value, ArraySlice):
        _feed(digest, value.checksum)
    elif isinstance(value, LazyImages):  # hash the datasets library's fingerprint instead of the pixels, which may be larger than memory
        _feed(digest, [str(getattr(value.rows, "_fingerprint", "")), value.column, value.numbers])
    elif isinstance(value, Mapping):
        _feed(digest, list(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of".encode())
        for part in value:
            _feed(digest, part)
    elif is_dataclass(value):
        _feed(digest, [getattr(value, each.name) for each in fields(value)])
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode("utf-8", "surrogatepass"))
