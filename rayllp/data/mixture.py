"""Several data sets in one, mixed by their weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rayllp.config import TrainConfig
from rayllp.data.base import Facts, Inputs, passes
from rayllp.data.cache import Entry
from rayllp.data.sampling import Order, in_order, interleave
from rayllp.data.tokenizer import Tokenizer
from rayllp.errors import DataError
from rayllp.state import combine


@dataclass(frozen=True)
class Mixture:
    """Samples of several sets: in training by their weights, evenly mixed; held-out ones so that every beginning has its share of each set.

    Each set has epochs of its own: a small one with a large weight begins anew more often.

    Attributes:
        sets: they have one tokenizer, and samples of one shape.
        weights: how often each one's samples are taken.
    """

    sets: tuple[Any, ...]
    weights: tuple[float, ...]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "held_out"}

    @property
    def facts(self) -> Facts:
        """The first one's, as all have."""
        found: Facts = self.sets[0].facts
        return found

    @property
    def tokenizer(self) -> Tokenizer:
        """Of all sets."""
        found: Tokenizer = self.sets[0].tokenizer
        return found

    @property
    def skipped(self) -> dict[str, int]:
        """How much was left out, by cause."""
        counts: dict[str, int] = {}
        for each in self.sets:
            for kind, number in each.skipped.items():
                counts[kind] = counts.get(kind, 0) + number
        return counts

    @property
    def is_stream(self) -> bool:
        """Whether a held-out part may be too long to be passed through."""
        return any(getattr(each, "is_stream", False) for each in self.sets)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Files that a host needs."""
        return tuple(entry for each in self.sets for entry in each.entries)

    def with_entries(self, change: Callable[[Entry], Entry]) -> Self:
        """The same with other handles on its files."""
        return replace(self, sets=tuple(each.with_entries(change) for each in self.sets))

    @cached_property
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each held-out sample its set, and its number there."""
        counts = [each.batches("validation", 1) for each in self.sets]
        sets = np.repeat(np.arange(len(counts)), counts)
        numbers = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((numbers + 0.5) / np.array(counts)[sets], kind="stable")
        return sets[order], numbers[order]

    def batch(self, split: str, step: int, size: int) -> tuple[Inputs, Tensor]:
        """As the sets have them, one below the other."""
        if split == "train":
            sets = interleave(np.arange(step * size, (step + 1) * size), self.weights)
            found = {number: self.sets[number].batch(split, step, size) for number in np.unique(sets)}
            rows = [(found[number], slice(place, place + 1)) for place, number in enumerate(sets)]
        else:
            sets, numbers = self.held_out
            rows = []
            for place in in_order(step, len(sets), size):
                # Behind its last sample a set gives places that do not count.
                chosen, number = (sets[place], numbers[place]) if place >= 0 else (0, self.sets[0].batches(split, 1))
                rows.append((self.sets[chosen].batch(split, int(number), 1), slice(0, 1)))
        inputs = combine(lambda *parts: torch.cat(parts), *(combine(lambda part, at=at: part[at], batch[0]) for batch, at in rows))
        return inputs, torch.cat([targets[at] for (_, targets), at in rows])

    def batches(self, split: str, size: int) -> int:
        """Batches in one pass through all sets."""
        return passes(sum(each.batches(split, 1) for each in self.sets), size)


def load_mixture(config: TrainConfig, load: Callable[[TrainConfig, Tokenizer | None], Any], tokenizer: Tokenizer | None) -> Mixture:
    """Each of `data.sets` as it would be loaded alone, with one tokenizer.

    Args:
        config: its data settings hold for all sets where these do not say otherwise.
        load: loads one.
        tokenizer: of a run that goes on; None: the one that the settings name, made from the first set where it is made from a text.

    Raises:
        DataError: one cannot be loaded, or is of a kind that cannot be mixed.
    """
    sets: list[Any] = []
    weights = tuple(each.weight for each in config.data.sets)
    for number, each in enumerate(config.data.sets):
        data = config.data.model_copy(update={"sets": (), **each.model_dump(exclude_unset=True, exclude={"weight"})})
        try:
            found = load(config.model_copy(update={"data": data}), tokenizer)
        except DataError as error:
            raise DataError(f"data.sets, number {number + 1}: {error}") from None
        if not hasattr(found, "with_entries"):
            raise DataError(f"data.sets mixes texts or answers, and model.family={config.model.family} reads neither: give one set")
        tokenizer = tokenizer or found.tokenizer
        sets.append(replace(found, order=Order(config.seed, data.sampling, number, weights)))
    return Mixture(tuple(sets), weights)
