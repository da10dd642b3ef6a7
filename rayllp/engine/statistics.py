"""The statistics of a training step, summed over the layer group by one all-reduce."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rayllp.channel.base import MessageTag, StateSpec
from rayllp.config.schedule import learning_rate
from rayllp.control import Probe
from rayllp.engine.all_reduce import PackedAllReduce
from rayllp.engine.batch import StepBatch
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.probe import Comparison, Probing
from rayllp.engine.step_gradients import StepGradients
from rayllp.mgrit import Convergence
from rayllp.mgrit.result import sweeps_of_both

OTHER_PIECES = 3
"""Pieces of the network besides the layers: embedding, the common piece that several layers use, head."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """The numbers that a step reports. They are equal on all workers of a layer group, except time, fault, Lipschitz constants and work.

    Attributes:
        step: number of the step.
        loss: mean over the loss terms of the global batch.
        grad_norm: norm of the whole network's gradient, before clipping.
        lr: learning rate.
        tokens: number of tokens (or patches) in the global batch.
        consistency: the consistency penalty R over this replica's samples, without its weight; None if the penalty is off.
        forward, adjoint: how the two solves went, with factors in the order of the layers; None if nothing was solved iteratively.
        comparison: how far the gradient and the loss of the solve in use are off, if a probe has measured it.
        judged_sweeps: sweeps forward and backward of the solve that a probe has judged, if that is by a rolling window.
        lipschitz: constants of this worker's own layers, by index, if a probe has estimated them.
        time_s: seconds that the step took on this worker; 0 before its end.
        fault: the first place where something was not finite, as this worker sees it: (stage, order, text), see `diagnose`. The smallest
            over all workers is the first one of the network. None if all was finite.
        work: floating-point operations of this worker's pieces in the step, and its device's peak in a second; None if not known.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    consistency: float | None
    forward: Convergence | None
    adjoint: Convergence | None
    comparison: Comparison | None
    judged_sweeps: tuple[int, int] | None
    lipschitz: Mapping[int, float] | None
    time_s: float = 0.0
    fault: tuple[int, int, str] | None = None
    work: tuple[float, float] | None = None

    @property
    def is_finite(self) -> bool:
        """True if loss and gradient are finite. If not, the weights are not changed."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def sweeps(self) -> tuple[int, int] | None:
        """Sweeps forward and backward of the solve that has trained; None if that is not by a rolling window."""
        return sweeps_of_both(self.forward, self.adjoint)

    @property
    def findings(self) -> Probe:
        """What a probing step has found, as the controller takes it."""
        return Probe(
            rho_forward=self.forward.convergence_factor if self.forward else None,
            rho_backward=self.adjoint.convergence_factor if self.adjoint else None,
            bias=self.comparison.bias if self.comparison else None,
            noise=self.comparison.noise if self.comparison else None,
            loss_gap=self.comparison.loss_gap if self.comparison else None,
            sweeps=self.judged_sweeps,
        )


def reduce_statistics(
    group: LayerGroup, batch: StepBatch, formed: StepGradients, counted: Sequence[tuple[int, nn.Parameter]], probing: Probing | None = None
) -> StepStats:
    """Return gradient norm, loss, penalty, residuals and bias of the whole layer group, by one all-reduce.

    Args:
        group: this worker's end of the layer group.
        batch: the step's batch.
        formed: the outcome of forming the gradients.
        counted: this worker's parameters that count in the norm, each as (number of its piece, parameter) (`Block.counted`).
        probing: the probe, if the step is one.
    """
    config, step = group.config, batch.step
    zero = torch.zeros((), dtype=torch.float64, device=group.device)
    sums = PackedAllReduce(group.device)
    sums.add("norms", _squared_norms(counted, config.model.layers + OTHER_PIECES, group.device))
    sums.add("loss", formed.loss if group.block.last else zero)
    if formed.penalty is not None:
        sums.add("consistency", formed.penalty.value)
    solves = {"forward": formed.forward, "adjoint": formed.adjoint}
    for name, shares in solves.items():
        if shares is not None:
            sums.add(name, shares.flat)
    if probing is not None:
        sums.add("probe", probing.table())
    sums.reduce(group.channel, MessageTag(step, "gradients", "norm, loss and residuals"))
    measured = {name: None if shares is None else shares.convergence(sums[name]) for name, shares in solves.items()}
    return StepStats(
        step=step,
        loss=float(sums["loss"]),
        grad_norm=float(sums["norms"].sum()) ** 0.5,
        lr=learning_rate(config.optimizer, step, config.steps),
        tokens=config.batch_size * _positions(group.spec(batch.inputs)),
        consistency=float(sums["consistency"]) / config.replica_batch if formed.penalty is not None else None,
        forward=measured["forward"],
        adjoint=_in_order_of_layers(measured["adjoint"]),
        comparison=probing.read(sums["probe"]) if probing is not None else None,
        judged_sweeps=probing.sweeps if probing is not None else None,
        lipschitz=probing.lipschitz if probing is not None else None,
    )


def _positions(spec: StateSpec) -> int:
    """Return the number of tokens (or patches) of one sample: the time dimensions of all (batch, time, width) tensors of a state.

    Any other tensor counts as one.
    """
    return sum(shape[1] if len(shape) == 3 else 1 for shape in spec.shapes)


def _in_order_of_layers(adjoint: Convergence | None) -> Convergence | None:
    """Return an adjoint solve's convergence with its factors in the order of the layers: the solve has them last layer first."""
    return None if adjoint is None else replace(adjoint, factors=tuple(level[::-1] for level in adjoint.factors))


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
