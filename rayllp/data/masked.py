"""Masked-language modelling over the token stream of a text."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, Facts
from rayllp.data.sampling import Order
from rayllp.data.special import SpecialTokens
from rayllp.data.text import StreamBatches, load_tokens
from rayllp.data.tokenizer import Tokenizer
from rayllp.errors import DataError
from rayllp.keys import key

MASKED, RANDOM = 0.8, 0.1
"""Of the tokens to be guessed, the share that becomes the mask and the share that becomes another token (BERT's); the rest stays."""


@dataclass(frozen=True)
class MaskedBatches(StreamBatches):
    """Windows of a token stream between cls and sep, some of their tokens to be guessed: those of a held-out window always the same.

    Attributes:
        mask_fraction: of a window's tokens that are to be guessed; one at least.
        skipped: how many files and rows were left out (data.on_error=skip).
    """

    mask_fraction: float
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Those between cls and sep."""
        return self.sequence_length - 2

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
        windows, filled = self.windows(split, self.starts(split, step, size))
        if split == "train":
            parts = [self._mask(windows, key(self.order.seed, split, step, "mask"))]
        else:
            # One by one, so that an evaluation hides the same tokens whatever the size of its batches, and the seed.
            keys = [key(0, split, index, "mask") for index in range(step * size, (step + 1) * size)]
            parts = [self._mask(windows[row : row + 1], keys[row]) for row in range(size)]
        inputs, targets = (np.concatenate(side) for side in zip(*parts, strict=True))
        return torch.from_numpy(inputs), torch.from_numpy(np.where(filled[:, None], targets, IGNORE))

    def _mask(self, windows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        special = self.special
        windows = windows + special.offset
        generator = np.random.Generator(np.random.Philox(key=seed))
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


def load_masked(settings: DataSettings, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None) -> MaskedBatches:
    """Read, tokenise, split.

    Raises:
        DataError: no or too little text, a tokenizer that cannot be loaded, or a sequence_length without room for text.
    """
    if sequence_length < 3:
        raise DataError(f"sequence_length {sequence_length} leaves no room for text between cls and sep: set at least 3")
    if settings.documents == "packed":
        raise DataError("data.documents=packed is for models that predict the next token: leave it out for model.family=bert")
    found = load_tokens(settings, sequence_length, sequence_length - 2, tokenizer)
    order = Order(seed, settings.sampling)
    return MaskedBatches(found.splits, sequence_length, order, found.tokenizer, settings.mask_fraction, found.skipped)
