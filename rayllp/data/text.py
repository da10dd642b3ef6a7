"""Reading text, and batches as a pure function of (seed, step)."""

import gzip
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import Facts
from rayllp.data.tokenizer import Tokenizer, make_tokenizer
from rayllp.errors import DataError
from rayllp.models.randomness import key

DEFAULT_TEXT_BYTES = 4_000_000


def read_text(settings: DataSettings) -> bytes:
    """All text that the settings name.

    Raises:
        DataError: missing, unreadable or empty.
    """
    if settings.dataset:
        text, source = _read_dataset(settings), f"data.dataset {settings.dataset}"
    elif settings.path:
        text, source = _read_path(Path(settings.path).expanduser()), f"data.path {settings.path}"
    else:
        text, source = _read_standard_library(), "the standard library"
    if not text:
        raise DataError(f"{source} holds no text: give a file or folder with some")
    return text


def _read_path(path: Path) -> bytes:
    if not path.exists():
        raise DataError(f"data.path {path}: no such file or folder; give a text file, a .gz of one, or a folder of them")
    if path.is_file():
        return _read_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not any(part.startswith(".") for part in file.parts[1:]))
    return b"\n".join(_read_file(file) for file in files)


def _read_file(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"data.path {path} cannot be read: {error}") from None


def _read_standard_library() -> bytes:
    """Real text that every machine has: the sources of Python's standard library."""
    pieces, size = [], 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        pieces.append(file.read_bytes())
        size += len(pieces[-1])
        if size > DEFAULT_TEXT_BYTES:
            break
    return b"\n".join(pieces)


def _read_dataset(settings: DataSettings) -> bytes:
    try:
        import datasets
    except ImportError:
        raise DataError("data.dataset needs the datasets package: pip install 'rayllp[datasets]'") from None
    name = str(settings.dataset)
    try:
        if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(name)
            loaded = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(name, settings.subset, split="train")
    except Exception as error:
        raise DataError(f"data.dataset {name} cannot be loaded: {type(error).__name__}: {error}") from None
    if settings.text_field not in loaded.column_names:
        raise DataError(f"data.dataset {name} has no column {settings.text_field!r}: set data.text_field to one of {loaded.column_names}")
    return "\n".join(loaded[settings.text_field]).encode()


@dataclass(frozen=True)
class TextBatches:
    """Windows of a token stream: targets are the inputs shifted by one."""

    tokens: dict[str, np.ndarray]
    sequence_length: int
    seed: int
    tokenizer: Tokenizer

    @property
    def facts(self) -> Facts:
        return Facts(vocabulary=self.tokenizer.vocabulary)

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Token ids of shape (size, sequence_length), twice."""
        stream = self.tokens[split]
        generator = np.random.Generator(np.random.Philox(key=key(self.seed, split, step)))
        starts = generator.integers(0, len(stream) - self.sequence_length, size=size)
        windows = np.stack([stream[start : start + self.sequence_length + 1] for start in starts]).astype(np.int64)
        return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())


def load_text(settings: DataSettings, sequence_length: int, seed: int) -> TextBatches:
    """Read, tokenise, split.

    Raises:
        DataError: as `read_text`, or text shorter than one sequence in either split.
    """
    text = read_text(settings)
    tokenizer = make_tokenizer(settings.tokenizer, text)
    stream = tokenizer.encode(text)
    held = int(len(stream) * settings.validation_fraction)
    splits = {"train": stream[: len(stream) - held], "validation": stream[len(stream) - held :]}
    for split, tokens in splits.items():
        if len(tokens) <= sequence_length:
            raise DataError(
                f"the {split} text has {len(tokens)} tokens, fewer than one sequence of {sequence_length} and its target: "
                "give more text, or lower sequence_length"
            )
    return TextBatches(splits, sequence_length, seed, tokenizer)
