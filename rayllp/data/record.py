"""What a run keeps of its data: by what it can tell that they have changed, and the tokenizer that was made from them."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayllp.config import TrainConfig
from rayllp.data.cache import Part, settle
from rayllp.data.decoded import DecodedImages
from rayllp.data.load import load_data
from rayllp.data.tokenizer import Tokenizer, restore_tokenizer
from rayllp.errors import DataError

NOT_OF_THE_DATA = ("on_change", "on_error", "cache", "sampling")
"""Settings of the group data that do not say which data they are."""


@dataclass(frozen=True)
class DataRecord:
    """Checksums of a run's data.

    Attributes:
        settings: those that the data follow from.
        splits: of each split, of its samples.
        meaning: of what the network's inputs and classes stand for: every token's text, every word, every label, by its number.
        tokenizer: the tokenizer itself, where it was made from the text; `restore_tokenizer` reads it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    meaning: str = ""
    tokenizer: str | None = None

    @classmethod
    def of(cls, config: TrainConfig, data: Any) -> "DataRecord":
        """Of the data that these settings name."""
        tokenizer: Any = getattr(data, "tokenizer", None)
        tokens = tokenizer.texts() if tokenizer is not None else None
        meaning = [tokens, getattr(data, "index", None), getattr(data, "classes", ())]
        splits = {split: checksum(found) for split, found in _splits(data).items()}
        return cls(_settings(config), splits, checksum(meaning), getattr(tokenizer, "made", None))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "DataRecord":
        """Of what `as_dict` gave."""
        return cls(**{known.name: values[known.name] for known in fields(cls) if known.name in values})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def kept_tokenizer(self, config: TrainConfig, file: Path | None) -> Tokenizer | None:
        """The run's own tokenizer, for a run that goes on by these settings; None: the settings name it.

        Args:
            file: the run's copy of a tokenizer of the tokenizers library, if there is one.
        """
        if self.settings and self.settings["data"]["tokenizer"] != config.data.tokenizer:
            return None
        return restore_tokenizer(config.data.tokenizer, self.tokenizer, file)

    def changes(self, config: TrainConfig, now: "DataRecord") -> tuple[str, ...]:
        """Splits that are not what they were, of a run that goes on by these settings.

        Raises:
            DataError: the network's inputs or classes would mean something else; or the data have changed and the settings do not say so.
        """
        if not self.meaning:  # a run from before there were records
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
    config: TrainConfig, known: DataRecord, file: Path | None = None, data: Any = None
) -> tuple[Any, DataRecord, tuple[str, ...]]:
    """The data set of a run, with the tokenizer that it began with; its record now; and the splits that have changed.

    Args:
        known: the record that was kept; an empty one where nothing was.
        file: the run's copy of a tokenizer of the tokenizers library, if there is one.
        data: the data set, where it is loaded already.

    Raises:
        DataError: the data are broken, or not those that the run began with.
    """
    if data is None:
        data = load_data(config, known.kept_tokenizer(config, file))
    else:
        settle(data)  # it may have come from another host
    record = DataRecord.of(config, data)
    return data, record, known.changes(config, record)


def checksum(value: Any) -> str:
    """SHA-256 of arrays, texts, and what is made of them."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _settings(config: TrainConfig) -> dict[str, Any]:
    data = {name: value for name, value in config.data.model_dump(mode="json").items() if name not in NOT_OF_THE_DATA}
    return {"data": data, "sequence_length": config.sequence_length, "task": config.model.task}


def _splits(data: Any) -> dict[str, list[Any]]:
    """What a data set has by split, with the fields' names."""
    if (sets := getattr(data, "sets", None)) is not None:
        parts = [_splits(each) for each in sets]
        return {split: [part.get(split) for part in parts] for split in parts[0]}
    found: dict[str, list[Any]] = {split: [["", known]] for split, known in getattr(data, "checksums", {}).items()}
    for known in fields(data):
        value = getattr(data, known.name)
        if isinstance(value, dict) and "train" in value:
            for split, part in value.items():
                found.setdefault(split, []).append([known.name, part])
    return found


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif isinstance(value, Part):
        _feed(digest, value.checksum)
    elif isinstance(value, DecodedImages):  # the library's own fingerprint: the files themselves may be larger than memory
        _feed(digest, [str(getattr(value.rows, "_fingerprint", "")), value.column, value.numbers])
    elif isinstance(value, Mapping):
        _feed(digest, list(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} of".encode())
        for part in value:
            _feed(digest, part)
    elif is_dataclass(value):
        _feed(digest, [getattr(value, known.name) for known in fields(value)])
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode("utf-8", "surrogatepass"))
