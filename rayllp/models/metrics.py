"""What an evaluation reports beside the loss. A tally is summed over batches, replicas and workers before it is read."""

import math
from typing import Protocol

import torch
from torch import Tensor

from rayllp.data.base import IGNORE


class Metric(Protocol):
    """A metric is read off a vector of sums."""

    size: int

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sums of one batch: float64, shape (size,)."""
        ...

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """The metrics' names and values."""
        ...


class NoMetric:
    """The loss alone."""

    size = 0

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Nothing to count."""
        return torch.zeros(0, dtype=torch.float64)

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """Nothing to say."""
        return {}


class Perplexity(NoMetric):
    """exp(loss)."""

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """Of the loss, as far as a double holds it."""
        return {"perplexity": math.exp(min(loss, 700.0))}


class Accuracy:
    """Share of the counted targets whose class has the largest output; outputs (..., classes), targets (...)."""

    size = 2

    def __init__(self, name: str = "accuracy") -> None:
        self.name = name

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How many are right, of how many."""
        counted = targets != IGNORE
        right = (outputs.argmax(-1) == targets) & counted
        return torch.stack([right.sum(), counted.sum()]).double().cpu()

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """Their share."""
        return {self.name: float(tally[0] / tally[1].clamp(min=1))}


class Confusion:
    """Accuracy and Matthews correlation (for several classes: Gorodkin's R_K) from the confusion matrix."""

    def __init__(self, classes: int) -> None:
        self.classes, self.size = classes, classes * classes

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A matrix of counts: what is true by what was said."""
        counted = targets != IGNORE
        pairs = targets[counted] * self.classes + outputs.argmax(-1)[counted]
        return torch.bincount(pairs, minlength=self.size).double().cpu()

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """Accuracy, and Matthews correlation for any number of classes."""
        matrix = tally.view(self.classes, self.classes)
        total, right, truth, said = matrix.sum(), matrix.trace(), matrix.sum(1), matrix.sum(0)
        spread = (total**2 - said.square().sum()) * (total**2 - truth.square().sum())
        matthews = (right * total - (truth * said).sum()) / spread.sqrt() if spread > 0 else torch.zeros(())
        return {"accuracy": float(right / total.clamp(min=1)), "matthews": float(matthews)}
