"""Measurements of a probing step: convergence factors, the bias and the noise of the gradient, and each layer's Lipschitz constant.

The bias compares the gradient in use with a better one (of doubled iterations, or exact), over the middle layers' parameters. For the
noise, the better gradient is formed in two halves of the batch; their difference is one standard deviation of their sum over the choice of
the batch. A bias far below the noise changes the weights less than another batch would.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rayllp.control import Accuracy, ProbePlan
from rayllp.engine.batch import StepBatch
from rayllp.engine.gradients import Gradients
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.lipschitz import estimate_layers
from rayllp.engine.step_gradients import StepGradients
from rayllp.engine.window_gradients import WindowGradients

SAMPLES_PER_COUPLING = 4
"""Couplings are measured on one in this many samples of the batch: only their order of magnitude matters."""


class Sums(NamedTuple):
    """What two gradients are compared by: sums over the parameters of some middle layers, and two losses.

    Attributes:
        error: squares of the difference between the gradient in use and the better one.
        better, used: squares of each.
        product: their products.
        halves: squares of the difference between the better gradients of the two halves of the batch.
        loss, better_loss: losses of the two solves, on the worker that has the head; 0 on others.
    """

    error: float
    better: float
    used: float
    product: float
    halves: float
    loss: float
    better_loss: float

    @property
    def bias(self) -> float:
        """Norm of the error over the norm of the better gradient. Two zero gradients (of frozen layers) count as equal."""
        if self.better == 0 or self.used == 0:
            return 0.0 if self.better == self.used else 1.0 if self.better else math.inf
        return math.sqrt(self.error / self.better)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two gradients."""
        if self.better == 0 or self.used == 0:
            return 1.0 if self.better == self.used else 0.0
        return self.product / math.sqrt(self.better * self.used)

    @property
    def loss_gap(self) -> float:
        """Relative difference between the loss of the solve in use and the better one's."""
        if self.better_loss == 0:
            return 0.0 if self.loss == 0 else math.inf
        return (self.loss - self.better_loss) / abs(self.better_loss)


@dataclass(frozen=True)
class Comparison:
    """How far the solve in use is off from a better one, over all middle layers and for each worker.

    Attributes:
        bias: norm of the gradient's error over the norm of the better gradient.
        cosine: cosine of the angle between the two gradients.
        noise: one standard deviation of the gradient over the choice of the batch, over the better gradient's norm; None if the batch was
            not halved.
        loss_gap: relative difference between the losses of the solve in use and of the better one, on the same batch.
        by_block: relative bias and cosine of each worker's block.
    """

    bias: float
    cosine: float
    noise: float | None
    loss_gap: float
    by_block: tuple[tuple[float, float], ...]


