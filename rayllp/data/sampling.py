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
        name: of the set, where there are several: each has an order of its own.
    """

    seed: int
    sampling: Sampling = "epochs"
    name: str = ""

    def places(self, step: int, size: int) -> np.ndarray:
        """The numbers of a step's samples among all that training takes, which need not be those of a single set."""
        return np.arange(step * size, (step + 1) * size)

    def take(self, step: int, count: int, size: int) -> np.ndarray:
        """Which of `count` samples a step's `size` are."""
        if self.sampling == "replacement":
            return draw(self.seed, f"train{self.name}", step, count, size)
        return self.at(self.places(step, size), count)[0]

    def at(self, places: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples at these places of the order that passes through `count` samples again and again; and their epochs."""
        epochs = places // count
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            found[mine] = permute(places[mine] - epoch * count, count, key(self.seed, "epoch", self.name, int(epoch)))
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


def interleave(places: np.ndarray, weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of an endless row of samples from several sets, evenly mixed by their weights: which set each place takes, and its how-manieth.

    Returns:
        Numbers of the sets; and how many samples of the same set come before.
    """
    sets, within = np.zeros(len(places), np.int64), np.asarray(places, np.int64).copy()
    left, rest = np.ones(len(places), bool), float(sum(weights))
    for number, weight in enumerate(weights[:-1]):
        share = round(LEAST_SHARE * weight / rest)
        before, behind = within * share // LEAST_SHARE, (within + 1) * share // LEAST_SHARE
        mine = left & (behind > before)
        sets[mine] = number
        within = np.where(mine, before, np.where(left, within - before, within))
        left &= ~mine
        rest -= weight
    sets[left] = len(weights) - 1
    return sets, within
