"""Sums of the gradients of parameters that several workers of a layer group hold."""

from collections.abc import Sequence

import torch
from torch import nn

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.engine.all_reduce import sum_together
from rayllp.engine.block import Block
from rayllp.state import tensors


def add_shared_gradients(block: Block, layers: Channel, step: int) -> None:
    """Sum the gradients of parameters that several workers of the layer group hold.

    Tied parameters: the first and the last worker add each other's gradient, so that both copies stay equal. Parameters that several layers
    use: every worker gets the sum of all workers' gradients.
    """
    if tied := [parameter for name in block.tied if (parameter := block.parameters[name]).requires_grad]:
        _add_tied_gradients(tied, layers, layers.size - 1 if block.first else 0, step)
    _add_common_gradients(block, layers, step)


def _add_tied_gradients(tied: Sequence[nn.Parameter], layers: Channel, other: int, step: int) -> None:
    for parameter in tied:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = tuple(parameter.grad for parameter in tied if parameter.grad is not None)
    # Copies are sent, since the gradients are added to while the messages may still be on their way.
    leaving = tuple(gradient.clone() for gradient in gradients)
    (received,) = layers.exchange([(leaving, other)], [(StateSpec.of(gradients), other)], MessageTag(step, "gradients", "tied parameters"))
    for gradient, theirs in zip(gradients, tensors(received), strict=True):
        gradient += theirs


def _add_common_gradients(block: Block, layers: Channel, step: int) -> None:
    common = block.common_leaves
    if not common or layers.size == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in common]
    for parameter, summed in zip(common, sum_together(gradients, layers, MessageTag(step, "gradients", "common parameters")), strict=True):
        parameter.grad = summed.clone()
