"""Measurements of a probing step: convergence factors, the bias and the noise of the gradient, and each layer's Lipschitz constant.

The bias compares the gradient in use with a better one (of doubled iterations, or exact), for each middle layer. For the noise, the better
gradient is formed in two halves of the batch; their difference is one standard deviation of their sum over the choice of the batch. A bias
far below the noise changes the weights less than another batch would. With replicas all of these are gradients of the whole batch.

Optimizers scale each weight's step (AdamW) or each matrix's (Muon) by the size of its own gradient. So to first order a step lowers the
loss by an amount in proportion to Σ ‖g_l‖ over the layers, and a layer whose gradient is wrong loses its part of that. Hence the error of
each layer is taken relative to its own gradient, and layers are weighted by ‖g_l‖. (One norm over all layers would weight them by ‖g_l‖²: a
few with large gradients would count alone, as the first ones of a deep network with Δt = 1, and all others could be trained by error.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag
from rayllp.control import Accuracy, ProbePlan
from rayllp.engine.all_reduce import sum_together
from rayllp.engine.batch import StepBatch
from rayllp.engine.gradients import Gradients
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.lipschitz import estimate_layers
from rayllp.engine.step_gradients import StepGradients


class Sums(NamedTuple):
    """What two gradients are compared by: sums over the parameters of each layer, all of shape (layers,), in float64.

    Attributes:
        error: squares of the difference between the gradient in use and the better one.
        better, used: squares of each.
        product: their products.
        halves: squares of the difference between the better gradients of the two halves of the batch.
    """

    error: Tensor
    better: Tensor
    used: Tensor
    product: Tensor
    halves: Tensor

    @property
    def biases(self) -> Tensor:
        """Norm of each layer's error over the norm of its better gradient. Two zero gradients (of frozen layers) count as equal."""
        return torch.where(self.error == 0, 0.0, (self.error / self.better).sqrt())

    @property
    def cosines(self) -> Tensor:
        """Cosine of the angle between each layer's two gradients."""
        alone = (self.better == 0) | (self.used == 0)
        return torch.where(alone, (self.better == self.used).double(), self.product / (self.better * self.used).sqrt())

    @property
    def noises(self) -> Tensor:
        """Norm of the difference between the better gradients of two halves of the batch, over that of their sum."""
        return (self.halves / self.better).sqrt()

    def mean_of(self, values: Tensor) -> float:
        """Return the root mean square of such numbers over the layers, weighted by the norms of the better gradients."""
        weights = self.better.sqrt()
        if not weights.any():
            return float(values.max())
        return math.sqrt(float(torch.where(weights == 0, 0.0, weights * values.square()).sum() / weights.sum()))


@dataclass(frozen=True)
class Comparison:
    """How far the solve in use is off from a better one.

    Attributes:
        bias: norm of a layer's error over the norm of its better gradient, as the root mean square over the layers, weighted by the latter.
        cosine: mean cosine of the angle between a layer's two gradients.
        noise: one standard deviation of a layer's gradient over the choice of the batch, over its norm, as the same mean; None if the batch
            was not halved.
        loss_gap: relative difference between the losses of the solve in use and of the better one, on the same batch.
        by_layer: relative bias and cosine of each middle layer.
    """

    bias: float
    cosine: float
    noise: float | None
    loss_gap: float
    by_layer: tuple[tuple[float, float], ...]

    @staticmethod
    def of(sums: Sums, loss: float, better_loss: float, *, halved: bool) -> "Comparison":
        """Return what the sums over all workers say.

        Args:
            sums: of the gradients.
            loss, better_loss: losses of the two solves.
            halved: whether the batch was halved.
        """
        biases, cosines = sums.biases, sums.cosines
        return Comparison(
            bias=sums.mean_of(biases),
            cosine=float(cosines.mean()),
            noise=sums.mean_of(sums.noises) if halved and float(sums.better.sum()) > 0 else None,
            loss_gap=_gap(loss, better_loss),
            by_layer=tuple(zip(biases.tolist(), cosines.tolist(), strict=True)),
        )


def _gap(loss: float, better: float) -> float:
    """Return the relative difference between a loss and a better one."""
    if better == 0:
        return 0.0 if loss == 0 else math.inf
    return (loss - better) / abs(better)


@dataclass
class _Formed:
    """What one replica has formed in a probe besides the better gradient.

    Attributes:
        used: gradients by the solve in use.
        first: the better gradients of the first half of the batch; empty if it was not halved.
        losses: of the two solves.
    """

    used: list[Tensor]
    first: list[Tensor]
    losses: Tensor


