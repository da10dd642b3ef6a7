"""Which samples a step takes: a pure function of (seed, step), in a fixed amount of memory however many samples there are."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rayllp.keys import key

Sampling = Literal["epochs", "replacement"]
ROUNDS = 8
"""Of the Feistel network; four already look random, eight do for small sets too."""
LEAST_SHARE = 2**20
"""Weights of several sets are told apart to one part in so many."""


@dataclass(frozen=True)
class Order:
    """In which order training takes its samples.

    Attributes:
        seed: keys the order.
        sampling: epochs: every sample once before any comes again, each epoch in an order of its own; replacement: each one drawn from all.
        number, weights: of the set among several that are mixed, and of all of them; each has an order of its own.
    """

    seed: int
    sampling: Sampling = "epochs"
    number: int = 0
    weights: tuple[float, ...] = ()

    def places(self, step: int, size: int) -> np.ndarray:
        """Of each of a step's samples, how many of this set have been taken before it."""
        numbers = np.arange(step * size, (step + 1) * size)
        return taken(numbers, self.weights, self.number) if self.weights else numbers

    def take(self, step: int, count: int, size: int) -> np.ndarray:
        """Which of `count` samples a step's `size` are."""
        if self.sampling == "replacement":
            return draw(self.seed, f"train{self.number or ''}", step, count, size)
        return self.at(self.places(step, size), count)[0]

    def at(self, places: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples at these places of the order that passes through `count` samples again and again; and their epochs."""
        epochs = places // count
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            found[mine] = permute(places[mine] - epoch * count, count, key(self.seed, "epoch", self.number, int(epoch)))
        return found, epochs


def draw(seed: int, split: str, step: int, count: int, size: int) -> np.ndarray:
    """Which `size` of `count` training samples a step takes, with replacement."""
    return np.random.Generator(np.random.Philox(key=key(seed, split, step))).integers(0, count, size=size)


def in_order(step: int, count: int, size: int) -> np.ndarray:
    """Which samples batch `step` of a pass through `count` takes; -1 in places beyond the end."""
    indices = np.arange(step * size, (step + 1) * size)
    return np.where(indices < count, indices, -1)


def select(order: Order, split: str, step: int, count: int, size: int) -> np.ndarray:
    """Which samples a batch takes: by the order in training, one after the other in validation."""
    return order.take(step, count, size) if split == "train" else in_order(step, count, size)


def permute(numbers: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Where a permutation of the numbers below `count`, chosen by the seed, takes some of them. Nothing is kept: it is a Feistel network.

    Its halves are digits of base side ≥ √count, and numbers that it takes to count or beyond are sent through it again.
    """
    side = max(2, int(np.ceil(np.sqrt(count))))
    keys = np.random.Generator(np.random.Philox(key=seed)).integers(0, 2**64, size=ROUNDS, dtype=np.uint64)
    found = np.asarray(numbers, np.int64).copy()
    left = np.ones(len(found), bool)
    while left.any():
        found[left] = _feistel(found[left].astype(np.uint64), np.uint64(side), keys).astype(np.int64)
        left = found >= count
    return found


def _feistel(numbers: np.ndarray, side: np.uint64, keys: np.ndarray) -> np.ndarray:
    high: Any = numbers // side
    low: Any = numbers % side
    for each in keys:
        high, low = low, (high + _mixed(low ^ each) % side) % side
    return np.asarray(high * side + low)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Bits that all depend on all bits of the values (the end of splitmix64)."""
    with np.errstate(over="ignore"):
        once = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        twice = (once ^ (once >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return twice ^ (twice >> np.uint64(31))


def interleave(places: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    """Of an endless row of samples from several sets, evenly mixed by their weights: from which set each place has its sample."""
    counts = [taken(np.asarray(places) + 1, weights, number) - taken(places, weights, number) for number in range(len(weights))]
    return np.argmax(counts, axis=0)


def taken(places: np.ndarray, weights: tuple[float, ...], number: int) -> np.ndarray:
    """How many samples of one set come before these places of the row that `interleave` makes."""
    left, rest = np.asarray(places, np.int64), float(sum(weights))
    for weight in weights[:number]:  # what the sets before it leave
        left = left - left * round(LEAST_SHARE * weight / rest) // LEAST_SHARE
        rest -= weight
    return left if number == len(weights) - 1 else left * round(LEAST_SHARE * weights[number] / rest) // LEAST_SHARE
