"""`rayllp bench layers`: what a layer of this model costs on this device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayllp.config import TrainConfig
from rayllp.data import load_data
from rayllp.plan import Costs
from rayllp.plan.measure import engine_alone, measure_costs
from rayllp.state import tensors


@dataclass(frozen=True, kw_only=True)
class LayerBench:
    """A middle layer's times and bytes.

    Attributes:
        parameter_bytes: of its weights alone; gradients are as large again, AdamW's moments twice that.
        graph_bytes: what its graph holds from forward to gradient beyond weights and the state itself.
        state_bytes: of a state: a message to the neighbour, a C-point.
    """

    costs: Costs
    parameter_bytes: int
    graph_bytes: int
    state_bytes: int


def bench_layers(config: TrainConfig, device: str = "cpu") -> LayerBench:
    """Measure in this process."""
    data: Any = load_data(config)
    costs = measure_costs(config, data, message_s=0.0, device=device)
    engine = engine_alone(config, data, device)
    block = engine.block
    inputs, _, samples, _ = engine.my_batch("train", 0)
    block.begin(0, samples, inputs, training=True)
    with torch.no_grad():
        state = block.enter(inputs)
    layer = block.middle[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters.values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = tuple(part.detach().requires_grad_(part.is_floating_point()) for part in tensors(state))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = block.layer(layer, leaves[0] if isinstance(state, Tensor) else leaves)
    for part in (*leaves, *tensors(outputs)):
        kept.pop(part.untyped_storage().data_ptr(), None)
    return LayerBench(
        costs=costs,
        parameter_bytes=sum(p.nbytes for p in block.layers[layer].parameters()),
        graph_bytes=sum(kept.values()),
        state_bytes=sum(part.nbytes for part in tensors(state)),
    )
