"""A replica's share of a batch, with the accuracy at which a training step solves it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayllp.config import EVALUATED, TrainConfig
from rayllp.control import Accuracy
from rayllp.data.base import IGNORE, Batches, Inputs
from rayllp.models.base import Architecture
from rayllp.state import combine

EXACT = Accuracy(serial=True, levels_forward=1, levels_backward=1, iterations_forward=1, iterations_backward=1)
"""The accuracy of the exact network, for batches that are evaluated or measured."""


@dataclass(frozen=True)
class StepBatch:
    """The samples from which one replica forms gradients in one training step, or which it evaluates.

    Attributes:
        step: number of the training step, or of the batch in an evaluation.
        accuracy: how accurately forward and adjoint are solved.
        inputs, targets: those of this replica's samples; dimension 0 is the samples.
        samples: positions of these samples in the global batch.
        scale: factor on the summed loss: one over the global number of loss terms.
    """

    step: int
    accuracy: Accuracy
    inputs: Inputs
    targets: Tensor
    samples: tuple[int, ...]
    scale: float

    def part(self, rows: slice) -> "StepBatch":
        """Return some of the samples, with the same scale, so that the parts' losses and gradients add up to those of the whole."""
        inputs = combine(lambda whole: whole[rows], self.inputs)
        return replace(self, inputs=inputs, targets=self.targets[rows], samples=self.samples[rows])

    def parts(self, count: int) -> Iterator["StepBatch"]:
        """Yield the samples in `count` parts of equal size.

        Raises:
            ValueError: there are no such parts. Some samples would otherwise be left out, and nobody would notice.
        """
        size, over = divmod(len(self.samples), count)
        if over or not size:
            raise ValueError(f"{len(self.samples)} samples in {count} parts: they must be of equal size")
        yield from (self.part(slice(start, start + size)) for start in range(0, len(self.samples), size))

    def solved_by(self, accuracy: Accuracy) -> "StepBatch":
        """Return the same samples, to be solved with another accuracy."""
        return replace(self, accuracy=accuracy)


def count_microbatches(batch: int, workers: int, wanted: int | None, *, fewest: bool = False) -> int:
    """Return the number of microbatches for `batch` sequences, a divisor of that: the largest up to `wanted`, or else up to 4 per worker.

    Whole batches divide by `wanted`; the half of one that a probe takes may not. One worker has nothing to overlap, and always takes one.

    Args:
        fewest: take the smallest divisor that keeps all workers busy instead, if there is one.
    """
    if workers == 1:
        return 1
    divisors = [m for m in range(1, (wanted or 4 * workers) + 1) if batch % m == 0]
    return next((m for m in divisors if fewest and not wanted and m >= workers), divisors[-1])


class ReplicaBatches:
    """One replica's share of each global batch.

    Args:
        batches: the global batches.
        architecture: counts loss terms.
        config: the settings of the run.
        replica: number of the replica. The samples of a global batch go to the replicas in order.
        device: where to put the tensors.
    """

    def __init__(self, batches: Batches, architecture: Architecture, config: TrainConfig, replica: int, device: torch.device) -> None:
        self.batches, self.architecture, self.config = batches, architecture, config
        self.replica, self.device = replica, device

    def step_batch(self, step: int, accuracy: Accuracy = EXACT, *, split: str = "train") -> StepBatch:
        """Return this replica's batch of a training step, to be solved with this accuracy; or the batch of another split."""
        return self._share(split, step, self.config.batch_size, accuracy)

    def _share(self, split: str, step: int, size: int, accuracy: Accuracy = EXACT, *, last: int | None = None) -> StepBatch:
        """Return this replica's share of a global batch of `size` samples, of which those from position `last` on do not count."""
        inputs, targets = self.batches.batch(split, step, size)
        if last is not None and last < size:
            targets[last:] = IGNORE
        terms = self.architecture.count(targets)
        each = size // self.config.mesh.data
        mine = slice(self.replica * each, (self.replica + 1) * each)
        inputs = combine(lambda part: part[mine].to(self.device), inputs)
        samples = tuple(range(mine.start, mine.stop))
        return StepBatch(step, accuracy, inputs, targets[mine].to(self.device), samples, 1 / max(1, terms))

    def held_out_size(self, wanted: int) -> int:
        """Return the number of batches that `held_out` yields."""
        return self._pass(wanted)[0]

    def held_out(self, wanted: int) -> Iterator[StepBatch]:
        """Yield this replica's batches of an evaluation.

        Which samples these are does not depend on the batch size.

        Args:
            wanted: the amount of data, in units of EVALUATED samples, at most one pass; 0: one pass. For endless batches of the user's
                own, the number of batches of batch_size samples.
        """
        count, size, samples = self._pass(wanted)
        for index in range(count):
            yield self._share("validation", index, size, last=samples - index * size)

    def _pass(self, wanted: int) -> tuple[int, int, int]:
        """Return an evaluation's number of batches, samples of each (over all replicas), and samples that count in total."""
        size, replicas = self.config.batch_size, self.config.mesh.data
        available = self.batches.count("validation")
        if available is None:
            return wanted or 1, size, (wanted or 1) * size
        samples = wanted * EVALUATED if wanted else available
        size = min(size, -(-samples // replicas) * replicas)
        return -(-min(samples, available) // size), size, samples
