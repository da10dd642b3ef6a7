"""Special tokens beside a tokenizer's own: one numbering for pretraining and fine-tuning."""

from dataclasses import dataclass

import numpy as np

from rayllp.data.tokenizer import Tokenizer

RESERVED = 4


@dataclass(frozen=True)
class SpecialTokens:
    """The tokenizer's own pad, cls, sep and mask where it has all four (a BERT's); else ids 0 to 3, its tokens following them.

    In front and not behind, since RoBERTa counts positions from the id of the padding on.

    Attributes:
        pad: fills up short sequences.
        cls: begins every sequence; its state is what classes are told from.
        sep: ends a sentence.
        mask: stands where a token is to be guessed.
        offset: the id of the tokenizer's token 0.
        vocabulary: ids are below this.
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
        """The special tokens to go with a tokenizer."""
        own, size = getattr(tokenizer, "special", None), tokenizer.vocabulary
        pad, begin, sep, mask = own or range(RESERVED)
        offset = 0 if own else RESERVED
        return cls(tokenizer, pad, begin, sep, mask, offset, size + offset)

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of a text, none of them special: int64."""
        return self.tokenizer.encode(text).astype(np.int64) + self.offset

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special ones left out."""
        special = {self.pad, self.cls, self.sep, self.mask}
        return self.tokenizer.decode([token - self.offset for token in ids if token not in special])
