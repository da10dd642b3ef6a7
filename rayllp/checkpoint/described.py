"""What a run directory says of its network and its tokenizer, so that `rayllp export` needs no data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayllp.errors import CheckpointError

MODEL_JSON = "model.json"
TOKENIZER_JSON = "tokenizer.json"


def write_model_json(run_dir: Path, values: Mapping[str, Any] | None) -> None:
    """Keep transformers' configuration (`Architecture.transformers_config`); nothing where there is none."""
    if values is not None:
        (run_dir / MODEL_JSON).write_text(json.dumps(values, indent=2) + "\n")


def read_model_json(run_dir: Path) -> dict[str, Any] | None:
    """transformers' configuration as the run kept it; None where it kept none.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = run_dir / MODEL_JSON
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it, and it is made anew from the run's data") from None


def write_tokenizer_json(run_dir: Path, batches: object) -> None:
    """Keep a tokenizer of the tokenizers library, such as one trained on the text; nothing for others."""
    tokenizer: Any = getattr(batches, "tokenizer", None)
    if hasattr(tokenizer, "save"):
        tokenizer.save(run_dir / TOKENIZER_JSON)
