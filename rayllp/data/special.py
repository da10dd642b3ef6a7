"""The special tokens of bert's inputs: one numbering for pretraining and fine-tuning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that follow the tokenizer's own, so that a pretrained model's embedding fits the task it is tuned for.

    Attributes:
        pad: fills up short sequences.
        cls: begins every sequence; its state is what classes are told from.
        sep: ends a sentence.
        mask: stands where a token is to be guessed.
        vocabulary: ids are below this, the tokenizer's own included.
    """

    pad: int
    cls: int
    sep: int
    mask: int
    vocabulary: int

    @classmethod
    def of(cls, vocabulary: int) -> "SpecialTokens":
        """The special tokens next to a tokenizer with so many of its own."""
        return SpecialTokens(pad=vocabulary, cls=vocabulary + 1, sep=vocabulary + 2, mask=vocabulary + 3, vocabulary=vocabulary + 4)
