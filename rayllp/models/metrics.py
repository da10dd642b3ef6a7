"""Metrics: what an evaluation reports besides the loss. They are computed from tallies, which add up over batches, replicas and workers."""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rayllp.config.network import Task
from rayllp.data.base import IGNORE


class Metric(Protocol):
    """A metric that is computed from a vector of sums (its tally)."""

    size: int

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sums of one batch, float64 of shape (size,)."""
        ...

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """Return the metrics by name, from the tally of all batches and the mean loss."""
        ...


class NoMetric:
    """No metric: the loss alone."""

    size = 0

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return an empty tally."""
        return torch.zeros(0, dtype=torch.float64)

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """Return no metrics."""
        return {}


class Perplexity(NoMetric):
    """Perplexity, exp(loss)."""

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """Return exp(loss), with the loss capped at 700 so that the result is a finite double."""
        return {"perplexity": math.exp(min(loss, 700.0))}


class Accuracy:
    """Share of targets whose class has the largest output; outputs (..., classes), targets (...). IGNORE does not count."""

    size = 2

    def __init__(self, name: str = "accuracy") -> None:
        self.name = name

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the numbers of correct and of all targets."""
        counted = targets != IGNORE
        right = (outputs.argmax(-1) == targets) & counted
        return torch.stack([right.sum(), counted.sum()]).double().cpu()

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """Return the share of correct targets."""
        return {self.name: float(tally[0] / tally[1].clamp(min=1))}


class Confusion:
    """Accuracy, F1 and Matthews correlation (R_K for more than two classes), as scikit-learn defines them.

    They are computed from the confusion matrix. F1 is that of the second class if there are two (ordered by name), else the mean over
    classes.
    """

    def __init__(self, classes: int) -> None:
        self.classes, self.size = classes, classes * classes

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the flattened confusion matrix: rows are true classes, columns predicted ones."""
        counted = targets != IGNORE
        pairs = targets[counted] * self.classes + outputs.argmax(-1)[counted]
        return torch.bincount(pairs, minlength=self.size).double().cpu()

    def read(self, tally: Tensor, loss: float) -> dict[str, float]:
        """Return the three metrics; all are 0 if nothing was counted."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        cells = np.flatnonzero(tally.numpy())
        if not len(cells):
            return dict.fromkeys(("accuracy", "f1", "matthews"), 0.0)
        truth, predicted, weights = cells // self.classes, cells % self.classes, tally.numpy()[cells]
        labels = [1] if self.classes == 2 else None
        return {
            "accuracy": float(accuracy_score(truth, predicted, sample_weight=weights)),
            "f1": float(f1_score(truth, predicted, labels=labels, average="macro", sample_weight=weights, zero_division=0)),
            "matthews": float(matthews_corrcoef(truth, predicted, sample_weight=weights)) if len({*truth, *predicted}) > 1 else 0.0,
        }


def metric_of(task: Task, classes: int) -> Metric:
    """Return the metric of a task, with this number of classes: what an evaluation reports besides the loss."""
    match task:
        case "masked":
            return Accuracy("masked_accuracy")
        case "words":
            return Accuracy("word_accuracy")
        case "sentences":
            return Confusion(classes)
        case "images":
            return Accuracy()
        case _:
            return Perplexity()
