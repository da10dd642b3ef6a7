"""What a probing step measures: convergence factors, the bias of the gradient in use beside that gradient's own noise, and, where
asked for, each layer's Lipschitz constant.

Bias: the gradient in use against that of doubled iterations, or against the exact one, over the middle layers' parameters. Noise: the
better gradient is formed in two halves of the batch, whose difference is one standard deviation of their sum over the choice of the
batch. A bias far below the noise moves the weights less than another batch would.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayllp.control import Accuracy, ProbePlan
from rayllp.data.base import Inputs
from rayllp.engine.lipschitz import estimate_layers
from rayllp.mgrit import MGRITResult
from rayllp.state import combine

if TYPE_CHECKING:
    from rayllp.engine.engine import Engine

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
    """A probe on one worker: forms the gradient of the step as `Engine.gradients` does, and measures on the way.

    Attributes:
        lipschitz: constants of this worker's layers, by index in the whole network; None where the plan does not ask for them.
    """

    engine: "Engine"
    plan: ProbePlan
    sums: Tensor | None = None
    has_halves: bool = False
    lipschitz: dict[int, float] | None = None

    def gradients(
        self, step: int, accuracy: Accuracy, inputs: Inputs, targets: Tensor, samples: tuple[int, ...], scale: float
    ) -> tuple[Tensor, MGRITResult | None, MGRITResult | None]:
        """The better gradient into `.grad`, its loss, and the solves that yield ρ."""
        batch = (inputs, targets, samples)
        self.engine.block.watched = {} if self.plan.lipschitz else None
        used = self._used_gradient(step, batch, scale) if self.plan.bias else None
        doubled = self.plan.candidate.probing()
        forward = backward = None
        better = doubled
        if accuracy.serial or self.plan.exact:
            # Doubled iterations are run for ρ alone; the gradient of the step is the exact one.
            _, forward, backward = self.engine.gradients(step, doubled, *batch, scale)
            self._forget()
            better = accuracy if accuracy.serial else replace(doubled, levels_forward=1, levels_backward=1)
        halves = self._halves(better, len(samples)) if used is not None else ()
        self.has_halves = bool(halves)
        loss, first, solved = self._in_parts(step, better, batch, scale, halves)
        if used is not None:
            self.sums = self._compare(used, first)
        if self.plan.lipschitz:
            self.lipschitz = estimate_layers(self.engine.block, step, inputs)
            self.engine.block.watched = None
        return loss, forward or solved[0], backward or solved[1]

    def _used_gradient(self, step: int, batch: tuple[Inputs, Tensor, tuple[int, ...]], scale: float) -> list[Tensor]:
        self.engine.gradients(step, self.plan.candidate, *batch, scale)
        used = [gradient.clone() for gradient in self._middle()]
        self._forget()
        return used

    def _halves(self, accuracy: Accuracy, samples: int) -> tuple[slice, ...]:
        """Two halves of the batch; none where it has none, or where the pipeline was built for the whole of it."""
        if accuracy.serial or samples % (2 * self.engine.config.accumulate):
            return ()
        return slice(0, samples // 2), slice(samples // 2, samples)

    def _in_parts(
        self, step: int, accuracy: Accuracy, batch: tuple[Inputs, Tensor, tuple[int, ...]], scale: float, halves: tuple[slice, ...]
    ) -> tuple[Tensor, list[Tensor], tuple[MGRITResult | None, MGRITResult | None]]:
        """Gradients half by half; the loss, the first half's gradients, and the last solves."""
        inputs, targets, samples = batch
        if not halves:
            loss, *solved = self.engine.gradients(step, accuracy, inputs, targets, samples, scale)
            return loss, [], (solved[0], solved[1])
        losses: list[Tensor] = []
        first: list[Tensor] = []
        penalty = None
        for half in halves:
            part = combine(lambda whole, half=half: whole[half], inputs)
            loss, *solved = self.engine.gradients(step, accuracy, part, targets[half], samples[half], scale)
            losses.append(loss)
            if self.engine.penalty is not None and penalty is not None:
                self.engine.penalty.add(penalty)
            penalty = self.engine.penalty
            first = first or [gradient.clone() for gradient in self._middle()]
        return torch.stack(losses).sum(), first, (solved[0], solved[1])

    def _compare(self, used: list[Tensor], first: list[Tensor]) -> Tensor:
        better = self._middle()
        sums = torch.zeros(SUMS, dtype=torch.float64, device=self.engine.device)
        for index, gradient in enumerate(better):
            g, u = gradient.double(), used[index].double()
            parts = [(u - g).square().sum(), g.square().sum(), (u * g).sum(), u.square().sum()]
            parts.append((2 * first[index].double() - g).square().sum() if first else torch.zeros_like(parts[0]))
            sums += torch.stack(parts)
        return sums

    def _middle(self) -> list[Tensor]:
        block = self.engine.block
        parameters = (parameter for n in block.middle for parameter in block.layers[n].parameters())
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def _forget(self) -> None:
        self.engine.optimizer.zero_grad(set_to_none=True)

    # Over workers -----------------------------------------------------------------------------------------------------------------

    def table(self) -> Tensor:
        """This worker's sums in a table of all workers', to be added up with the others'; shape (workers, SUMS), no rows without a bias."""
        table = torch.zeros((self.engine.layers.size, SUMS), dtype=torch.float64, device=self.engine.device)
        if self.sums is not None:
            table[self.engine.layers.rank] = self.sums
        return table if self.plan.bias else table[:0]

    def read(self, table: Tensor) -> Bias | None:
        """The bias, from the table of all workers."""
        if not self.plan.bias:
            return None
        total = table.sum(0)
        relative, cosine = _bias(total)
        noise = float((total[4] / total[1]).sqrt()) / self.engine.replicas.size**0.5 if self.has_halves else None
        return Bias(relative, cosine, noise, tuple(_bias(row) for row in table))


def _bias(sums: Tensor) -> tuple[float, float]:
    error, better, product, used = sums[:4]
    return float((error / better).sqrt()), float(product / (better * used).sqrt())
