"""`rayllp bench layers`: what a layer of this model costs on this device."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
    """Times and sizes of a middle layer.

    Attributes:
        batch: number of sequences that it was measured with.
        costs: its times.
        parameter_bytes: bytes of its weights.
        frozen_bytes: bytes of those weights that are not trained. The others have a gradient, and each moving average, of their own size.
        graph_bytes: bytes that its graph keeps from forward to gradient, without weights, input and output.
        state_bytes: bytes of a state, which is the size of a message to the neighbour and of a C-point.
    """

    batch: int
    costs: Costs
    parameter_bytes: int
    frozen_bytes: int
    graph_bytes: int
    state_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file, without the costs that one layer does not have."""
        values = asdict(self)
        return values | {"costs": {name: seconds for name, seconds in values["costs"].items() if seconds is not None}}


def data_for_timing(config: TrainConfig, say: Callable[[str], None]) -> tuple[TrainConfig, Any]:
    """Return the settings and their data set. If the data cannot be loaded, the embedded data set and settings for it take their place.

    Raises:
        DataError: the data cannot be loaded, and the family has no embedded data set.
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
    """Return the kind of device that the settings ask for, or the CPU if this machine has no GPU."""
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def bench_layers(config: TrainConfig, data: Any, device: str) -> LayerBench:
    """Measure a layer of this model in this process."""
    engine = engine_alone(config, data, device)
    costs, block = costs_of(engine, message_s=0.0), engine.block
    batch = engine.step_batch(0)
    bound = block.bind(batch)
    with torch.no_grad():
        state = bound.enter(batch.inputs)
    layer = block.indices[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters.values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = tuple(part.detach().requires_grad_(part.is_floating_point()) for part in tensors(state))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = bound.layer(layer, leaves[0] if isinstance(state, Tensor) else leaves)
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


def layer_model(benches: Sequence[LayerBench]) -> LayerModel:
    """Combine measurements at several batch sizes for the planner."""
    largest = max(benches, key=lambda bench: bench.batch)
    return LayerModel(
        measured={bench.batch: bench.costs for bench in benches},
        parameter_bytes=largest.parameter_bytes,
        frozen_bytes=largest.frozen_bytes,
        graph_bytes=largest.graph_bytes / largest.batch,
        state_bytes=largest.state_bytes / largest.batch,
    )


def read_layers(path: Path) -> LayerBench:
    """Read the file that `rayllp bench layers --json` wrote.

    Raises:
        SettingsError: the file holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        costs = {name: seconds for name, seconds in values["costs"].items() if seconds is not None}
        return LayerBench(**{**values, "costs": Costs(**costs)})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(f"{path} holds no layer's costs ({error}): write them with `rayllp bench layers --json {path}`") from None


def measure_layers(config: TrainConfig, data: Any, device: str, limit_s: float = MEASURE_S) -> list[LayerBench]:
    """Measure a layer at batches of 1, 2, 4, … up to the config's; after two measurements, stop if the last took longer than `limit_s`."""
    benches: list[LayerBench] = []
    batch = 1
    while batch <= config.batch_size:
        alone = {"batch_size": batch, "workers": 1, "mesh": {"data": 1}, "accumulate": 1, "microbatches": None}
        started = time.perf_counter()
        benches.append(bench_layers(TrainConfig.model_validate(config.model_dump(mode="json") | alone), data, device))
        if time.perf_counter() - started > limit_s and len(benches) > 1:
            break
        batch *= 2
    return benches
