"""The depth-smoothness penalty: λ Σ ‖θ_{n+1} − θ_n‖² / Δt over neighbouring middle layers, which makes weights vary slowly in depth.

A coarse step uses the weights of one layer for a whole interval. The less the weights vary, the better it predicts. Each worker needs only
the weights of the two neighbouring layers at the borders of its block, so a step costs two messages.
"""

from torch import Tensor, nn

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.engine.block import Block
from rayllp.state import tensors

Weights = dict[str, Tensor]


def add_smoothness_gradient(block: Block, channel: Channel, weight: float, step: int) -> None:
    """Add the penalty's gradient to `.grad` of this worker's middle layers. All workers of the layer group call it.

    Parameters that differ in name or shape from those of the neighbouring layer (an encoder's last, a decoder's first) are left out.
    """
    mine = {n: dict(block.layers[n].named_parameters()) for n in block.indices}
    scale = 2 * weight / block.config.middle_step
    around = {**_borders(block, channel, mine, step), **{n: _values(parameters) for n, parameters in mine.items()}}
    for n, parameters in mine.items():
        for neighbour in (n - 1, n + 1):
            for name, value in around.get(neighbour, {}).items():
                parameter = parameters.get(name)
                if parameter is not None and parameter.requires_grad and parameter.shape == value.shape:
                    gap = (parameter.detach() - value) * scale
                    parameter.grad = gap if parameter.grad is None else parameter.grad.add_(gap)


def _borders(block: Block, channel: Channel, mine: dict[int, dict[str, nn.Parameter]], step: int) -> dict[int, Weights]:
    """Return the current weights of the layers just before this worker's first and just after its last, received from the neighbours."""
    tag, rank = MessageTag(step, "gradients", "border layers' weights"), channel.rank
    sides = [(-1, block.indices[0])] if rank > 0 else []
    sides += [(1, block.indices[-1])] if rank < channel.size - 1 else []
    # Copies are sent, since the optimizer changes the weights while the messages may still be on their way.
    leaving = [(tuple(value.clone() for value in _values(mine[layer]).values()), rank + side) for side, layer in sides]
    templates = [block.template(layer + side) for side, layer in sides]
    coming = [(StateSpec.of(tuple(template.values())), rank + side) for template, (side, _) in zip(templates, sides, strict=True)]
    found = channel.exchange(leaving, coming, tag)
    return {
        layer + side: dict(zip(template, tensors(state), strict=True))
        for (side, layer), template, state in zip(sides, templates, found, strict=True)
    }


def _values(parameters: dict[str, nn.Parameter]) -> Weights:
    return {name: parameter.detach() for name, parameter in parameters.items()}
