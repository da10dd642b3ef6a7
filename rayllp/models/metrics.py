"""What an evaluation reports beside the loss. A tally is summed over batches, replicas and workers before it is read."""

import math
from typing import Protocol

import numpy as np
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
    """Accuracy, F1 and Matthews correlation (for several classes: Gorodkin's R_K), as scikit-learn has them, from the confusion matrix.

    F1 is that of the second of two classes, by their names, and the mean over classes of several.
    """

    def __init__(self, classes: int) -> None:
        self.classes, self.size = classes, classes * classes

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A matrix of counts: what is true by what was said."""
        counted = targets != IGNORE
        pairs = targets[counted] * self.classes + outputs.argmax(-1)[counted]
        return torch.bincount(pairs, minlength=self.size).double().cpu()

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """The three; 0 each where nothing was counted."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        cells = np.flatnonzero(tally.numpy())
        if not len(cells):
            return dict.fromkeys(("accuracy", "f1", "matthews"), 0.0)
        truth, said, weights = cells // self.classes, cells % self.classes, tally.numpy()[cells]
        labels = [1] if self.classes == 2 else None
        return {
            "accuracy": float(accuracy_score(truth, said, sample_weight=weights)),
            "f1": float(f1_score(truth, said, labels=labels, average="macro", sample_weight=weights, zero_division=0)),
            "matthews": float(matthews_corrcoef(truth, said, sample_weight=weights)) if len({*truth, *said}) > 1 else 0.0,
        }
