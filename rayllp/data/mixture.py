"""Several data sets mixed into one by weights (`data.sets`)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rayllp.config import TrainConfig
from rayllp.data.base import Dataset, DatasetFacts, Inputs
from rayllp.data.cache import CacheEntry
from rayllp.data.sampling import SampleOrder, in_order, interleave
from rayllp.data.tokenizer_kinds import Tokenizer
from rayllp.errors import DataError
from rayllp.state import combine


@dataclass(frozen=True, kw_only=True)
class Mixture(Dataset):
    """Samples of several data sets: for training mixed by their weights, held-out ones interleaved evenly.

    Each set has epochs of its own, so a small one with a large weight starts over more often. Held-out samples are ordered so that any
    prefix of them contains each set in proportion to its size.

    Attributes:
        sets: the data sets; they share one tokenizer and the shape of a sample.
        order: its weights say how often samples of each set are taken.
    """

    sets: tuple[Dataset, ...]
    is_stream: bool

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "held_out"}

    @property
    def facts(self) -> DatasetFacts:
        """What the model has to know about the data, which is the same for all sets."""
        return self.sets[0].facts

    @property
    def entries(self) -> tuple[CacheEntry, ...]:
        """Cache entries whose files a host needs."""
        return tuple(entry for each in self.sets for entry in each.entries)

    def with_entries(self, change: Callable[[CacheEntry], CacheEntry]) -> Self:
        """Return a copy in which each cache entry is replaced by `change(entry)`."""
        return replace(self, sets=tuple(each.with_entries(change) for each in self.sets))

    def count(self, split: str) -> int:
        """Return the number of samples in a split of all sets."""
        return sum(each.count(split) for each in self.sets)

    def content(self, split: str) -> list[Any]:
        """Return what each set holds of a split."""
        return [each.content(split) for each in self.sets]

    @cached_property
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """For each held-out sample, in the order of evaluation, the number of its set and its index in that set."""
        counts = [each.count("validation") for each in self.sets]
        sets = np.repeat(np.arange(len(counts)), counts)
        numbers = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((numbers + 0.5) / np.array(counts)[sets], kind="stable")
        return sets[order], numbers[order]

    def batch(self, split: str, step: int, size: int) -> tuple[Inputs, Tensor]:
        """Return inputs and targets of a step's batch, with samples of all sets stacked along dimension 0."""
        if split == "train":
            sets = interleave(np.arange(step * size, (step + 1) * size), self.order.weights)
            batches = {number: self.sets[number].batch(split, step, size) for number in np.unique(sets)}
            rows = [(batches[number], slice(place, place + 1)) for place, number in enumerate(sets)]
        else:
            sets, numbers = self.held_out
            rows = []
            for place in in_order(step, len(sets), size):
                # A set's index beyond its last sample gives a row whose targets are all IGNORE.
                chosen, number = (sets[place], numbers[place]) if place >= 0 else (0, self.sets[0].count(split))
                rows.append((self.sets[chosen].batch(split, int(number), 1), slice(0, 1)))
        inputs = combine(lambda *parts: torch.cat(parts), *(combine(lambda part, at=at: part[at], batch[0]) for batch, at in rows))
        return inputs, torch.cat([targets[at] for (_, targets), at in rows])


def load_mixture(config: TrainConfig, load: Callable[[TrainConfig, Tokenizer | None], Dataset], tokenizer: Tokenizer | None) -> Mixture:
    """Load each of `data.sets` as if it were alone, with one tokenizer for all.

    Args:
        config: the run's settings; its data settings apply to every set that does not override them.
        load: loads one data set.
        tokenizer: the tokenizer of a run that is resumed; None: the one that the settings name; if that one is made from a text, it is made
            from the first set's.

    Raises:
        DataError: a set cannot be loaded, or is of a kind that cannot be mixed.
    """
    sets: list[Dataset] = []
    order = SampleOrder(config.seed, config.data.sampling, weights=tuple(each.weight for each in config.data.sets))
    for number, each in enumerate(config.data.sets):
        data = config.data.model_copy(update={"sets": (), **each.model_dump(exclude_unset=True, exclude={"weight"})})
        try:
            data_set = load(config.model_copy(update={"data": data}), tokenizer)
        except DataError as error:
            raise DataError(f"data.sets, number {number + 1}: {error}") from None
        if not data_set.entries:
            raise DataError(f"data.sets mixes texts or answers, but the task {config.model.task!r} reads neither: give one set")
        tokenizer = tokenizer or data_set.tokenizer
        sets.append(replace(data_set, order=replace(order, number=number)))
    skipped: dict[str, int] = sum((Counter(each.skipped) for each in sets), Counter())
    return Mixture(
        sets=tuple(sets), is_stream=any(each.is_stream for each in sets), order=order, tokenizer=tokenizer, skipped=dict(skipped)
    )
