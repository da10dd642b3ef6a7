"""What a step did, in numbers: reduced over the layer group in one message, and as the step reports them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayllp.channel.base import MessageTag
from rayllp.engine.all_reduce import PackedAllReduce
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.probe import Bias, Probing
from rayllp.engine.step_gradients import StepGradients
from rayllp.mgrit import MGRITResult

OTHER_PIECES = 3
"""Beside the layers: embedding, what several layers read, head."""
Factors = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What a step did; equal on all workers of a layer group, but for the time, the fault and what is said to be its own.

    Attributes:
        fault: None, or the first layer at fault as this worker sees it: (stage, order, text); the smallest over all workers is it.
        rho_forward, rho_backward: convergence factors, None unless two residuals were measured.
        factors_forward, factors_backward: the same by level and boundary between coarse intervals, in order of the layers; no levels unless
            measured.
        bias: of the gradient in use, where a probe measured it.
        consistency: the consistency penalty R over this replica's samples, without its weight; None where it is off.
        lipschitz: constants of this worker's own layers, by index, where a probe estimated them.
        work: operations of this worker's pieces in the step, and those a second that its device could do; None where this is not known.
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
    advice_forward: str
    advice_backward: str
    fault: tuple[int, int, str] | None = None
    lipschitz: dict[int, float] | None = None
    work: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """By name, for a line of `metrics.jsonl`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ReducedStatistics:
    """A step's numbers over the whole layer group, equal on all its workers.

    Attributes:
        norm: of the gradient.
        loss: the mean over the loss terms.
        consistency: the consistency penalty R, without its weight; None where it is off.
        forward, backward: the solves, with their residuals; None where nothing was solved iteratively.
        bias: of the gradient in use, where a probe measured it.
    """

    norm: float
    loss: float
    consistency: float | None
    forward: MGRITResult | None
    backward: MGRITResult | None
    bias: Bias | None

    @property
    def is_finite(self) -> bool:
        """True if the weights may be changed: loss and gradient are finite."""
        return bool(torch.isfinite(torch.tensor([self.norm, self.loss])).all())


def reduce_statistics(
    group: LayerGroup, step: int, formed: StepGradients, counted: Sequence[tuple[int, nn.Parameter]], probing: Probing | None = None
) -> ReducedStatistics:
    """Global gradient norm, loss, penalty, residuals and bias in one all-reduce over the layer group.

    Args:
        formed: what forming the gradients yielded.
        counted: this worker's parameters, but for those whose copy on another worker counts, each with its piece's place in the network.
        probing: what was measured, where the step is a probe.
    """
    zero = torch.zeros((), dtype=torch.float64, device=group.device)
    sums = PackedAllReduce(group.device)
    sums.add("norms", _squared_norms(counted, group.config.model.layers + OTHER_PIECES, group.device))
    sums.add("loss", formed.loss if group.block.last else zero)
    if formed.penalty is not None:
        sums.add("consistency", formed.penalty.value)
    solves = {"forward": formed.forward, "backward": formed.backward}
    for name, result in solves.items():
        if result is not None:
            sums.add(name, result.shares)
    if probing is not None:
        sums.add("probe", probing.table())
    sums.reduce(group.channel, MessageTag(step, "gradients", "norm, loss and residuals"))
    measured = {name: None if result is None else result.measured(sums[name]) for name, result in solves.items()}
    return ReducedStatistics(
        norm=float(sums["norms"].sum()) ** 0.5,
        loss=float(sums["loss"]),
        consistency=float(sums["consistency"]) / group.config.replica_batch if formed.penalty is not None else None,
        forward=measured["forward"],
        backward=measured["backward"],
        bias=probing.read(sums["probe"]) if probing is not None else None,
    )


def _squared_norms(counted: Sequence[tuple[int, nn.Parameter]], pieces: int, device: torch.device) -> Tensor:
    """Of each piece's gradient, in float64; zeros for those of other workers.

    One number a piece, added up in the order of the network, so that the last bit of the norm does not depend on who has which layers.
    """
    found = [(place, p.grad) for place, p in counted if p.grad is not None]
    squares = torch.zeros(pieces, dtype=torch.float64, device=device)
    if found:
        lengths = torch.bincount(torch.tensor([place for place, _ in found]), minlength=pieces).to(device)
        norms = torch.stack(torch._foreach_norm([gradient for _, gradient in found])).double().square()
        squares = torch.segment_reduce(norms, "sum", lengths=lengths, initial=0.0)
    return squares
