"""The outcome of forming a step's gradients, and what all ways of forming them do at the two ends of the network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rayllp.engine.batch import StepBatch
from rayllp.engine.block import BoundBlock
from rayllp.engine.consistency import Consistency
from rayllp.engine.layer_group import LayerGroup
from rayllp.mgrit import ResidualShares
from rayllp.mgrit.result import sweeps_of_both
from rayllp.state import State, like, tensors


@dataclass(frozen=True)
class StepGradients:
    """The outcome of forming gradients, besides the gradients themselves.

    Attributes:
        loss: the scaled loss on the last worker; 0 elsewhere.
        forward, adjoint: this worker's share of the residuals of the two solves; None if nothing was solved iteratively.
        penalty: the consistency penalty, with its value; None if its weight is 0.
    """

    loss: Tensor
    forward: ResidualShares | None = None
    adjoint: ResidualShares | None = None
    penalty: Consistency | None = None

    @property
    def sweeps(self) -> tuple[int, int] | None:
        """Sweeps forward and backward, if both solves were by a rolling window."""
        return sweeps_of_both(self.forward, self.adjoint)


def loss_and_seed(bound: BoundBlock, output: State | None, batch: StepBatch) -> tuple[Tensor, State | None]:
    """Return the batch's scaled loss, and its gradient λ_N at the solve's output. Workers other than the last get 0 and None.

    Adds the gradients of closing buffer layers (by MGRIT) and head to `.grad`.

    Args:
        bound: this worker's layers, bound to the samples.
        output: the state after the last layer of the solve, on the last worker.
        batch: the samples.
    """
    block = bound.block
    if not block.last:
        return torch.zeros((), device=block.device), None
    assert output is not None
    leaves = tuple(part.detach().requires_grad_() for part in tensors(output))
    loss = block.architecture.training_loss(bound.leave(like(output, leaves)), batch.targets) * batch.scale
    loss.backward()
    seed = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    return loss.detach(), like(output, seed)


def add_embedding_gradients(group: LayerGroup, entered: State | None, lam: State | None) -> None:
    """Add the gradients of embedding and opening buffer layers (by MGRIT), on the first worker. Does nothing on others.

    Args:
        group: this worker's end of the layer group.
        entered: the state before the first layer of the solve, with its graph.
        lam: λ_0, the loss's gradient at this state.
    """
    if entered is None or lam is None:
        return
    # An embedding without parameters has no graph.
    seeds = [(state, seed) for state, seed in zip(tensors(entered), tensors(lam), strict=True) if state.requires_grad]
    if seeds:
        with group.span("enter"):
            torch.autograd.backward([state for state, _ in seeds], [seed for _, seed in seeds])
