"""Tokenizers behind one interface: two of our own, and those of the tokenizers library, sentencepiece and transformers."""

import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rayllp.data.encoding import encode_pieces
from rayllp.data.files import chunks
from rayllp.errors import DataError

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
LINES_AT_ONCE = 10_000
LONG = 2**19
"""Texts with more characters than this are encoded part by part."""
CODES = 0x110000
"""Number of code points in Unicode."""
TRAINED_ON = 2**29
"""Largest number of characters that bpe:SIZE is trained on; more change little and take minutes."""
SPECIAL_STYLES = (("[PAD]", "[CLS]", "[SEP]", "[MASK]"), ("<pad>", "<s>", "</s>", "<mask>"))


class Tokenizer(ABC):
    """What training needs of a tokenizer.

    Attributes:
        vocabulary: size of the vocabulary; every token id is below it.
        special: its ids of pad, cls, sep and mask; None if it lacks any of them.
        bos: id of the token that it puts before every text; None if it puts none there.
        eos: id of the token that ends a text; None if there is none.
    """

    vocabulary: int
    special: tuple[int, int, int, int] | None = None
    bos: int | None = None
    eos: int | None = None

    @abstractmethod
    def stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the token ids of a text that comes in pieces of any length; they are those of the whole text."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Return the text of some tokens."""

    @abstractmethod
    def texts(self) -> str:
        """Return a string that says what each token id stands for; tokenizers that disagree on any id have different ones."""

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text, one-dimensional and without special tokens."""
        return _joined(self.stream([text]))

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each of several texts."""
        return [self.encode(text) for text in texts]

    @property
    def rules(self) -> str:
        """All that determines the tokens of a text."""
        return self.texts()

    @property
    def serialised(self) -> str | None:
        """What `restore_tokenizer` makes the same tokenizer from, if it was made from a text; else None."""
        return None

    def save(self, path: Path) -> bool:
        """Write the JSON file that `data.tokenizer` takes. Returns False if there is none: only the tokenizers library has such files."""
        return False


class Bytes(Tokenizer):
    """One token per byte: works on any text, with nothing to download."""

    vocabulary = 256

    def stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the bytes of each piece."""
        return (np.frombuffer(piece.encode(), np.uint8) for piece in pieces)

    def decode(self, tokens: list[int]) -> str:
        """Return the text; bytes that are not UTF-8 become the replacement character."""
        return bytes(tokens).decode("utf-8", errors="replace")

    def texts(self) -> str:
        """Return the tokenizer's name, which determines all tokens."""
        return "bytes"


class Characters(Tokenizer):
    """One token per distinct character of the given text."""

    def __init__(self, pieces: Iterable[str]) -> None:
        seen = np.zeros(CODES, bool)
        for piece in pieces:
            seen[_codes(piece)] = True
        self.alphabet = [chr(code) for code in np.flatnonzero(seen)]
        self.vocabulary = len(self.alphabet)
        self._ids = np.full(CODES, self.vocabulary, np.uint32)
        self._ids[seen] = np.arange(self.vocabulary)

    def __reduce__(self) -> tuple[Any, ...]:
        return Characters, (["".join(self.alphabet)],)

    def stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield each character's index in the alphabet.

        Raises:
            KeyError: a character is not in the alphabet.
        """
        return map(self._encode, pieces)

    def _encode(self, text: str) -> np.ndarray:
        ids = self._ids[_codes(text)]
        if len(ids) and ids.max() == self.vocabulary:
            raise KeyError(text[int(ids.argmax())])
        return ids

    def decode(self, tokens: list[int]) -> str:
        """Return the characters with these indices."""
        return "".join(self.alphabet[token] for token in tokens)

    def texts(self) -> str:
        """Return the alphabet."""
        return "".join(self.alphabet)

    @property
    def serialised(self) -> str:
        """The alphabet, from which `restore_tokenizer` makes the same tokenizer."""
        return "".join(self.alphabet)


class _Fast(Tokenizer):
    """A tokenizer of the tokenizers library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The file may ask for truncation or padding, but sequences are cut from the whole stream here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.vocabulary = _ids_end(tokenizer.get_vocab())

    def stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of a text that comes in pieces, using all CPUs."""
        return encode_pieces(self._tokenizer, pieces)

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """Encode each of several texts, using all CPUs."""
        if any(len(text) > LONG for text in texts):
            return super().encode_all(texts)
        return [np.array(encoding.ids, np.uint32) for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def texts(self) -> str:
        """Return the vocabulary as JSON."""
        return json.dumps(self._tokenizer.get_vocab(), sort_keys=True)

    @property
    def rules(self) -> str:
        """The tokenizer's whole definition, as JSON."""
        return str(self._tokenizer.to_str())

    def decode(self, tokens: list[int]) -> str:
        """Return the text, decoded by the library."""
        return self._tokenizer.decode(tokens)

    def save(self, path: Path) -> bool:
        """Write the JSON file that `data.tokenizer` takes."""
        self._tokenizer.save(str(path))
        return True


