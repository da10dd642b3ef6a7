"""Text to token ids and back: load the tokenizer that `data.tokenizer` names."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from rayllp.data.tokenizer_kinds import Bytes, Characters, Pretrained, SentencePiece, Tokenizer, TokenizersFile, TrainedBPE
from rayllp.errors import DataError

SMALLEST_BPE = 257
SENTENCEPIECE_ENDINGS = (".model", ".spm", ".model.gz", ".spm.gz")


def restore_tokenizer(name: str, serialised: str | None, file: Path | None) -> Tokenizer | None:
    """Return the tokenizer of a run that is resumed; None: it was not stored, and the one that `name` stands for is to be loaded.

    Args:
        name: the value of `data.tokenizer`.
        serialised: the serialised tokenizer, if it was made from the text.
        file: the run's copy of a JSON file of the tokenizers library.
    """
    if name == "characters" and serialised is not None:
        return Characters([serialised])
    if not name.startswith("bpe:") and not name.endswith(".json"):
        return None
    if name.startswith("bpe:") and serialised is not None:
        return TrainedBPE.read(serialised)
    if file is None or not file.is_file():
        return None
    return TrainedBPE.read(file.read_text(encoding="utf-8")) if name.startswith("bpe:") else TokenizersFile(str(file))


def is_made_from_text(name: str) -> bool:
    """True if the tokenizer of this name is made from the text."""
    return name == "characters" or name.startswith("bpe:")


def identity(tokenizer: Tokenizer) -> list[Any]:
    """Return plain values that determine the tokens of a text: the tokenizer's rules, and the version of the library that applies them."""
    return [tokenizer.rules, tokenizers.__version__]


def smallest_dtype(vocabulary: int) -> np.dtype:
    """Return the smallest unsigned integer dtype that holds all ids of a vocabulary of this size."""
    return np.min_scalar_type(max(0, vocabulary - 1))


def load_tokenizer(name: str, pieces: Iterable[str] = ()) -> Tokenizer:
    """Load the tokenizer that `data.tokenizer` names; `characters` and `bpe:SIZE` are made from the text, which comes in pieces.

    Raises:
        DataError: it cannot be loaded, or the name is malformed.
    """
    if name == "bytes":
        return Bytes()
    if name == "characters":
        return Characters(pieces)
    if name.startswith("bpe:"):
        return TrainedBPE(_parse_size(name), pieces)
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise DataError(f"data.tokenizer {name}: no such file; give a JSON file written by the tokenizers library")
        return TokenizersFile(name)
    if name.endswith(SENTENCEPIECE_ENDINGS):
        if not Path(name).is_file():
            raise DataError(f"data.tokenizer {name}: no such file; give a model file of sentencepiece or a .gz of one")
        return SentencePiece(name)
    _refuse_slips(name)
    return Pretrained(name)


def _refuse_slips(name: str) -> None:
    """Refuse a misspelling of one of our own names, which would otherwise be looked up on the hub."""
    if "/" in name or Path(name).exists():
        return
    close = difflib.get_close_matches(name.lower(), ["bytes", "characters", "chars", "bpe"], n=1, cutoff=0.75)
    if close or name.lower().startswith("bpe"):
        meant = {"bytes": "bytes", "characters": "characters", "chars": "characters"}.get(close[0] if close else "", "bpe:8000")
        raise DataError(f"data.tokenizer {name!r} is neither a file nor a folder; did you mean {meant}?")


def _parse_size(name: str) -> int:
    size = name.removeprefix("bpe:")
    if not (size.isascii() and size.isdecimal()) or int(size) < SMALLEST_BPE:
        raise DataError(
            f"data.tokenizer {name!r}: SIZE of bpe:SIZE must be a number of at least {SMALLEST_BPE} (256 bytes and a pair); "
            "write bpe:8000, or use bytes"
        )
    return int(size)
