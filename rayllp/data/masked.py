"""Masked-language modelling on the token stream of a text."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayllp.config import DataSettings
from rayllp.data.base import IGNORE, DatasetFacts
from rayllp.data.special_tokens import SpecialTokens
from rayllp.data.text import StreamBatches, load_stream
from rayllp.data.tokenizer_kinds import Tokenizer
from rayllp.errors import DataError
from rayllp.keys import key

MASKED, RANDOM = 0.8, 0.1
"""Shares of the tokens to be predicted that are replaced by the mask and by a random token, as in BERT; the rest stay as they are."""


@dataclass(frozen=True, kw_only=True)
class MaskedBatches(StreamBatches):
    """Windows of a token stream, between cls and sep, in which some tokens are to be predicted; in a held-out window always the same ones.

    Attributes:
        mask_fraction: share of a window's tokens that is to be predicted; at least one token is.
    """

    mask_fraction: float

    @property
    def length(self) -> int:
        """Tokens of the stream in a sequence: all but cls and sep."""
        return self.sequence_length - 2

    @property
    def special(self) -> SpecialTokens:
        """The special tokens that go with the tokenizer."""
        return SpecialTokens.of(self.tokenizer)

    @property
    def facts(self) -> DatasetFacts:
        """Size of the vocabulary, special tokens included, and the padding id."""
        return DatasetFacts(vocabulary=self.special.vocabulary, pad=self.special.pad)

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return token ids, and the original ids at the masked places (IGNORE elsewhere), both of shape (size, sequence_length)."""
        windows, filled = self.windows(split, self.starts(split, step, size))
        if split == "train":
            parts = [self._mask(windows, key(self.order.seed, split, step, "mask"))]
        else:
            # Row by row, with a key for each window: every evaluation masks the same tokens, whatever its batch size and the seed.
            keys = [key(0, split, index, "mask") for index in range(step * size, (step + 1) * size)]
            parts = [self._mask(windows[row : row + 1], keys[row]) for row in range(size)]
        inputs, targets = (np.concatenate(side) for side in zip(*parts, strict=True))
        return torch.from_numpy(inputs), torch.from_numpy(np.where(filled[:, None], targets, IGNORE))

    def _mask(self, windows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of some windows, masked under this key."""
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
        """Return a boolean mask that chooses equally many places in every row."""
        count = max(1, round(self.mask_fraction * shape[1]))
        chosen = np.zeros(shape, bool)
        np.put_along_axis(chosen, generator.random(shape).argsort(axis=1)[:, :count], True, axis=1)
        return chosen


def _frame(windows: np.ndarray, first: int, last: int) -> np.ndarray:
    """Put one token before and one after each row."""
    edge = np.ones((len(windows), 1), np.int64)
    return np.concatenate([first * edge, windows, last * edge], axis=1)


def load_masked(settings: DataSettings, sequence_length: int, seed: int, tokenizer: Tokenizer | None = None) -> MaskedBatches:
    """Read a text, tokenise it, and split it into training and held-out tokens.

    Raises:
        DataError: there is no text or too little of it, the tokenizer cannot be loaded, or sequence_length leaves no room for text.
    """
    if sequence_length < 3:
        raise DataError(f"sequence_length {sequence_length} leaves no room for text between cls and sep: set at least 3")
    if settings.documents == "packed":
        raise DataError("data.documents=packed is for models that predict the next token: leave it out where masked tokens are predicted")
    fields = load_stream(settings, sequence_length, sequence_length - 2, seed, tokenizer)
    return MaskedBatches(**fields, mask_fraction=settings.mask_fraction)
