"""Measurements of a probing step: convergence factors, the bias and the noise of the gradient, and each layer's Lipschitz constant.

The bias compares the gradient in use with a better one (of doubled iterations, or exact), over the middle layers' parameters. For the
noise, the better gradient is formed in two halves of the batch; their difference is one standard deviation of their sum over the choice of
the batch. A bias far below the noise changes the weights less than another batch would.
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
from rayllp.engine.window_gradients import WindowGradients

SAMPLES_PER_COUPLING = 4
"""Couplings are measured on one in this many samples of the batch: only their order of magnitude matters."""
BIAS_SUMS = 7
"""Number of sums kept for each block: squared error, squared better gradient, its product with the gradient in use, the latter squared, the
squared difference of the halves; and, on the worker that has the head, the loss of the solve in use and that of the better one.
"""


@dataclass(frozen=True)
class Bias:
    """How far the gradient in use is off, over all middle layers and for each worker.

    Attributes:
        relative: norm of the error over the norm of the better gradient.
        cosine: cosine of the angle between the two gradients.
        noise: one standard deviation of the gradient over the choice of the batch, over the better gradient's norm; None if the batch was
            not halved.
        loss_gap: relative difference between the losses of the solve in use and of the better one, on the same batch.
        by_block: relative bias and cosine of each worker's block.
    """

    relative: float
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
        sums: this worker's sums (see BIAS_SUMS); None if the bias is not measured.
        has_halves: True if the better gradient was formed in halves.
        lipschitz: constants of this worker's layers, by index in the whole network; None if the plan does not ask for them.
        couplings: squared couplings of this worker's layers, see `WindowGradients.couplings`; None if the plan does not ask for them.
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
        used, loss = self._used_gradient(batch) if self.plan.bias else (None, None)
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
        if used is not None and loss is not None:
            self.sums = torch.cat([self._compare(used, first), torch.stack([loss, formed.loss]).double()])
        if probed is None:
            return formed
        return replace(formed, forward=probed.forward or formed.forward, adjoint=probed.adjoint or formed.adjoint)

    def _measure_couplings(self, batch: StepBatch) -> Tensor:
        """Return the squared couplings of this worker's layers, measured on a part of the batch."""
        assert isinstance(self.gradients.parallel, WindowGradients)
        found = self.gradients.parallel.couplings(batch.part(slice(0, -(-len(batch.samples) // SAMPLES_PER_COUPLING))))
        self.gradients.forget()
        return found

    def _used_gradient(self, batch: StepBatch) -> tuple[list[Tensor], Tensor]:
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

    def _compare(self, used: list[Tensor], first: list[Tensor]) -> Tensor:
        """Return this worker's sums for bias and noise: BIAS_SUMS without the losses."""
        better = self._middle()
        sums = torch.zeros(BIAS_SUMS - 2, dtype=torch.float64, device=self.group.device)
        for index, gradient in enumerate(better):
            g, u = gradient.double(), used[index].double()
            parts = [(u - g).square().sum(), g.square().sum(), (u * g).sum(), u.square().sum()]
            parts.append((2 * first[index].double() - g).square().sum() if first else torch.zeros_like(parts[0]))
            sums += torch.stack(parts)
        return sums

    def _middle(self) -> list[Tensor]:
        """Return the gradients of the middle layers' parameters, zeros where there is none."""
        block = self.group.block
        parameters = (parameter for n in block.middle for parameter in block.layers[n].parameters())
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    # Sums over workers ------------------------------------------------------------------------------------------------------------

    def table(self) -> Tensor:
        """Return this worker's sums in its row of a table, to be added to the other workers' tables; shape (workers, BIAS_SUMS).

        The table has no rows if the bias is not measured.
        """
        table = torch.zeros((self.group.channel.size, BIAS_SUMS), dtype=torch.float64, device=self.group.device)
        if self.sums is not None:
            table[self.group.channel.rank] = self.sums
        return table if self.plan.bias else table[:0]

    def read(self, table: Tensor) -> Bias | None:
        """Return the bias, from the sum of all workers' tables."""
        if not self.plan.bias:
            return None
        total = table.sum(0)
        relative, cosine = relative_and_cosine(total)
        noise = float((total[4] / total[1]).sqrt()) / self.replicas**0.5 if self.has_halves and total[1] > 0 else None
        loss, better = total[5:].tolist()
        gap = (loss - better) / abs(better) if better else 0.0 if loss == better else math.inf
        return Bias(relative, cosine, noise, gap, tuple(relative_and_cosine(row) for row in table))


def _exactly(accuracy: Accuracy) -> Accuracy:
    """Return the accuracy of an exact step whose batch can be halved.

    On blocks that is MGRIT with one level, since the pipeline is built for whole batches.
    """
    return replace(accuracy, serial=True) if accuracy.windows else replace(accuracy, levels_forward=1, levels_backward=1)


def relative_and_cosine(sums: Tensor) -> tuple[float, float]:
    """Return relative bias and cosine, from the sums of a block or of all (BIAS_SUMS).

    Two zero gradients (of frozen layers) count as equal. If only the better gradient is zero, the bias is infinite.
    """
    error, better, product, used = sums[:4].tolist()
    if better == 0 or used == 0:
        return (0.0, 1.0) if better == used else (1.0 if better else math.inf, 0.0)
    return math.sqrt(error / better), product / math.sqrt(better * used)
