"""Reading text, and batches as a pure function of (seed, step)."""

import codecs
import gzip
import sysconfig
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, Facts, passes
from rayllp.data.files import Faults, draw, in_order, locate, not_utf8
from rayllp.data.hub import load_train
from rayllp.data.tokenizer import Tokenizer, make_tokenizer
from rayllp.errors import DataError

DEFAULT_TEXT_BYTES = 4_000_000
GOLDEN_RATIO = (5**0.5 - 1) / 2


def read_text(settings: DataSettings, faults: Faults | None = None) -> bytes:
    """All text that the settings name, in UTF-8, up to `data.max_bytes`.

    Args:
        faults: takes note of what is left out of folders and data sets.

    Raises:
        DataError: missing, unreadable, empty, or no text.
    """
    faults = faults or Faults(settings.on_error == "skip")
    if settings.dataset:
        text, source = _read_dataset(settings, faults), f"data.dataset {settings.dataset}"
    elif settings.path:
        text, source = _read_path("data.path", settings.path, settings.max_bytes, faults), f"data.path {settings.path}"
    else:
        text, source = _read_standard_library(), "the standard library"
    if not text:
        raise DataError(f"{source} holds no text: give a file or folder with some")
    return _cut(text, settings.max_bytes)


def read_file(what: str, path: Path, limit: int | None = None) -> bytes:
    """The content of a file, or of a .gz of one; of a longer one at least the first `limit` bytes.

    Raises:
        DataError: names the file, as `what`.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # One more, for whoever cuts to see what is cut.
            return file.read(-1 if limit is None else limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{what} {path} cannot be read: {error}; give a file, or a whole .gz of one") from None


def _read_path(what: str, name: str, limit: int | None, faults: Faults) -> bytes:
    path = locate(name, what)
    if not path.exists():
        raise DataError(f"{what} {path}: no such file or folder; give a text file, a .gz of one, or a folder of them")
    if path.is_file():
        try:
            return _plain(_cut(read_file(what, path, limit), limit))
        except NoTextError as error:
            raise DataError(f"{what} {path}{error}") from None
    pieces, size = [], 0
    for file in sorted(path.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        try:
            pieces.append(_plain(_cut(read_file(what, file, limit), limit)))
        except NoTextError as error:
            faults.report("files", f"{what} {path} is read as a folder of texts, and {file}{error}")
            continue
        size += len(pieces[-1])
        if limit is not None and size > limit:
            break
    return b"\n".join(pieces)


class NoTextError(ValueError):
    """Why a file is no text; the message follows its path."""


def _plain(content: bytes) -> bytes:
    """A text in UTF-8 without its byte order mark.

    Raises:
        NoTextError: it is none.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise NoTextError(" is UTF-16: save it as UTF-8")
    text = content.removeprefix(codecs.BOM_UTF8)
    zero = text.find(0)
    if zero >= 0:
        line = text.count(b"\n", 0, zero) + 1
        raise NoTextError(f":{line} holds a byte 0: it is no text, damaged, or UTF-16; mend it and save it as UTF-8")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        line, why = not_utf8(text, error)
        raise NoTextError(f":{line}: {why}; save the file as UTF-8") from None
    return text


def _cut(text: bytes, limit: int | None) -> bytes:
    """The first `limit` bytes, fewer where that would split a character."""
    if limit is None or len(text) <= limit:
        return text
    # A UTF-8 character has up to three bytes 10xxxxxx after its first.
    return text[: next((end for end in range(limit, max(limit - 4, 0), -1) if text[end] & 0xC0 != 0x80), limit)]


def _read_standard_library() -> bytes:
    """Real text that every machine has: the sources of Python's standard library."""
    pieces, size = [], 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        pieces.append(file.read_bytes())
        size += len(pieces[-1])
        if size > DEFAULT_TEXT_BYTES:
            break
    return b"\n".join(pieces)


def _read_dataset(settings: DataSettings, faults: Faults) -> bytes:
    split = load_train(settings)
    split.require("data.text_field", settings.text_field)
    pieces, size = [], 0
    for number, (text,) in enumerate(split.rows(settings.text_field)):
        if not isinstance(text, str):
            kind = "nothing" if text is None else type(text).__name__
            column = f"{split.source} row {number}: column {settings.text_field!r} holds {kind}, not text"
            if text is not None:
                raise DataError(f"{column}: set data.text_field to a column of strings")
            faults.report("rows", column)
            continue
        pieces.append(text.encode())
        size += len(pieces[-1]) + 1
        if settings.max_bytes is not None and size > settings.max_bytes:
            break
    return b"\n".join(pieces)


