"""Text to token ids and back."""

from pathlib import Path
from typing import Protocol

import numpy as np

from rayllp.errors import DataError


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer."""

    vocabulary: int

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, tokens: list[int]) -> str: ...


class Bytes:
    """One token a byte; nothing to download, any text."""

    vocabulary = 256

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class Characters:
    """One token a distinct character of the text at hand."""

    def __init__(self, text: bytes) -> None:
        self.alphabet = sorted(set(text.decode("utf-8", errors="replace")))
        self.vocabulary = len(self.alphabet)
        self._index = {character: i for i, character in enumerate(self.alphabet)}

    def encode(self, text: bytes) -> np.ndarray:
        return np.array([self._index[character] for character in text.decode("utf-8", errors="replace")], np.uint32)

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.alphabet[token] for token in tokens)


class TokenizersFile:
    """A JSON file of the tokenizers library."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as Fast

        self._tokenizer = Fast.from_file(path)
        self.vocabulary = self._tokenizer.get_vocab_size()

    def encode(self, text: bytes) -> np.ndarray:
        lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
        encoded = self._tokenizer.encode_batch(lines, add_special_tokens=False)
        return np.concatenate([np.array(line.ids, np.uint32) for line in encoded]) if encoded else np.zeros(0, np.uint32)

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens)


class Pretrained:
    """A tokenizer of transformers, by name or folder."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise DataError(
                f"data.tokenizer {name!r} is neither bytes, characters, a .json file, nor a transformers tokenizer that could be "
                f"loaded ({str(error).splitlines()[0]}); give a folder with its files when there is no network"
            ) from None
        self.vocabulary = len(self._tokenizer)

    def encode(self, text: bytes) -> np.ndarray:
        lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
        pieces: list[np.ndarray] = []
        for start in range(0, len(lines), 10_000):
            batch = self._tokenizer(lines[start : start + 10_000], add_special_tokens=False, verbose=False)["input_ids"]
            pieces += [np.array(ids, np.uint32) for ids in batch]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens)


def make_tokenizer(name: str, text: bytes) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; `characters` reads its alphabet off the text.

    Raises:
        DataError: it cannot be loaded.
    """
    if name == "bytes":
        return Bytes()
    if name == "characters":
        return Characters(text)
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise DataError(f"data.tokenizer {name}: no such file; give a JSON file written by the tokenizers library")
        return TokenizersFile(name)
    return Pretrained(name)
