"""Masked-language modelling over the token stream of a text."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, Facts
from rayllp.data.special import SpecialTokens
from rayllp.data.text import draw_windows, load_stream
from rayllp.data.tokenizer import Tokenizer
from rayllp.errors import DataError
from rayllp.keys import key

MASKED, RANDOM = 0.8, 0.1
"""Of the tokens to be guessed, the share that becomes the mask and the share that becomes another token (BERT's); the rest stays."""


@dataclass(frozen=True)
class MaskedBatches:
    """Windows of a token stream between cls and sep, some of their tokens to be guessed.

    Attributes:
        tokens: of each split, its token ids end to end.
        sequence_length: tokens a sequence, cls and sep included.
        seed: keys windows and masks.
        tokenizer: of the text.
        mask_fraction: of a window's tokens that are to be guessed; one at least.
    """

    tokens: dict[str, np.ndarray]
    sequence_length: int
    seed: int
    tokenizer: Tokenizer
    mask_fraction: float

    @property
    def special(self) -> SpecialTokens:
        """Ids beside the tokenizer's own."""
        return SpecialTokens.of(self.tokenizer)

    @property
    def facts(self) -> Facts:
        """The vocabulary with its mask, and the padding."""
        return Facts(vocabulary=self.special.vocabulary, pad=self.special.pad)

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Token ids, and the original ids where they are to be guessed, both of shape (size, sequence_length)."""
        if split == "train":
            parts = [self._draw(split, step, size)]
        else:
            # One by one, so that an evaluation sees the same sequences whatever the size of its batches.
            parts = [self._draw(split, index, 1) for index in range(step * size, (step + 1) * size)]
        inputs, targets = (torch.from_numpy(np.concatenate(side)) for side in zip(*parts, strict=True))
        return inputs, targets

    def _draw(self, split: str, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        special = self.special
        windows = draw_windows(self.tokens[split], self.sequence_length - 2, self.seed, split, step, size) + special.offset
        generator = np.random.Generator(np.random.Philox(key=key(self.seed, split, step, "mask")))
        chosen = self._choose(generator, windows.shape)
        lot = generator.random(windows.shape)
        others = generator.integers(special.offset, special.vocabulary, windows.shape)
        hidden = np.where(lot < MASKED, special.mask, np.where(lot < MASKED + RANDOM, others, windows))
        inputs = _frame(np.where(chosen, hidden, windows), special.cls, special.sep)
        return inputs, _frame(np.where(chosen, windows, IGNORE), IGNORE, IGNORE)

    def _choose(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """True at equally many places of every row."""
        count = max(1, round(self.mask_fraction * shape[1]))
        chosen = np.zeros(shape, bool)
        np.put_along_axis(chosen, generator.random(shape).argsort(axis=1)[:, :count], True, axis=1)
        return chosen


def _frame(windows: np.ndarray, first: int, last: int) -> np.ndarray:
    """Rows with a token before and one behind."""
    edge = np.ones((len(windows), 1), np.int64)
    return np.concatenate([first * edge, windows, last * edge], axis=1)


def load_masked(settings: DataSettings, sequence_length: int, seed: int) -> MaskedBatches:
    """Read, tokenise, split.

    Raises:
        DataError: no or too little text, a tokenizer that cannot be loaded, or a sequence_length without room for text.
    """
    if sequence_length < 3:
        raise DataError(f"sequence_length {sequence_length} leaves no room for text between cls and sep: set at least 3")
    tokens, tokenizer = load_stream(settings, sequence_length, sequence_length - 2)
    return MaskedBatches(tokens, sequence_length, seed, tokenizer, settings.mask_fraction)
