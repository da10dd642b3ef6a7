"""The numbers of a step: reduced over the layer group in one message, and as the step reports them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayllp.channel.base import MessageTag
from rayllp.engine.all_reduce import PackedAllReduce
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.probe import Bias, Probing
from rayllp.engine.step_gradients import StepGradients
from rayllp.mgrit import Convergence

OTHER_PIECES = 3
"""Pieces of the network besides the layers: embedding, what several layers use, head."""
Factors = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """The numbers that a step reports. They are equal on all workers of a layer group, except time, fault, Lipschitz constants and work.

    Attributes:
        step: number of the step.
        loss: mean over the loss terms of the global batch.
        grad_norm: norm of the whole network's gradient, before clipping.
        lr: learning rate.
        time_s: seconds that the step took on this worker.
        tokens: number of tokens (or patches) in the global batch.
        rho_forward, rho_backward: convergence factors; None unless at least two residuals were measured.
        factors_forward, factors_backward: convergence factors by level and boundary between coarse intervals, in order of the layers; no
            levels if they were not measured.
        consistency: the consistency penalty R over this replica's samples, without its weight; None if the penalty is off.
        bias: bias of the gradient in use, if a probe has measured it.
        advice_forward, advice_backward: how each solve went, with advice; empty if there was none.
        couplings: how strongly each middle layer but the first depends on the one before it, if a probe has measured it: the larger one of
            forward and adjoint, see `mgrit/couplings.py`.
        fault: the first place where something was not finite, as this worker sees it: (stage, order, text), see `diagnose`. The smallest
            over all workers is the first one of the network. None if all was finite.
        lipschitz: constants of this worker's own layers, by index, if a probe has estimated them.
        work: floating-point operations of this worker's pieces in the step, and its device's peak in a second; None if not known.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    time_s: float
    tokens: int
    rho_forward: float | None
    rho_backward: float | None
    factors_forward: Factors
    factors_backward: Factors
    consistency: float | None
    bias: Bias | None
    couplings: tuple[float, ...] | None
    advice_forward: str
    advice_backward: str
    fault: tuple[int, int, str] | None = None
    lipschitz: dict[int, float] | None = None
    work: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class ReducedStatistics:
    """A step's numbers over the whole layer group, equal on all its workers.

    Attributes:
        norm: norm of the gradient.
        loss: mean over the loss terms.
        consistency: the consistency penalty R, without its weight; None if the penalty is off.
        forward, backward: how the solves went; None if nothing was solved iteratively.
        bias: bias of the gradient in use, if a probe has measured it.
        couplings: as in `StepStats`.
    """

    norm: float
    loss: float
    consistency: float | None
    forward: Convergence | None
    backward: Convergence | None
    bias: Bias | None
    couplings: tuple[float, ...] | None

    @property
    def is_finite(self) -> bool:
        """True if the weights may be changed: loss and gradient are finite."""
        return bool(torch.isfinite(torch.tensor([self.norm, self.loss])).all())


def reduce_statistics(
    group: LayerGroup, step: int, formed: StepGradients, counted: Sequence[tuple[int, nn.Parameter]], probing: Probing | None = None
) -> ReducedStatistics:
    """Return gradient norm, loss, penalty, residuals and bias of the whole layer group, by one all-reduce.

    Args:
        group: this worker's end of the layer group.
        step: number of the step.
        formed: the outcome of forming the gradients.
        counted: this worker's parameters that count in the norm, each after the number of its piece (`Block.counted`).
        probing: the probe, if the step is one.
    """
    zero = torch.zeros((), dtype=torch.float64, device=group.device)
    sums = PackedAllReduce(group.device)
    sums.add("norms", _squared_norms(counted, group.config.model.layers + OTHER_PIECES, group.device))
    sums.add("loss", formed.loss if group.block.last else zero)
    if formed.penalty is not None:
        sums.add("consistency", formed.penalty.value)
    solves = {"forward": formed.forward, "backward": formed.backward}
    for name, shares in solves.items():
        if shares is not None:
            sums.add(name, shares.flat)
    if probing is not None:
        sums.add("probe", probing.table())
        if probing.couplings is not None:
            sums.add("couplings", probing.couplings)
    sums.reduce(group.channel, MessageTag(step, "gradients", "norm, loss and residuals"))
    measured = {name: None if shares is None else shares.convergence(sums[name]) for name, shares in solves.items()}
    return ReducedStatistics(
        norm=float(sums["norms"].sum()) ** 0.5,
        loss=float(sums["loss"]),
        consistency=float(sums["consistency"]) / group.config.replica_batch if formed.penalty is not None else None,
        forward=measured["forward"],
        backward=measured["backward"],
        bias=probing.read(sums["probe"]) if probing is not None else None,
        couplings=_larger(sums["couplings"]) if probing is not None and probing.couplings is not None else None,
    )


def _larger(squares: Tensor) -> tuple[float, ...]:
    """Return the larger one of both directions' couplings, of all layers but the first, from their squares of shape (2, layers)."""
    return tuple(squares.amax(0).sqrt()[1:].tolist())


def _squared_norms(counted: Sequence[tuple[int, nn.Parameter]], pieces: int, device: torch.device) -> Tensor:
    """Return the squared norm of each piece's gradient in float64, with zeros for pieces of other workers; shape (pieces,).

    One number for each piece, added up in the order of the network, makes the norm independent of which worker has which layers, to the
    last bit.
    """
    found = [(place, p.grad) for place, p in counted if p.grad is not None]
    squares = torch.zeros(pieces, dtype=torch.float64, device=device)
    if found:
        lengths = torch.bincount(torch.tensor([place for place, _ in found]), minlength=pieces).to(device)
        norms = torch.stack(torch._foreach_norm([gradient for _, gradient in found])).double().square()
        squares = torch.segment_reduce(norms, "sum", lengths=lengths, initial=0.0)
    return squares
