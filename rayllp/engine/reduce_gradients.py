"""A worker's gradients and the others': means over replicas, sums over the layer group of parameters that several workers hold."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.engine.block import Block
from rayllp.state import tensors

BUCKET_BYTES = 32 * 1024 * 1024


def sum_over_replicas(block: Block, replicas: Channel, loss: Tensor) -> None:
    """Sum gradients and loss over replicas; the loss is scaled by the global number of terms, so the sum is the mean."""
    if replicas.size == 1:
        return
    bucket: list[Tensor] = [loss.view(1)]
    size = 0
    for gradient in [p.grad for p in block.parameters.values() if p.grad is not None]:
        if size + gradient.nbytes > BUCKET_BYTES:
            _reduce(bucket, replicas)
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    _reduce(bucket, replicas)


def _reduce(bucket: list[Tensor], replicas: Channel) -> None:
    dtype = max((part.dtype for part in bucket), key=lambda d: d.itemsize)
    flat = torch.cat([part.reshape(-1).to(dtype) for part in bucket])
    flat = replicas.all_reduce(flat, MessageTag(-1, "gradients", "sum over replicas"))
    for part, summed in zip(bucket, flat.split([part.numel() for part in bucket]), strict=True):
        part.copy_(summed.view(part.shape))


def add_shared_gradients(block: Block, layers: Channel, step: int) -> None:
    """Tied parameters: the first and the last worker add each other's gradient, so that both copies move alike. Parameters that several
    layers use: every worker gets the sum of all workers' gradients.
    """
    if block.shared:
        _add_tied_gradients([block.parameters[name] for name in block.shared], layers, layers.size - 1 if block.first else 0, step)
    _add_common_gradients(block, layers, step)


def _add_tied_gradients(tied: Sequence[nn.Parameter], layers: Channel, other: int, step: int) -> None:
    for parameter in tied:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = tuple(parameter.grad for parameter in tied if parameter.grad is not None)
    # Copies leave: what is received is added to the gradients while they may be on their way.
    leaving = tuple(gradient.clone() for gradient in gradients)
    (received,) = layers.exchange([(leaving, other)], [(StateSpec.of(gradients), other)], MessageTag(step, "gradients", "tied parameters"))
    for gradient, theirs in zip(gradients, tensors(received), strict=True):
        gradient += theirs


def _add_common_gradients(block: Block, layers: Channel, step: int) -> None:
    common = list(block.common_parameters.values())
    if not common or layers.size == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in common])
    layers.all_reduce(flat, MessageTag(step, "gradients", "common parameters"))
    for parameter, summed in zip(common, flat.split([p.numel() for p in common]), strict=True):
        parameter.grad = summed.view_as(parameter).clone()
