"""Text to token ids and back."""

import difflib
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rayllp.data.files import not_utf8
from rayllp.errors import DataError

PIECE, OVERLAP, AGREEING = 2**18, 2**11, 32
"""Characters that are encoded in one call, those that it has before and after them, and tokens on both sides of a cut that must agree."""
PIECES_AT_ONCE = 16
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

    def texts(self) -> str:
        """What every token stands for, by its id: another one for every other tokenizer."""
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

    def texts(self) -> str:
        """Its name."""
        return "bytes"


class Characters:
    """One token a distinct character of the text at hand."""

    def __init__(self, text: bytes) -> None:
        self.alphabet = sorted(set(decode_text(text)))
        self.vocabulary = len(self.alphabet)
        self._index = {character: i for i, character in enumerate(self.alphabet)}

    def encode(self, text: bytes) -> np.ndarray:
        """Places of the characters in the alphabet.

        Raises:
            KeyError: a character that is not in it.
        """
        return np.array([self._index[character] for character in decode_text(text)], np.uint32)

    def decode(self, tokens: list[int]) -> str:
        """The characters at these places."""
        return "".join(self.alphabet[token] for token in tokens)

    def texts(self) -> str:
        """The alphabet."""
        return "".join(self.alphabet)

    @property
    def made(self) -> str:
        """The alphabet, of which `restore_tokenizer` makes the same tokenizer."""
        return "".join(self.alphabet)


class _Fast:
    """A tokenizer of the tokenizers library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A file may ask for sequences of one length; ours are cut from the whole stream.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.vocabulary = _ids_end(tokenizer.get_vocab())

    def encode(self, text: bytes) -> np.ndarray:
        """The ids that the library gives to the whole text, without special tokens."""
        return _encode(self._tokenizer, decode_text(text))

    def texts(self) -> str:
        """Its vocabulary."""
        return json.dumps(self._tokenizer.get_vocab(), sort_keys=True)

    def decode(self, tokens: list[int]) -> str:
        """The text, as the library puts it together."""
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
        tokenizer.train_from_iterator(re.findall(r"[^\n]*\n|[^\n]+", decode_text(text)), trainer)
        super().__init__(tokenizer)

    @classmethod
    def read(cls, made: str) -> "TrainedBPE":
        """One that was trained before, of its `made`."""
        from tokenizers import Tokenizer as Fast

        tokenizer = cls.__new__(cls)
        _Fast.__init__(tokenizer, Fast.from_str(made))
        return tokenizer

    @property
    def made(self) -> str:
        """The JSON of the tokenizers library."""
        return str(self._tokenizer.to_str())


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
        lines = (self._processor.encode(line, out_type=int) for line in decode_text(text).split("\n"))
        return np.concatenate([np.zeros(0, np.uint32), *(np.array(ids, np.uint32) for ids in lines)])

    def texts(self) -> str:
        """The model's pieces."""
        return json.dumps([self._processor.id_to_piece(number) for number in range(self.vocabulary)])

    def decode(self, tokens: list[int]) -> str:
        """The text, spaces restored."""
        return self._processor.decode(tokens)


class Pretrained:
    """A tokenizer of transformers, by name or folder.

    Attributes:
        special: ids of its own pad, cls, sep and mask; None where one is missing.
    """

    def __init__(self, name: str) -> None:
        _refuse_slips(name)
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
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

    def encode(self, text: bytes) -> np.ndarray:
        """The whole text, without special tokens."""
        if self._fast is not None:
            return self._fast.encode(text)
        return np.array(self._tokenizer(decode_text(text), add_special_tokens=False, verbose=False)["input_ids"], np.uint32)

    def texts(self) -> str:
        """Its vocabulary."""
        return json.dumps(self._tokenizer.get_vocab(), sort_keys=True)

    def decode(self, tokens: list[int]) -> str:
        """The text, as transformers puts it together."""
        return self._tokenizer.decode(tokens)


def restore_tokenizer(name: str, made: str | None, file: Path | None) -> Tokenizer | None:
    """The tokenizer of a run that goes on; None: it is not kept, and its name says which it is.

    Args:
        name: as the settings have it.
        made: the tokenizer's own `made`.
        file: a copy of a tokenizer of the tokenizers library.
    """
    if name == "characters" and made is not None:
        return Characters(made.encode())
    if not name.startswith("bpe:") and not name.endswith(".json"):
        return None
    if name.startswith("bpe:") and made is not None:
        return TrainedBPE.read(made)
    if file is None or not file.is_file():
        return None
    return TrainedBPE.read(file.read_text(encoding="utf-8")) if name.startswith("bpe:") else TokenizersFile(str(file))


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


def _refuse_slips(name: str) -> None:
    """Refuse what is nearly one of our own names, before it is looked for in the network."""
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


def decode_text(text: bytes) -> str:
    """The characters of a text in UTF-8.

    Raises:
        DataError: it is none; says the line.
    """
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        line, why = not_utf8(text, error)
        raise DataError(f"line {line}: {why}; save the text as UTF-8") from None


def _ids_end(vocabulary: dict[str, int]) -> int:
    """Every id is below this: ids may have holes, so that there are fewer tokens."""
    return max(vocabulary.values(), default=-1) + 1


def _encode(tokenizer: Any, text: str) -> np.ndarray:
    """The ids that the tokenizers library gives to a text.

    A long text is encoded in overlapping pieces, since what the library makes of one is far larger than its ids. They are joined where both
    have the same tokens in the same places; where they do not, the text is encoded as a whole.
    """
    cuts = list(range(PIECE, len(text) - PIECE // 2, PIECE))
    if not cuts:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)
    starts = [0, *(cut - OVERLAP for cut in cuts)]
    ends = [*(cut + OVERLAP for cut in cuts), len(text)]
    ids: list[np.ndarray] = []
    before, first = None, 0
    for number in range(0, len(starts), PIECES_AT_ONCE):
        these = list(zip(starts, ends, strict=True))[number : number + PIECES_AT_ONCE]
        for piece, encoded in enumerate(
            tokenizer.encode_batch([text[start:end] for start, end in these], add_special_tokens=False), number
        ):
            if before is not None:
                cut = cuts[piece - 1]
                joint = _join(before, cut - starts[piece - 1], encoded, cut - starts[piece])
                if joint is None:
                    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)
                ids.append(np.array(before.ids[first : joint[0]], np.uint32))
                first = joint[1]
            before = encoded
    assert before is not None
    return np.concatenate([*ids, np.array(before.ids[first:], np.uint32)])


def _join(left: Any, left_cut: int, right: Any, right_cut: int) -> tuple[int, int] | None:
    """The first token at or behind the cut, by its number in both encodings; None: they differ around it."""
    found = (_token_at(left, left_cut), _token_at(right, right_cut))
    if found[0] is None or found[1] is None:
        return None
    around = []
    for encoding, at, cut in ((left, found[0], left_cut), (right, found[1], right_cut)):
        ids = encoding.ids  # makes a list of all, each time
        tokens = range(max(0, at - AGREEING), min(len(ids), at + AGREEING))
        around.append([(ids[token], encoding.token_to_chars(token)[0] - cut) for token in tokens])
    return (found[0], found[1]) if around[0] == around[1] and len(around[0]) == 2 * AGREEING else None


def _token_at(encoding: Any, cut: int) -> int | None:
    for place in range(cut, cut + OVERLAP):
        token = encoding.char_to_token(place)
        if token is not None and encoding.token_to_chars(token)[0] >= cut:
            return int(token)
    return None
