"""The outcome of forming a step's gradients, and what all ways of forming them do at the two ends of the network."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayllp.engine.batch import StepBatch
from rayllp.engine.block import Block, BoundBlock
from rayllp.engine.consistency import Consistency
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.pipeline import slices
from rayllp.mgrit import ResidualShares
from rayllp.state import State, like, tensors


@dataclass(frozen=True)
class StepGradients:
    """The outcome of forming gradients, besides the gradients themselves.

    Attributes:
        loss: the scaled loss on the last worker; 0 elsewhere.
        forward, backward: this worker's share of the residuals of the batch's last part; None if nothing was solved iteratively.
        penalty: the consistency penalty, with its value; None if its weight is 0.
    """

    loss: Tensor
    forward: ResidualShares | None = None
    backward: ResidualShares | None = None
    penalty: Consistency | None = None


def in_parts(
    form: Callable[[StepBatch, Consistency | None], StepGradients], batch: StepBatch, penalty: Consistency | None, block: Block
) -> StepGradients:
    """Form gradients in as many parts of the batch as gradient accumulation asks for.

    Returns: the outcome with the sum of all losses and the last part's solves.
    """
    total, found = torch.zeros((), device=block.device, dtype=block.dtype), None
    for rows in slices(len(batch.samples), block.config.accumulate):
        found = form(batch.part(rows), penalty)
        total += found.loss
    assert found is not None
    return replace(found, loss=total)


def loss_and_seed(bound: BoundBlock, output: State | None, targets: Tensor, scale: float) -> tuple[Tensor, State]:
    """Return the loss times `scale`, and its gradient λ_N at the last middle layer's output. Adds gradients of closing buffers and head.

    Args:
        bound: the last worker's layers, bound to the samples.
        output: the state after the last middle layer.
        targets: the batch's targets.
        scale: factor on the summed loss.
    """
    assert output is not None
    leaves = tuple(part.detach().requires_grad_() for part in tensors(output))
    loss = bound.block.architecture.training_loss(bound.leave(like(output, leaves)), targets) * scale
    loss.backward()
    seed = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    return loss.detach(), like(output, seed)


def add_embedding_gradients(group: LayerGroup, entered: State | None, adjoint: State | None) -> None:
    """Add the gradients of embedding and opening buffers, on the first worker. Does nothing on others.

    Args:
        group: this worker's end of the layer group.
        entered: the state before the first middle layer, with its graph.
        adjoint: λ_0, the loss's gradient at this state.
    """
    if entered is None or adjoint is None:
        return
    # An embedding without parameters has no graph.
    seeds = [(state, lam) for state, lam in zip(tensors(entered), tensors(adjoint), strict=True) if state.requires_grad]
    if seeds:
        with group.span("enter"):
            torch.autograd.backward([state for state, _ in seeds], [lam for _, lam in seeds])