@dataclass(frozen=True)
class StreamBatches:
    """Windows of a token stream: drawn at random in training, the same ones in every evaluation.

    The held-out stream is cut into windows side by side, so that each of its tokens is to be predicted once; what is left over at its end
    is not. They come in an order of which every beginning is spread over the whole stream, and depend on neither seed nor batch size.

    Attributes:
        tokens: of each split, its token ids end to end.
        sequence_length: tokens a sequence, special ones included.
        seed: keys the draws of training.
        tokenizer: of the text.
    """

    tokens: dict[str, np.ndarray]
    sequence_length: int
    seed: int
    tokenizer: Tokenizer

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.sequence_length

    @property
    def stride(self) -> int:
        """Tokens from one held-out window to the next: those of a window that are to be predicted."""
        return self.length

    @cached_property
    def held_out(self) -> np.ndarray:
        """Where each held-out window starts, in the order in which evaluations take them."""
        return spread((len(self.tokens["validation"]) - self.length) // self.stride + 1) * self.stride

    def windows(self, split: str, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a batch, int64 of shape (size, tokens); and which of its places are filled: others lie beyond the held-out text."""
        stream, length = self.tokens[split], self.length
        if split == "train":
            starts = draw(self.seed, split, step, len(stream) - length + 1, size)
            places = np.arange(size)
        else:
            places = in_order(step, len(self.held_out), size)
            starts = self.held_out[np.maximum(places, 0)]
        return np.stack([stream[start : start + length] for start in starts]).astype(np.int64), places >= 0

    def batches(self, split: str, size: int) -> int:
        """Batches in one pass through the held-out windows."""
        return passes(len(self.held_out), size)


def spread(count: int) -> np.ndarray:
    """The numbers below `count`, each once, in an order of which every beginning is spread evenly: by multiples of the golden ratio."""
    return np.argsort(np.argsort(np.arange(count) * GOLDEN_RATIO % 1, kind="stable"), kind="stable")


@dataclass(frozen=True)
class TextBatches(StreamBatches):
    """Windows of a token stream: targets are the inputs shifted by one.

    Attributes:
        skipped: how many files and rows were left out (data.on_error=skip).
    """

    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """A token more than a sequence has: the last one's target."""
        return self.sequence_length + 1

    @property
    def stride(self) -> int:
        """Windows share a token: one's last target is the next one's first input."""
        return self.sequence_length

    @property
    def facts(self) -> Facts:
        """The vocabulary; sequences are equally long, so there is no padding."""
        return Facts(vocabulary=self.tokenizer.vocabulary)

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Token ids of shape (size, sequence_length), twice."""
        windows, filled = self.windows(split, step, size)
        targets = np.where(filled[:, None], windows[:, 1:], IGNORE)
        return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(targets)


def load_text(settings: DataSettings, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None) -> TextBatches:
    """Read, tokenise, split.

    Raises:
        DataError: as `load_stream`.
    """
    faults = Faults(settings.on_error == "skip")
    tokens, tokenizer = load_stream(settings, sequence_length, sequence_length + 1, tokenizer, faults)
    return TextBatches(tokens, sequence_length, seed, tokenizer, faults.counts)


def load_stream(
    settings: DataSettings, sequence_length: int, window: int, tokenizer: Tokenizer | None, faults: Faults
) -> tuple[dict[str, np.ndarray], Tokenizer]:
    """The text's tokens by split, and what made them. Held out is `data.validation_path`, else the text's end.

    Args:
        settings: where the text is.
        sequence_length: for errors.
        window: tokens that each split must have, for one sequence and its targets.
        tokenizer: of a run that goes on; None: the one that the settings name.
        faults: takes note of what is left out.

    Raises:
        DataError: as `read_text`; text shorter than a window in either split; a held-out text that the tokenizer cannot encode.
    """
    text = read_text(settings, faults)
    tokenizer = tokenizer or make_tokenizer(settings.tokenizer, text)
    stream = _encode(text, tokenizer, "the training text")
    if settings.validation_path:
        held_out = _read_path("data.validation_path", settings.validation_path, None, faults)
        splits = {"train": stream, "validation": _encode(held_out, tokenizer, f"data.validation_path {settings.validation_path}")}
    else:
        held = int(len(stream) * settings.validation_fraction)
        splits = {"train": stream[: len(stream) - held], "validation": stream[len(stream) - held :]}
    for split, tokens in splits.items():
        if len(tokens) < window:
            raise DataError(
                f"the {split} text has {len(tokens)} tokens, fewer than one sequence of {sequence_length} takes "
                f"({window}): give more text, or lower sequence_length"
            )
    return splits, tokenizer


def _encode(text: bytes, tokenizer: Tokenizer, source: str) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except KeyError as error:
        raise DataError(
            f"{source}: {error.args[0]!r} is not in the text that the alphabet was made from, so data.tokenizer=characters has no token "
            "for it; use bytes or bpe:SIZE"
        ) from None
