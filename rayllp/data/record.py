"""What a run stores about its data: checksums that show whether they have changed, and any tokenizer that was trained on them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rayllp.config import TrainConfig
from rayllp.data.base import Dataset
from rayllp.data.load import load_data
from rayllp.data.tokenizer import restore_tokenizer
from rayllp.data.tokenizer_kinds import Tokenizer
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
    def of(cls, config: TrainConfig, data: Dataset) -> "DataRecord":
        """Return the record of a data set that was loaded by these settings."""
        serialised = None if data.tokenizer is None else data.tokenizer.serialised
        return cls(_settings(config), {split: data.fingerprint(split) for split in data.splits}, data.meaning, serialised)

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
                f"the data are not those that the run began with ({' and '.join(changed)}), though the settings name the same: restore "
                "them, or go on with these by data.on_change=accept"
            )
        return changed


def load_recorded(
    config: TrainConfig, stored: DataRecord, file: Path | None = None, data: Dataset | None = None
) -> tuple[Dataset, DataRecord, tuple[str, ...]]:
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
        data.ensure_present()  # the data set may come from another host, whose cached files this one lacks
    record = DataRecord.of(config, data)
    return data, record, stored.changes(config, record)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine the data: those that must be equal for unchanged data to be expected."""
    data = {name: value for name, value in config.data.model_dump(mode="json").items() if name not in NOT_OF_THE_DATA}
    return {"data": data, "sequence_length": config.sequence_length, "task": config.model.task}
