"""A long text through a tokenizer of the tokenizers library, piece by piece: the tokens are those of the whole."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from rayllp.errors import DataError

PIECE, OVERLAP, AGREEING = 2**18, 2**11, 32
"""Characters that are encoded in one call, those that it has before and after them, and tokens on both sides of a cut that must agree."""
PIECES_AT_ONCE = 16


def encode_pieces(tokenizer: Any, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids that the tokenizers library gives to a text that comes in pieces of any length.

    A long text is encoded in overlapping parts, since what the library makes of one is far larger than its ids. They are joined where both
    have the same tokens in the same places; where they do not, both are encoded as one.
    """
    parts, left, first = _parts(pieces), None, 0
    for together in iter(lambda: list(islice(parts, PIECES_AT_ONCE)), []):
        encodings = tokenizer.encode_batch([part.text for part in together], add_special_tokens=False)
        for part, encoding in zip(together, encodings, strict=True):
            right = _Encoded(part, encoding)
            if left is not None:
                joint = _join(left.encoding, left.part.end, right.encoding, right.part.begin)
                if joint is None:
                    left, first = _as_one(tokenizer, left, first, right)
                    continue
                yield np.array(left.encoding.ids[first : joint[0]], np.uint32)
                first = joint[1]
            left = right
    if left is not None:
        yield np.array(left.encoding.ids[first:], np.uint32)


class _Part(NamedTuple):
    """A part of a text with what surrounds it there: its own is text[begin:end]."""

    text: str
    begin: int
    end: int


class _Encoded(NamedTuple):
    part: _Part
    encoding: Any


def _parts(pieces: Iterable[str]) -> Iterator[_Part]:
    """Overlapping parts of a text; the last is as long as it comes, up to half as long again as the others."""
    text, begin = "", 0
    for piece in pieces:
        text += piece
        while len(text) - begin > PIECE + max(OVERLAP, PIECE // 2):
            end = begin + PIECE
            yield _Part(text[: end + OVERLAP], begin, end)
            text, begin = text[end - OVERLAP :], OVERLAP
    yield _Part(text, begin, len(text))


def _as_one(tokenizer: Any, left: _Encoded, first: int, right: _Encoded) -> tuple[_Encoded, int]:
    """Two neighbouring parts as one, and the first of its tokens that has not been passed on.

    Args:
        tokenizer: of the tokenizers library.
        left, right: the parts.
        first: that token of the left one.

    Raises:
        DataError: another one than before begins there: the tokenizer looks further than a part is long.
    """
    text = left.part.text[: left.part.end] + right.part.text[right.part.begin :]
    part = _Part(text, left.part.begin, left.part.end + right.part.end - right.part.begin)
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=False)
    if first == 0:
        return _Encoded(part, encoding), 0
    start = left.encoding.token_to_chars(first)[0]
    found = _token_at(encoding, start)
    few = slice(first, first + AGREEING)
    if found is None or encoding.token_to_chars(found)[0] != start or encoding.ids[found:][:AGREEING] != left.encoding.ids[few]:
        raise DataError(
            "data.tokenizer gives a text other tokens for what follows thousands of characters later, so that a long one cannot be encoded "
            "piece by piece: give the text as documents (lines of a .jsonl), or another tokenizer"
        )
    return _Encoded(part, encoding), found


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
