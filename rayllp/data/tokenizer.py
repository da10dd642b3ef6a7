"""Text to token ids and back."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rayllp.errors import DataError

LINES_AT_ONCE = 10_000
SMALLEST_BPE = 257
SPECIAL_STYLES = (("[PAD]", "[CLS]", "[SEP]", "[MASK]"), ("<pad>", "<s>", "</s>", "<mask>"))
SENTENCEPIECE_ENDINGS = (".model", ".spm", ".model.gz", ".spm.gz")


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        ...

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids of a text, an array of one dimension."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens."""
        ...


class Bytes:
    """One token a byte; nothing to download, any text."""

    vocabulary = 256

    def encode(self, text: bytes) -> np.ndarray:
        """The bytes themselves."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: list[int]) -> str:
        """The text; bytes that are no UTF-8 become the replacement character."""
        return bytes(tokens).decode("utf-8", errors="replace")


class Characters:
    """One token a distinct character of the text at hand."""

    def __init__(self, text: bytes) -> None:
        self.alphabet = sorted(set(text.decode("utf-8", errors="replace")))
        self.vocabulary = len(self.alphabet)
        self._index = {character: i for i, character in enumerate(self.alphabet)}

    def encode(self, text: bytes) -> np.ndarray:
        """Places of the characters in the alphabet."""
        return np.array([self._index[character] for character in text.decode("utf-8", errors="replace")], np.uint32)

    def decode(self, tokens: list[int]) -> str:
        """The characters at these places."""
        return "".join(self.alphabet[token] for token in tokens)


class _Fast:
    """A tokenizer of the tokenizers library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocabulary: int = tokenizer.get_vocab_size()

    def encode(self, text: bytes) -> np.ndarray:
        return _encode_lines(text, lambda lines: [line.ids for line in self._tokenizer.encode_batch(lines, add_special_tokens=False)])

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens)

    def save(self, path: Path) -> None:
        """Write the JSON that `data.tokenizer` takes."""
        self._tokenizer.save(str(path))


class TokenizersFile(_Fast):
    """A JSON file of the tokenizers library.

    Attributes:
        special: ids of its own pad, cls, sep and mask; None where one is missing.
    """

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            super().__init__(Fast.from_file(path))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"data.tokenizer {path} is no tokenizer ({error}); give a JSON file written by the tokenizers library"
            ) from None
        found = ([self._tokenizer.token_to_id(token) for token in style] for style in SPECIAL_STYLES)
        self.special = next((tuple(ids) for ids in found if None not in ids), None)


class TrainedBPE(_Fast):
    """Byte-level BPE trained on the text at hand: any text comes back as it was, and the same text gives the same ids everywhere.

    The vocabulary is smaller than asked for where the text has too few pairs to merge.
    """

    def __init__(self, size: int, text: bytes) -> None:
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, trainers

        tokenizer = Fast(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        # All 256 bytes are tokens, whether the text has them or not, so that nothing is unknown.
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
        tokenizer.train_from_iterator(_lines(text), trainer)
        super().__init__(tokenizer)


class SentencePiece:
    """A model file of sentencepiece, or a .gz of one. Line ends are lost: to sentencepiece they are spaces."""

    def __init__(self, path: str) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise DataError(f"data.tokenizer {path} needs the sentencepiece package: pip install 'rayllp[translation]'") from None
        try:
            content = Path(path).read_bytes()
            model = gzip.decompress(content) if path.endswith(".gz") else content
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, EOFError, zlib.error, RuntimeError) as error:
            raise DataError(f"data.tokenizer {path} cannot be read ({error}); give a model file of sentencepiece or a .gz of one") from None
        self.vocabulary: int = self._processor.get_piece_size()

    def encode(self, text: bytes) -> np.ndarray:
        """Line by line, as the model was trained."""
        # A list would start a pool of threads at every call, fifteen times slower where calls are of one line.
        return _encode_lines(text, lambda lines: [self._processor.encode(line, out_type=int) for line in lines])

    def decode(self, tokens: list[int]) -> str:
        """The text, spaces restored."""
        return self._processor.decode(tokens)


class Pretrained:
    """A tokenizer of transformers, by name or folder.

    Attributes:
        special: ids of its own pad, cls, sep and mask; None where one is missing.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise DataError(
                f"data.tokenizer {name!r} is neither bytes, characters, bpe:SIZE, a .json, .model or .spm file, nor a transformers "
                f"tokenizer that could be loaded ({str(error).splitlines()[0]}); give a folder with its files when there is no network"
            ) from None
        self.vocabulary = len(self._tokenizer)
        own = self._tokenizer
        ids = (own.pad_token_id, own.cls_token_id, own.sep_token_id, own.mask_token_id)
        self.special = None if None in ids else ids

    def encode(self, text: bytes) -> np.ndarray:
        """Line by line, without special tokens."""
        return _encode_lines(text, lambda lines: self._tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, tokens: list[int]) -> str:
        """The text, as transformers puts it together."""
        return self._tokenizer.decode(tokens)


def make_tokenizer(name: str, text: bytes) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; `characters` and `bpe:SIZE` are made from the text.

    Raises:
        DataError: it cannot be loaded, or the name breaks a rule.
    """
    if name == "bytes":
        return Bytes()
    if name == "characters":
        return Characters(text)
    if name.startswith("bpe:"):
        return TrainedBPE(_parse_size(name), text)
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise DataError(f"data.tokenizer {name}: no such file; give a JSON file written by the tokenizers library")
        return TokenizersFile(name)
    if name.endswith(SENTENCEPIECE_ENDINGS):
        if not Path(name).is_file():
            raise DataError(f"data.tokenizer {name}: no such file; give a model file of sentencepiece or a .gz of one")
        return SentencePiece(name)
    return Pretrained(name)


def _parse_size(name: str) -> int:
    size = name.removeprefix("bpe:")
    if not (size.isascii() and size.isdecimal()) or int(size) < SMALLEST_BPE:
        raise DataError(
            f"data.tokenizer {name!r}: SIZE of bpe:SIZE must be a number of at least {SMALLEST_BPE} (256 bytes and a pair); "
            "write bpe:8000, or use bytes"
        )
    return int(size)


def _lines(text: bytes) -> list[str]:
    return text.decode("utf-8", errors="replace").splitlines(keepends=True)


def _encode_lines(text: bytes, encode: Callable[[list[str]], list[list[int]]]) -> np.ndarray:
    """Ids of a text by a function of many lines; in parts, since what a library makes of a line is far larger than its ids."""
    lines = _lines(text)
    pieces = [np.zeros(0, np.uint32)]
    for start in range(0, len(lines), LINES_AT_ONCE):
        pieces += [np.array(ids, np.uint32) for ids in encode(lines[start : start + LINES_AT_ONCE])]
    return np.concatenate(pieces)
