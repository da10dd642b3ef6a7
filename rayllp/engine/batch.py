"""A worker's share of a training step's batch, and how the step is to be solved."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.data.base import Batches, Inputs
from rayllp.models.base import Architecture
from rayllp.state import combine


@dataclass(frozen=True)
class StepBatch:
    """What gradients are formed of in one training step, on one replica.

    Attributes:
        step: the training step.
        accuracy: how its forward and adjoint are solved.
        inputs, targets: of this replica's samples; dimension 0 is the samples.
        samples: their places in the global batch.
        scale: factor of the summed loss: one over the global number of loss terms.
    """

    step: int
    accuracy: Accuracy
    inputs: Inputs
    targets: Tensor
    samples: tuple[int, ...]
    scale: float

    def part(self, rows: slice) -> "StepBatch":
        """Some of the samples, with the same scale: the parts' losses and gradients add up to the whole's."""
        inputs = combine(lambda whole: whole[rows], self.inputs)
        return replace(self, inputs=inputs, targets=self.targets[rows], samples=self.samples[rows])

    def solved_by(self, accuracy: Accuracy) -> "StepBatch":
        """The same samples, solved another way."""
        return replace(self, accuracy=accuracy)


class ReplicaBatches:
    """The share of one replica in each global batch.

    Args:
        replica: its number; the samples of a global batch go to the replicas in order.
    """

    def __init__(self, batches: Batches, architecture: Architecture, config: TrainConfig, replica: int, device: torch.device) -> None:
        self.batches, self.architecture, self.config = batches, architecture, config
        self.replica, self.device = replica, device

    def share(self, split: str, step: int) -> tuple[Inputs, Tensor, tuple[int, ...], int]:
        """This replica's inputs and targets, their places in the global batch, and the global number of loss terms."""
        inputs, targets = self.batches.batch(split, step, self.config.batch_size)
        terms = self.architecture.count(targets)
        size = self.config.replica_batch
        mine = slice(self.replica * size, (self.replica + 1) * size)
        inputs = combine(lambda part: part[mine].to(self.device), inputs)
        return inputs, targets[mine].to(self.device), tuple(range(mine.start, mine.stop)), terms

    def for_step(self, step: int, accuracy: Accuracy) -> StepBatch:
        """The batch of a training step."""
        inputs, targets, samples, terms = self.share("train", step)
        return StepBatch(step, accuracy, inputs, targets, samples, 1 / max(1, terms))

    def count(self, split: str, wanted: int) -> int:
        """Batches to evaluate on: as many as wanted, at most one pass where the set is finite. 0: one pass, or one batch."""
        finite = getattr(self.batches, "batches", None)
        if finite is None:
            return wanted or 1
        whole = int(finite(split, self.config.batch_size))
        return min(wanted, whole) if wanted else whole
