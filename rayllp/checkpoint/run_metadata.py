"""What a run directory says of its network and its tokenizer, so that `rayllp export` needs no data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayllp.data.record import DataRecord
from rayllp.errors import CheckpointError

MODEL_JSON = "model.json"
TOKENIZER_JSON = "tokenizer.json"
DATA_JSON = "data.json"


def write_model_json(run_dir: Path, values: Mapping[str, Any] | None) -> None:
    """Keep transformers' configuration (`Architecture.transformers_config`); nothing where there is none."""
    if values is not None:
        (run_dir / MODEL_JSON).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_model_json(run_dir: Path) -> dict[str, Any] | None:
    """transformers' configuration as the run kept it; None where it kept none.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _read(run_dir / MODEL_JSON, "it is made anew from the run's data")


def write_data_json(run_dir: Path, record: DataRecord | None) -> None:
    """Keep by what the run's data can be told; nothing for batches of the user's own."""
    if record is not None:
        (run_dir / DATA_JSON).write_text(json.dumps(record.as_dict()) + "\n", encoding="utf-8")


def read_data_json(run_dir: Path) -> DataRecord | None:
    """What the run kept of its data; None where it kept nothing.

    Raises:
        CheckpointError: it cannot be read.
    """
    values = _read(run_dir / DATA_JSON, "the run takes the data for those it began with")
    return None if values is None else DataRecord.read(values)


def _read(path: Path, without: str) -> dict[str, Any] | None:
    """The values in a file of the run's; None where it kept none.

    Args:
        without: what happens where there is no such file, for errors.
    """
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it, and {without}") from None


def write_tokenizer_json(run_dir: Path, batches: object) -> None:
    """Keep a tokenizer of the tokenizers library, such as one trained on the text; nothing for others."""
    tokenizer: Any = getattr(batches, "tokenizer", None)
    if hasattr(tokenizer, "save"):
        tokenizer.save(run_dir / TOKENIZER_JSON)