@dataclass
class Probing:
    """A probe on one worker. It forms a step's gradients as `Gradients` does, and measures on the way: `form`, and then `compare`, once
    gradients have been summed over the replicas.

    Attributes:
        gradients: forms the gradients.
        plan: what to measure.
        sums: the `Sums` of this worker's layers, a row for each middle layer, and a last row that begins with the losses of the two solves;
            zeros for what other workers have. Shape (layers + 1, sums), float64; None if the bias is not measured.
        has_halves: True if the better gradient was formed in halves.
        lipschitz: constants of this worker's layers, by index in the whole network; None if the plan does not ask for them.
        sweeps: sweeps forward and backward of the solve in use, if that is by a rolling window.
    """

    gradients: Gradients
    plan: ProbePlan
    sums: Tensor | None = None
    has_halves: bool = False
    lipschitz: dict[int, float] | None = None
    sweeps: tuple[int, int] | None = None
    _formed: _Formed | None = None

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
        used = self._used_solve(batch) if self.plan.bias else None
        doubled = self.plan.candidate.doubled()
        probed, better = None, doubled
        if accuracy.serial or self.plan.exact:
            # Doubled iterations are run for ρ only, and the step's gradient is the exact one. A rolling window tells ρ without them.
            if self.plan.rho and doubled.tolerance is None:
                probed = self.gradients(batch.solved_by(doubled))
                self.gradients.forget()
            better = accuracy if accuracy.serial else self._exactly(doubled)
        halves = self._halves(better, len(batch.samples)) if used is not None else ()
        self.has_halves = bool(halves)
        formed, first = self._in_halves(batch.solved_by(better), halves)
        if used is not None:
            self._formed = _Formed(used[0], first, torch.stack([used[1], formed.loss]))
        if probed is None:
            return formed
        return replace(formed, forward=probed.forward or formed.forward, adjoint=probed.adjoint or formed.adjoint)

    def _used_solve(self, batch: StepBatch) -> tuple[list[Tensor], Tensor]:
        """Return the layers' gradients as the candidate accuracy forms them, and the loss."""
        formed = self.gradients(batch.solved_by(self.plan.candidate))
        self.sweeps = formed.sweeps
        used = self._copies()
        self.gradients.forget()
        return used, formed.loss

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
            first = first or self._copies()
        one, other = found
        if one.penalty is not None and other.penalty is not None:
            other.penalty.add(one.penalty)
        return replace(other, loss=torch.stack([one.loss, other.loss]).sum()), first

    def compare(self, replicas: Channel, step: int) -> None:
        """Compare the gradients of all replicas together. Their sum of the better one is in `.grad`.

        Args:
            replicas: the channel to the workers of other replicas with the same layers.
            step: number of the step, for errors.

        Raises:
            ChannelError: a replica was lost, or too slow.
        """
        if self._formed is None:
            return
        used, first, losses = self._formed.used, self._formed.first, self._formed.losses
        self._formed = None
        if replicas.size > 1:
            tag = MessageTag(step, "gradients", "probe")
            *used, losses = sum_together([*used, losses], replicas, tag)
            first = first and sum_together(first, replicas, tag)
        sums = self._no_sums()
        for index, (layer, gradient) in enumerate(self._gradients()):
            g, u = gradient.double(), used[index].double()
            parts = [(u - g).square().sum(), g.square().sum(), u.square().sum(), (u * g).sum()]
            parts.append((2 * first[index].double() - g).square().sum() if first else torch.zeros_like(parts[0]))
            sums[layer] += torch.stack(parts)
        sums[-1, :2] = losses
        self.sums = sums

    def _no_sums(self) -> Tensor:
        shape = self.group.config.middle_layers + 1, len(Sums._fields)
        return torch.zeros(shape, dtype=torch.float64, device=self.group.device)

    def _gradients(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the gradients of this worker's middle layers, each with its layer's number among these; zeros where there is none."""
        block, config = self.group.block, self.group.config
        for index in block.indices:
            number = index - config.buffers.open
            if number in range(config.middle_layers):  # buffers are exact but for their states, and their gradients are the largest
                for p in block.layers[index].parameters():
                    yield number, torch.zeros_like(p) if p.grad is None else p.grad

    def _copies(self) -> list[Tensor]:
        """Return copies of these gradients."""
        return [gradient.clone() for _, gradient in self._gradients()]

    def _exactly(self, accuracy: Accuracy) -> Accuracy:
        """Return the accuracy of an exact step whose batch can be halved.

        On blocks that is MGRIT with one level, since the pipeline is built for whole batches.
        """
        cyclic = self.group.config.placement == "cyclic"
        return replace(accuracy, serial=True) if cyclic else replace(accuracy, levels_forward=1, levels_backward=1)

    # Sums over workers ------------------------------------------------------------------------------------------------------------

    def table(self) -> Tensor:
        """Return this worker's `sums`, to be added to those of other workers. It has no rows if the bias is not measured."""
        return self._no_sums()[:0] if self.sums is None else self.sums

    def read(self, table: Tensor) -> Comparison | None:
        """Return how the two solves compare, from the sum of all workers' tables; None if the bias is not measured."""
        if not self.plan.bias:
            return None
        loss, better_loss = table[-1, :2].tolist()
        return Comparison.of(Sums(*table[:-1].T), loss, better_loss, halved=self.has_halves)