@dataclass
class Probing:
    """A probe on one worker. It forms a step's gradients as `Gradients` does, and measures on the way.

    Attributes:
        gradients: forms the gradients.
        plan: what to measure.
        replicas: number of replicas.
        sums: this worker's `Sums`, in their order; None if the bias is not measured. Shape (sums,), float64.
        has_halves: True if the better gradient was formed in halves.
        lipschitz: constants of this worker's layers, by index in the whole network; None if the plan does not ask for them.
        couplings: squared couplings of this worker's layers (`CouplingTable.squared`); None if the plan does not ask for them.
    """

    gradients: Gradients
    plan: ProbePlan
    replicas: int
    sums: Tensor | None = None
    has_halves: bool = False
    lipschitz: dict[int, float] | None = None
    couplings: Tensor | None = None

    @property
    def group(self) -> LayerGroup:
        """This worker's layers, and the channel to the other workers."""
        return self.gradients.group

    def form(self, batch: StepBatch) -> StepGradients:
        """Form the better gradient in `.grad`. Returns its loss, and the solves that give ρ."""
        if not self.plan.lipschitz:
            return self._form(batch)
        with self.group.block.recorded_inputs() as states:
            formed = self._form(batch)
        self.lipschitz = estimate_layers(self.group.block, batch, states)
        return formed

    def _form(self, batch: StepBatch) -> StepGradients:
        accuracy = batch.accuracy
        if self.plan.couplings:
            self.couplings = self._measure_couplings(batch)
        used = self._used_solve(batch) if self.plan.bias else None
        doubled = self.plan.candidate.doubled()
        probed, better = None, doubled
        if accuracy.serial or self.plan.exact:
            if self.plan.rho:  # doubled iterations are run for ρ only, and the step's gradient is the exact one
                probed = self.gradients(batch.solved_by(doubled))
                self.gradients.forget()
            better = accuracy if accuracy.serial else _exactly(doubled)
        halves = self._halves(better, len(batch.samples)) if used is not None else ()
        self.has_halves = bool(halves)
        formed, first = self._in_halves(batch.solved_by(better), halves)
        if used is not None:
            self.sums = self._compare(*used, first, formed.loss)
        if probed is None:
            return formed
        return replace(formed, forward=probed.forward or formed.forward, adjoint=probed.adjoint or formed.adjoint)

    def _measure_couplings(self, batch: StepBatch) -> Tensor:
        """Return the squared couplings of this worker's layers, measured on a part of the batch."""
        assert isinstance(self.gradients.parallel, WindowGradients)
        found = self.gradients.parallel.couplings(batch.part(slice(0, -(-len(batch.samples) // SAMPLES_PER_COUPLING))))
        self.gradients.forget()
        return found

    def _used_solve(self, batch: StepBatch) -> tuple[list[Tensor], Tensor]:
        """Return the middle layers' gradients as the candidate accuracy forms them, and the loss."""
        loss = self.gradients(batch.solved_by(self.plan.candidate)).loss
        used = [gradient.clone() for gradient in self._middle()]
        self.gradients.forget()
        return used, loss

    def _halves(self, accuracy: Accuracy, samples: int) -> tuple[slice, ...]:
        """Return the two halves of the batch. Empty if it cannot be halved, or if the pipeline was built for the whole batch."""
        built_for_all = accuracy.serial and self.group.config.placement == "blocks"
        if built_for_all or samples % (2 * self.group.config.accumulate):
            return ()
        return slice(0, samples // 2), slice(samples // 2, samples)

    def _in_halves(self, batch: StepBatch, halves: tuple[slice, ...]) -> tuple[StepGradients, list[Tensor]]:
        """Form gradients half by half, or of the whole batch if there are no halves.

        Returns: the outcome with the last half's solves, and the first half's gradients (empty if there are no halves).
        """
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

    def _compare(self, used: list[Tensor], loss: Tensor, first: list[Tensor], better_loss: Tensor) -> Tensor:
        """Return this worker's `Sums`; the better gradient is in `.grad`.

        Args:
            used, loss: gradients and loss of the solve in use.
            first: the better gradients of the first half of the batch; empty if there are no halves.
            better_loss: loss of the better solve.
        """
        better = self._middle()
        sums = torch.zeros(len(Sums._fields), dtype=torch.float64, device=self.group.device)
        for index, gradient in enumerate(better):
            g, u = gradient.double(), used[index].double()
            parts = [(u - g).square().sum(), g.square().sum(), u.square().sum(), (u * g).sum()]
            parts.append((2 * first[index].double() - g).square().sum() if first else torch.zeros_like(parts[0]))
            sums[:-2] += torch.stack(parts)
        sums[-2:] = torch.stack([loss, better_loss])
        return sums

    def _middle(self) -> list[Tensor]:
        """Return the gradients of the middle layers' parameters, zeros where there is none."""
        block = self.group.block
        parameters = (parameter for n in block.middle for parameter in block.layers[n].parameters())
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    # Sums over workers ------------------------------------------------------------------------------------------------------------

    def table(self) -> Tensor:
        """Return this worker's sums in its row of a table, to be added to the other workers' tables; shape (workers, sums).

        The table has no rows if the bias is not measured.
        """
        table = torch.zeros((self.group.channel.size, len(Sums._fields)), dtype=torch.float64, device=self.group.device)
        if self.sums is not None:
            table[self.group.channel.rank] = self.sums
        return table if self.plan.bias else table[:0]

    def read(self, table: Tensor) -> Comparison | None:
        """Return how the two solves compare, from the sum of all workers' tables; None if the bias is not measured."""
        if not self.plan.bias:
            return None
        total, blocks = Sums(*table.sum(0).tolist()), [Sums(*row) for row in table.tolist()]
        noise = math.sqrt(total.halves / total.better / self.replicas) if self.has_halves and total.better > 0 else None
        by_block = tuple((block.bias, block.cosine) for block in blocks)
        return Comparison(bias=total.bias, cosine=total.cosine, noise=noise, loss_gap=total.loss_gap, by_block=by_block)


def _exactly(accuracy: Accuracy) -> Accuracy:
    """Return the accuracy of an exact step whose batch can be halved.

    On blocks that is MGRIT with one level, since the pipeline is built for whole batches.
    """
    return replace(accuracy, serial=True) if accuracy.windows else replace(accuracy, levels_forward=1, levels_backward=1)
