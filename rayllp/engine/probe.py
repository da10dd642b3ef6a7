"""What a probing step measures: convergence factors, the bias of the gradient in use beside that gradient's own noise, and, where
asked for, each layer's Lipschitz constant.

Bias: the gradient in use against that of doubled iterations, or against the exact one, over the middle layers' parameters. Noise: the
better gradient is formed in two halves of the batch, whose difference is one standard deviation of their sum over the choice of the
batch. A bias far below the noise moves the weights less than another batch would.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayllp.control import Accuracy, ProbePlan
from rayllp.engine.batch import StepBatch
from rayllp.engine.gradients import Gradients
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.lipschitz import estimate_layers
from rayllp.engine.step_gradients import StepGradients

SUMS = 5
"""Of a block: error squared, better gradient squared, its product with the one in use, that one squared, the halves' gap squared."""


@dataclass(frozen=True)
class Bias:
    """How far the gradient in use is off, over all middle layers and by worker.

    Attributes:
        relative: norm of the error over the better gradient's.
        cosine: between the two.
        noise: one standard deviation over the better gradient's norm; None where the batch has no halves.
        by_block: relative bias and cosine of each worker's block.
    """

    relative: float
    cosine: float
    noise: float | None
    by_block: tuple[tuple[float, float], ...]


@dataclass
class Probing:
    """A probe on one worker: forms the gradient of a step as `Gradients` does, and measures on the way.

    Attributes:
        gradients: what forms them.
        plan: what is measured.
        replicas: how many there are.
        lipschitz: constants of this worker's layers, by index in the whole network; None where the plan does not ask for them.
    """

    gradients: Gradients
    plan: ProbePlan
    replicas: int
    sums: Tensor | None = None
    has_halves: bool = False
    lipschitz: dict[int, float] | None = None

    @property
    def group(self) -> LayerGroup:
        """This worker's layers, and the channel to the others."""
        return self.gradients.group

    def form(self, batch: StepBatch) -> StepGradients:
        """The better gradient into `.grad`; its loss, and the solves that yield ρ."""
        block, accuracy = self.group.block, batch.accuracy
        block.watched = {} if self.plan.lipschitz else None
        used = self._used_gradient(batch) if self.plan.bias else None
        doubled = self.plan.candidate.probing()
        probed, better = None, doubled
        if accuracy.serial or self.plan.exact:
            if self.plan.rho:  # doubled iterations are run for ρ alone; the gradient of the step is the exact one
                probed = self.gradients(batch.solved_by(doubled))
                self.gradients.forget()
            better = accuracy if accuracy.serial else _exactly(doubled)
        halves = self._halves(better, len(batch.samples)) if used is not None else ()
        self.has_halves = bool(halves)
        formed, first = self._in_halves(batch.solved_by(better), halves)
        if used is not None:
            self.sums = self._compare(used, first)
        if self.plan.lipschitz:
            self.lipschitz = estimate_layers(block, batch.step, batch.inputs)
            block.watched = None
        if probed is None:
            return formed
        return replace(formed, forward=probed.forward or formed.forward, backward=probed.backward or formed.backward)

    def _used_gradient(self, batch: StepBatch) -> list[Tensor]:
        self.gradients(batch.solved_by(self.plan.candidate))
        used = [gradient.clone() for gradient in self._middle()]
        self.gradients.forget()
        return used

    def _halves(self, accuracy: Accuracy, samples: int) -> tuple[slice, ...]:
        """Two halves of the batch; none where it has none, or where the pipeline was built for the whole of it."""
        built_for_all = accuracy.serial and self.group.config.placement == "blocks"
        if built_for_all or samples % (2 * self.group.config.accumulate):
            return ()
        return slice(0, samples // 2), slice(samples // 2, samples)

    def _in_halves(self, batch: StepBatch, halves: tuple[slice, ...]) -> tuple[StepGradients, list[Tensor]]:
        """Gradients half by half, with the last half's solves; and the first half's gradients, none where there are no halves."""
        if not halves:
            return self.gradients(batch), []
        found: list[StepGradients] = []
        first: list[Tensor] = []
        for half in halves:
            found.append(self.gradients(batch.part(half)))
            first = first or [gradient.clone() for gradient in self._middle()]
        one, other = found
        if one.penalty is not None and other.penalty is not None:
            other.penalty.add(one.penalty)
        return replace(other, loss=torch.stack([one.loss, other.loss]).sum()), first

    def _compare(self, used: list[Tensor], first: list[Tensor]) -> Tensor:
        better = self._middle()
        sums = torch.zeros(SUMS, dtype=torch.float64, device=self.group.device)
        for index, gradient in enumerate(better):
            g, u = gradient.double(), used[index].double()
            parts = [(u - g).square().sum(), g.square().sum(), (u * g).sum(), u.square().sum()]
            parts.append((2 * first[index].double() - g).square().sum() if first else torch.zeros_like(parts[0]))
            sums += torch.stack(parts)
        return sums

    def _middle(self) -> list[Tensor]:
        block = self.group.block
        parameters = (parameter for n in block.middle for parameter in block.layers[n].parameters())
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    # Over workers -----------------------------------------------------------------------------------------------------------------

    def table(self) -> Tensor:
        """This worker's sums in a table of all workers', to be added up with the others'; shape (workers, SUMS), no rows without a bias."""
        table = torch.zeros((self.group.channel.size, SUMS), dtype=torch.float64, device=self.group.device)
        if self.sums is not None:
            table[self.group.channel.rank] = self.sums
        return table if self.plan.bias else table[:0]

    def read(self, table: Tensor) -> Bias | None:
        """The bias, from the table of all workers."""
        if not self.plan.bias:
            return None
        total = table.sum(0)
        relative, cosine = _bias(total)
        noise = float((total[4] / total[1]).sqrt()) / self.replicas**0.5 if self.has_halves and total[1] > 0 else None
        return Bias(relative, cosine, noise, tuple(_bias(row) for row in table))


def _exactly(accuracy: Accuracy) -> Accuracy:
    """An exact step in place of this one, which can be solved half by half."""
    return replace(accuracy, serial=True) if accuracy.window else replace(accuracy, levels_forward=1, levels_backward=1)


def _bias(sums: Tensor) -> tuple[float, float]:
    """Relative bias and cosine. Gradients that are both zero (of frozen layers) are equal; one beside a zero one is infinitely far off."""
    error, better, product, used = sums[:4].tolist()
    if better == 0 or used == 0:
        return (0.0, 1.0) if better == used else (1.0 if better else math.inf, 0.0)
    return math.sqrt(error / better), product / math.sqrt(better * used)
