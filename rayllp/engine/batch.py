"""A worker's share of a training step's batch, and how the step is to be solved."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayllp.config import EVALUATED, TrainConfig
from rayllp.control import Accuracy
from rayllp.data.base import IGNORE, Batches, Inputs
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
        return self._share(split, step, self.config.batch_size)

    def _share(self, split: str, step: int, size: int, last: int | None = None) -> tuple[Inputs, Tensor, tuple[int, ...], int]:
        """The same of a batch of `size` samples, of which those from place `last` on do not count."""
        inputs, targets = self.batches.batch(split, step, size)
        if last is not None and last < size:
            targets[last:] = IGNORE
        terms = self.architecture.count(targets)
        each = size // self.config.mesh.data
        mine = slice(self.replica * each, (self.replica + 1) * each)
        inputs = combine(lambda part: part[mine].to(self.device), inputs)
        return inputs, targets[mine].to(self.device), tuple(range(mine.start, mine.stop)), terms

    def for_step(self, step: int, accuracy: Accuracy) -> StepBatch:
        """The batch of a training step."""
        inputs, targets, samples, terms = self.share("train", step)
        return StepBatch(step, accuracy, inputs, targets, samples, 1 / max(1, terms))

    def held_out_size(self, wanted: int) -> int:
        """How many batches `held_out` has."""
        return self._pass(wanted)[0]

    def held_out(self, wanted: int) -> Iterator[tuple[Inputs, Tensor]]:
        """This replica's inputs and targets of an evaluation, batch after batch: samples that do not depend on the size of a batch.

        Args:
            wanted: EVALUATED samples each, at most one pass; 0: one pass. Of batches of the user's own that have no end: so many of
                batch_size samples.
        """
        count, size, samples = self._pass(wanted)
        for index in range(count):
            yield self._share("validation", index, size, last=samples - index * size)[:2]

    def _pass(self, wanted: int) -> tuple[int, int, int]:
        """Of an evaluation: its batches, the samples of each, and those of all that count."""
        size, replicas = self.config.batch_size, self.config.mesh.data
        finite = getattr(self.batches, "batches", None)
        if finite is None:
            return wanted or 1, size, (wanted or 1) * size
        samples = wanted * EVALUATED if wanted else int(finite("validation", 1))
        size = min(size, -(-samples // replicas) * replicas)
        return min(int(finite("validation", size)), -(-samples // size)), size, samples
