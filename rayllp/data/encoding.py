"""Encode a text of any length with a tokenizer of the tokenizers library, part by part, into exactly the tokens of the whole text."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from rayllp.data.files import chunks
from rayllp.errors import DataError

PART, OVERLAP, AGREEING = 2**18, 2**11, 32
"""How a text is divided: characters per part, characters of context before and after each part, and how many tokens on both sides of a cut
must agree in the two encodings that meet there.
"""
PARTS_AT_ONCE = 16


def encode_pieces(tokenizer: Any, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the ids of a text that comes in pieces of any length, as the tokenizers library would give them to the whole text.

    The library's result takes far more memory than the ids, so a long text is encoded in overlapping parts. Two neighbouring parts are
    joined where their encodings have the same tokens at the same positions; where they do not agree, both parts are encoded again as one.
    """
    parts, left, first = _parts(pieces), None, 0
    for together in chunks(parts, PARTS_AT_ONCE):
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
    """A part of a text, with some context on both sides; the part itself is text[begin:end]."""

    text: str
    begin: int
    end: int


class _Encoded(NamedTuple):
    part: _Part
    encoding: Any


def _parts(pieces: Iterable[str]) -> Iterator[_Part]:
    """Yield overlapping parts of a text. The last one takes whatever is left: at most half as long again as the others."""
    text, begin = "", 0
    for piece in pieces:
        text += piece
        while len(text) - begin > PART + max(OVERLAP, PART // 2):
            end = begin + PART
            yield _Part(text[: end + OVERLAP], begin, end)
            text, begin = text[end - OVERLAP :], OVERLAP
    yield _Part(text, begin, len(text))


def _as_one(tokenizer: Any, left: _Encoded, first: int, right: _Encoded) -> tuple[_Encoded, int]:
    """Encode two neighbouring parts as one, and find in the result the first token that has not been yielded yet.

    Args:
        tokenizer: a tokenizer of the tokenizers library.
        left, right: the two parts.
        first: number of that token in the left part's encoding.

    Returns:
        The joint part with its encoding, and the number of that token in it.

    Raises:
        DataError: the joint encoding has other tokens there: what the tokenizer does depends on text further away than a part is long.
    """
    text = left.part.text[: left.part.end] + right.part.text[right.part.begin :]
    part = _Part(text, left.part.begin, left.part.end + right.part.end - right.part.begin)
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=False)
    if first == 0:
        return _Encoded(part, encoding), 0
    start = left.encoding.token_to_chars(first)[0]
    token = _token_at(encoding, start)
    few = slice(first, first + AGREEING)
    if token is None or encoding.token_to_chars(token)[0] != start or encoding.ids[token:][:AGREEING] != left.encoding.ids[few]:
        raise DataError(
            "with data.tokenizer, a text's tokens depend on what follows thousands of characters later, so a long text cannot be encoded "
            "piece by piece: give the text as documents (lines of a .jsonl), or use another tokenizer"
        )
    return _Encoded(part, encoding), token


def _join(left: Any, left_cut: int, right: Any, right_cut: int) -> tuple[int, int] | None:
    """Return the number, in each encoding, of the first token that starts at or after the cut; None if the encodings differ around it."""
    left_token, right_token = _token_at(left, left_cut), _token_at(right, right_cut)
    if left_token is None or right_token is None:
        return None
    around = []
    for encoding, first, cut in ((left, left_token, left_cut), (right, right_token, right_cut)):
        ids = encoding.ids  # building this list costs time, so do it once
        tokens = range(max(0, first - AGREEING), min(len(ids), first + AGREEING))
        around.append([(ids[token], encoding.token_to_chars(token)[0] - cut) for token in tokens])
    return (left_token, right_token) if around[0] == around[1] and len(around[0]) == 2 * AGREEING else None


def _token_at(encoding: Any, cut: int) -> int | None:
    """Return the number of the first token that starts at or after a character, looking no further than the overlap; None: none does."""
    for character in range(cut, cut + OVERLAP):
        token = encoding.char_to_token(character)
        if token is not None and encoding.token_to_chars(token)[0] >= cut:
            return int(token)
    return None
