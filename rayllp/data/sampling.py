"""Which samples a step trains on: a pure function of (seed, step), whose memory does not grow with the number of samples."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rayllp.keys import key

Sampling = Literal["epochs", "replacement"]
ROUNDS = 8
"""Rounds of the Feistel network. Four already look random; eight do so for small sets too."""
LEAST_SHARE = 2**20
"""Resolution of the weights of mixed sets: shares are rounded to 1/LEAST_SHARE."""


@dataclass(frozen=True)
class SampleOrder:
    """The order in which training takes its samples.

    Attributes:
        seed: determines the order.
        sampling: epochs: every sample once before any comes again, each epoch in an order of its own; replacement: each draw is
            independent.
        number: which of several mixed sets this is (`data.sets`); each has an order of its own.
        weights: sampling weights of all mixed sets; empty where there is only one set.
    """

    seed: int
    sampling: Sampling = "epochs"
    number: int = 0
    weights: tuple[float, ...] = ()

    def positions(self, step: int, size: int) -> np.ndarray:
        """Return, for each sample of a step, how many samples training has taken from this set before it."""
        numbers = np.arange(step * size, (step + 1) * size)
        return count_before(numbers, self.weights, self.number) if self.weights else numbers

    def take(self, step: int, count: int, size: int) -> np.ndarray:
        """Return the `size` indices below `count` of the samples that a step takes."""
        if self.sampling == "replacement":
            return draw(self.seed, f"train{self.number or ''}", step, count, size)
        return self.samples_at(self.positions(step, size), count)[0]

    def samples_at(self, positions: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples at these positions of an endless sequence of shuffled epochs over `count` samples, and the epoch of each."""
        epochs = positions // count
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            samples[in_epoch] = permute(positions[in_epoch] - epoch * count, count, key(self.seed, "epoch", self.number, int(epoch)))
        return samples, epochs


def draw(seed: int, split: str, step: int, count: int, size: int) -> np.ndarray:
    """Draw `size` of `count` samples with replacement."""
    return np.random.Generator(np.random.Philox(key=key(seed, split, step))).integers(0, count, size=size)


def in_order(step: int, count: int, size: int) -> np.ndarray:
    """Return the indices of batch `step` of one pass, in order, through `count` samples; -1 in places beyond the end."""
    indices = np.arange(step * size, (step + 1) * size)
    return np.where(indices < count, indices, -1)


def permute(numbers: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Apply a random permutation of the numbers below `count`, chosen by the seed, to some of them.

    It is a Feistel network, so no table is kept, however large `count` is. Its two halves are the digits of a number in base side ≥ √count;
    a result of `count` or more is sent through the network again until it is below.
    """
    side = max(2, int(np.ceil(np.sqrt(count))))
    keys = np.random.Generator(np.random.Philox(key=seed)).integers(0, 2**64, size=ROUNDS, dtype=np.uint64)
    permuted = np.asarray(numbers, np.int64).copy()
    beyond = np.ones(len(permuted), bool)
    while beyond.any():
        permuted[beyond] = _feistel(permuted[beyond].astype(np.uint64), np.uint64(side), keys).astype(np.int64)
        beyond = permuted >= count
    return permuted


def _feistel(numbers: np.ndarray, side: np.uint64, keys: np.ndarray) -> np.ndarray:
    """Permute the numbers below side² by a Feistel network with these round keys."""
    high: Any = numbers // side
    low: Any = numbers % side
    for each in keys:
        high, low = low, (high + _mixed(low ^ each) % side) % side
    return np.asarray(high * side + low)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Hash values so that every output bit depends on every input bit (the finalizer of splitmix64)."""
    with np.errstate(over="ignore"):
        once = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        twice = (once ^ (once >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return twice ^ (twice >> np.uint64(31))


def interleave(positions: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    """Return which of several sets each position of an endless sequence of samples is taken from, mixed evenly by their weights."""
    counts = [
        count_before(np.asarray(positions) + 1, weights, number) - count_before(positions, weights, number)
        for number in range(len(weights))
    ]
    return np.argmax(counts, axis=0)


def count_before(positions: np.ndarray, weights: tuple[float, ...], number: int) -> np.ndarray:
    """Return how many samples of one set come before each of these positions in the sequence that `interleave` describes."""
    left, rest = np.asarray(positions, np.int64), float(sum(weights))
    for weight in weights[:number]:  # the sets before this one take their share of the positions first
        left = left - left * round(LEAST_SHARE * weight / rest) // LEAST_SHARE
        rest -= weight
    return left if number == len(weights) - 1 else left * round(LEAST_SHARE * weights[number] / rest) // LEAST_SHARE
