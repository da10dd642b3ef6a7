"""Files in a run directory that describe its network, tokenizer and data, so that `rayllp export` does not need the data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayllp.data import Batches, Dataset
from rayllp.data.record import DataRecord
from rayllp.errors import CheckpointError

MODEL_JSON = "model.json"
TOKENIZER_JSON = "tokenizer.json"
DATA_JSON = "data.json"


def write_model_json(run_dir: Path, values: Mapping[str, Any] | None) -> None:
    """Store the network's transformers configuration (`Architecture.transformers_config`), if it has one."""
    if values is not None:
        (run_dir / MODEL_JSON).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_model_json(run_dir: Path) -> dict[str, Any] | None:
    """Return the transformers configuration that the run has stored, or None.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return _read(run_dir / MODEL_JSON, "it is made anew from the run's data")


def write_data_json(run_dir: Path, record: DataRecord | None) -> None:
    """Store the record by which the run recognises its data; batches of the user's own have none."""
    if record is not None:
        (run_dir / DATA_JSON).write_text(json.dumps(record.as_dict()) + "\n", encoding="utf-8")


def read_data_json(run_dir: Path) -> DataRecord | None:
    """Return the record of the run's data, or None if the run has stored none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    values = _read(run_dir / DATA_JSON, "the run takes the data for those it began with")
    return None if values is None else DataRecord.read(values)


def _read(path: Path, without: str) -> dict[str, Any] | None:
    """Return the values in a JSON file of the run, or None if there is no such file.

    Args:
        without: what happens without this file, for the error message.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it, and {without}") from None


def write_tokenizer_json(run_dir: Path, batches: Batches | None) -> None:
    """Store the data set's tokenizer if it is of the library tokenizers, as one that was trained on the text is."""
    if isinstance(batches, Dataset) and batches.tokenizer is not None:
        batches.tokenizer.save(run_dir / TOKENIZER_JSON)
