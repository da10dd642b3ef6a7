"""`rayllp bench layers`: what a layer of this model costs on this device."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayllp.config import DataSettings, TrainConfig
from rayllp.data import load_data
from rayllp.errors import DataError, RayllpError, SettingsError
from rayllp.plan import Costs, LayerModel
from rayllp.plan.measure import costs_of, engine_alone
from rayllp.state import tensors

MEASURE_S = 4.0


@dataclass(frozen=True, kw_only=True)
class LayerBench:
    """A middle layer's times and bytes.

    Attributes:
        batch: sequences that it was measured with.
        parameter_bytes: of its weights alone.
        frozen_bytes: of those of them that are not trained; of the others gradients are as large again, and so is each average.
        graph_bytes: what its graph holds from forward to gradient beyond weights and the state itself.
        state_bytes: of a state: a message to the neighbour, a C-point.
    """

    batch: int
    costs: Costs
    parameter_bytes: int
    frozen_bytes: int
    graph_bytes: int
    state_bytes: int


def data_for_timing(config: TrainConfig, say: Callable[[str], None]) -> tuple[TrainConfig, Any]:
    """The settings' data set; the embedded one, with the settings changed to that, where theirs is out of reach and the family has one.

    Raises:
        DataError: there is none.
    """
    try:
        return config, load_data(config)
    except DataError as error:
        try:
            embedded = config.model_copy(update={"data": DataSettings()})
            data = load_data(embedded)
        except RayllpError:
            raise error from None
        say(f"note: layers are timed on the embedded text, whose vocabulary is smaller: {error}")
        return embedded, data


def device_here(config: TrainConfig) -> str:
    """The settings' kind of device, as far as this machine has it."""
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def bench_layers(config: TrainConfig, data: Any, device: str = "cpu") -> LayerBench:
    """Measure in this process."""
    engine = engine_alone(config, data, device)
    costs, block = costs_of(engine, message_s=0.0), engine.block
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
        batch=config.replica_batch,
        costs=costs,
        parameter_bytes=sum(p.nbytes for p in block.layers[layer].parameters()),
        frozen_bytes=sum(p.nbytes for p in block.layers[layer].parameters() if not p.requires_grad),
        graph_bytes=sum(kept.values()),
        state_bytes=sum(part.nbytes for part in tensors(state)),
    )


def layer_model(found: Sequence[LayerBench]) -> LayerModel:
    """Measurements at several batches, for the planner."""
    largest = max(found, key=lambda each: each.batch)
    return LayerModel(
        measured={each.batch: each.costs for each in found},
        parameter_bytes=largest.parameter_bytes,
        frozen_bytes=largest.frozen_bytes,
        graph_bytes=largest.graph_bytes / largest.batch,
        state_bytes=largest.state_bytes / largest.batch,
    )


def read_layers(path: Path) -> LayerBench:
    """What `rayllp bench layers --json` wrote.

    Raises:
        SettingsError: it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return LayerBench(**{**found, "costs": Costs(**found["costs"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"{path} has no layer's costs ({error}): write them with `rayllp bench layers --json {path}`") from None


def measure_layers(config: TrainConfig, data: Any, device: str = "cpu", limit_s: float = MEASURE_S) -> list[LayerBench]:
    """Layers at batches of 1, 2, 4, …, up to the config's, or until a measurement takes so long that more would be a nuisance."""
    found: list[LayerBench] = []
    batch = 1
    while batch <= config.batch_size:
        alone = {"batch_size": batch, "workers": 1, "mesh": {"data": 1}, "accumulate": 1, "microbatches": None}
        started = time.perf_counter()
        found.append(bench_layers(TrainConfig.model_validate(config.model_dump(mode="json") | alone), data, device))
        if time.perf_counter() - started > limit_s and len(found) > 1:
            break
        batch *= 2
    return found