class TokenizersFile(_Fast):
    """A JSON file of the tokenizers library. Its special tokens and eos are found by their usual names."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            super().__init__(Fast.from_file(path))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"data.tokenizer {path} is not a tokenizer ({error}); give a JSON file written by the tokenizers library"
            ) from None
        styles = ([self._tokenizer.token_to_id(token) for token in style] for style in SPECIAL_STYLES)
        self.special = next((tuple(ids) for ids in styles if None not in ids), None)
        ends = (self._tokenizer.token_to_id(token) for token in ENDS)
        self.eos = next((end for end in ends if end is not None), None)


class TrainedBPE(_Fast):
    """Byte-level BPE trained on the given text. Decoding restores any text exactly, and the same text gives the same ids on every machine.

    The vocabulary is smaller than asked for if the text has too few pairs to merge.
    """

    def __init__(self, size: int, pieces: Iterable[str]) -> None:
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, trainers

        tokenizer = Fast(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        # All 256 bytes are tokens, whether they occur in the text or not, so that no text has an unknown token.
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
        tokenizer.train_from_iterator(_lines(_beginning(pieces, TRAINED_ON)), trainer)
        super().__init__(tokenizer)

    @classmethod
    def read(cls, serialised: str) -> "TrainedBPE":
        """Restore a tokenizer that was trained before, from its `serialised`."""
        from tokenizers import Tokenizer as Fast

        tokenizer = cls.__new__(cls)
        _Fast.__init__(tokenizer, Fast.from_str(serialised))
        return tokenizer

    @property
    def serialised(self) -> str:
        """The tokenizer's definition, as JSON, from which `restore_tokenizer` makes the same tokenizer."""
        return self.rules


class SentencePiece(Tokenizer):
    """A model file of sentencepiece (or .gz). Line ends are lost, since sentencepiece treats them as spaces."""

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

    def encode(self, text: str) -> np.ndarray:
        """Encode line by line, as the model was trained."""
        # Passing a list would start a pool of threads at every call, which is fifteen times slower for a single line.
        return _joined(np.array(self._processor.encode(line, out_type=int), np.uint32) for line in text.split("\n"))

    def stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of a text that comes in pieces, using all CPUs."""
        lines = (line.removesuffix("\n") for line in _lines(pieces))
        for some in chunks(lines, LINES_AT_ONCE):
            yield _joined(np.array(ids, np.uint32) for ids in self._processor.encode(some, out_type=int))

    def texts(self) -> str:
        """Return the model's pieces as JSON."""
        return json.dumps([self._processor.id_to_piece(number) for number in range(self.vocabulary)])

    def decode(self, tokens: list[int]) -> str:
        """Return the text, with its spaces restored."""
        return self._processor.decode(tokens)


class Pretrained(Tokenizer):
    """A tokenizer of transformers, by name or folder."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # None would ask on the terminal
        except (OSError, ValueError) as error:
            if Path(name).is_dir():
                raise DataError(
                    f"data.tokenizer {name!r} is a folder here, and has no tokenizer of transformers ({str(error).splitlines()[0]}): give "
                    "a folder that has one; for the model of that name on the hub, call the folder something else"
                ) from None
            raise DataError(
                f"data.tokenizer {name!r} is neither bytes, characters, bpe:SIZE, a .json, .model or .spm file, nor a transformers "
                f"tokenizer that could be loaded ({str(error).splitlines()[0]}); give a folder with its files when there is no network"
            ) from None
        self.vocabulary = _ids_end(self._tokenizer.get_vocab())
        own = self._tokenizer
        backend = getattr(own, "backend_tokenizer", None)
        self._fast = _Fast(backend) if hasattr(backend, "encode_batch") else None
        ids = (own.pad_token_id, own.cls_token_id, own.sep_token_id, own.mask_token_id)
        self.special = None if None in ids else ids
        self.eos = own.eos_token_id
        of_nothing = own("")["input_ids"]
        self.bos = of_nothing[0] if of_nothing and of_nothing[0] == own.bos_token_id else None

    def stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of a text that comes in pieces. A tokenizer that is written in Python gets the whole text at once."""
        if self._fast is not None:
            return self._fast.stream(pieces)
        return iter([np.array(self._tokenizer("".join(pieces), add_special_tokens=False, verbose=False)["input_ids"], np.uint32)])

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """Encode each of several texts, using all CPUs unless the tokenizer is written in Python."""
        return super().encode_all(texts) if self._fast is None else self._fast.encode_all(texts)

    @property
    def rules(self) -> str:
        """What determines its tokens: the tokenizer's whole definition as JSON, or class and vocabulary if it is written in Python."""
        return self._fast.rules if self._fast is not None else f"{type(self._tokenizer).__name__} {self.texts()}"

    def texts(self) -> str:
        """Return the vocabulary as JSON."""
        return json.dumps(self._tokenizer.get_vocab(), sort_keys=True)

    def decode(self, tokens: list[int]) -> str:
        """Return the text, decoded by transformers."""
        return self._tokenizer.decode(tokens)


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    parts = [part for part in parts if len(part)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def _codes(text: str) -> np.ndarray:
    """Return the code points of a text, uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text, line ends included."""
    line_parts: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        line_parts.append(first)
        for line in others:
            yield "".join(line_parts) + "\n"
            line_parts = [line]
    if last := "".join(line_parts):
        yield last


def _beginning(pieces: Iterable[str], characters: int) -> Iterator[str]:
    for piece in pieces:
        yield piece[:characters]
        characters -= len(piece)
        if characters <= 0:
            return


def _ids_end(vocabulary: dict[str, int]) -> int:
    """Return the smallest number above all ids. Ids may have gaps, so this may exceed the number of tokens."""
    return max(vocabulary.values(), default=-1) + 1
