"""Special tokens (padding, mask, …), numbered alike for pretraining and fine-tuning."""

from dataclasses import dataclass

import numpy as np

from rayllp.data.tokenizer_kinds import Tokenizer

RESERVED = 4


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens that go with a tokenizer.

    A tokenizer that has pad, cls, sep and mask itself (as BERT's) keeps its own ids. Otherwise they are 0 to 3 and the tokenizer's ids are
    shifted up by four. They come first rather than last because RoBERTa counts positions from the padding id.

    Attributes:
        tokenizer: the tokenizer of the text.
        pad: fills up short sequences.
        cls: begins every sequence; classifiers read its hidden state.
        sep: ends a sentence.
        mask: replaces a token that is to be predicted.
        offset: what is added to each of the tokenizer's ids.
        vocabulary: size of the vocabulary, special tokens included.
    """

    tokenizer: Tokenizer
    pad: int
    cls: int
    sep: int
    mask: int
    offset: int
    vocabulary: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        """Return the special tokens that go with a tokenizer."""
        own, size = tokenizer.special, tokenizer.vocabulary
        pad, begin, sep, mask = own or range(RESERVED)
        offset = 0 if own else RESERVED
        return cls(tokenizer, pad, begin, sep, mask, offset, size + offset)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int64, without any special token."""
        return self.tokenizer.encode(text).astype(np.int64) + self.offset

    def decode(self, ids: list[int]) -> str:
        """Return the text of some ids, leaving out special tokens."""
        special = {self.pad, self.cls, self.sep, self.mask}
        return self.tokenizer.decode([token - self.offset for token in ids if token not in special])
