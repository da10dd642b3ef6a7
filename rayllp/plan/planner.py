"""Choose the data × layer mesh and settings that are fastest on some devices: layer-parallel, 1F1B pipeline, or plain data parallel.

Layer-parallel steps are predicted by running the cycle on simulated clocks (`cost.py`). The schedules of exact training are simple enough
for formulas: 1F1B's critical path is (microbatches + stages - 1) times a stage's forward and gradient; with layers in turn, a stage is a
single layer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal

from rayllp.config import TrainConfig
from rayllp.config.run import SWEEPS
from rayllp.control import Controller
from rayllp.engine.replica_sums import BUCKET_BYTES
from rayllp.errors import SettingsError
from rayllp.plan.cost import predict_step
from rayllp.plan.costs import Costs, Device

MOMENTS = {"adamw": 2, "muon": 1, "sgd": 1, "adafactor": 0}
"""Moving averages per weight, by optimizer. Neglected are AdamW's two for norms and biases beside Muon, and Adafactor's factors."""
COARSENINGS = (2, 4, 8, 16)
LEVELS = (2, 3, 4)
ITERATIONS = ((1, 1), (2, 1), (2, 2), (3, 3))

WORTH_IT = 1.05
"""How many times as fast as the best exact way an approximate one has to be, to be advised."""
SHALLOWER = 4
"""Layer-parallel training is compared with a network of this many times fewer middle layers on one device."""

NOTHING = Costs(forward=0, record=0, input_gradient=0, full_gradient=0)

Solve = tuple[int, int, int, int]
"""MGRIT: c_f, levels, forward and backward iterations. Windows: their length, 0, forward and backward sweeps."""


@dataclass(frozen=True, kw_only=True)
class LayerModel:
    """Costs of a layer as a function of the batch: a constant part, the overhead of many small operations, and one that grows.

    Attributes:
        measured: costs by the batch size at which they were measured.
        parameter_bytes: bytes of a layer's weights.
        frozen_bytes: bytes of those weights that are not trained.
        graph_bytes, state_bytes: bytes per sample of a layer's graph and of a state.
    """

    measured: Mapping[int, Costs]
    parameter_bytes: float = 0.0
    frozen_bytes: float = 0.0
    graph_bytes: float = 0.0
    state_bytes: float = 0.0

    @property
    def trained_bytes(self) -> float:
        """Bytes of a layer's weights that are trained."""
        return self.parameter_bytes - self.frozen_bytes

    def at(self, batch: float, device: Device) -> Costs:
        """Return costs at a batch size by linear interpolation, or extrapolation beyond the last; with one measurement, in proportion."""
        points = sorted(self.measured if len(self.measured) > 1 else {0, *self.measured})
        upper = next((n for n, size in enumerate(points[1:], 1) if size >= batch), len(points) - 1)
        low, high = points[upper - 1], points[upper]
        weight = max(0.0, (batch - low) / (high - low))
        below, above = (vars(self.measured.get(size, NOTHING)) for size in (low, high))
        found = {name: value + weight * max(0.0, above[name] - value) for name, value in below.items() if value is not None}
        return Costs(**found | {"message": device.message_s(batch * self.state_bytes)})


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to train, with its predicted time.

    Attributes:
        kind: layer (MGRIT or windows), pipeline (exact, over several workers), or data (data parallel alone).
        data, layer: number of replicas, and of workers in each.
        step_s: seconds per step.
        memory: bytes on the worker that needs most.
        solve: the solver's settings; None for exact ways.
        microbatches: number of microbatches, for kind pipeline.
        in_order: for kind pipeline: True if neighbouring layers are on different workers (layers in turn), False for 1F1B over blocks.
        bias: relative bias of the gradient; 0 for exact ways; None if it was not measured.
    """

    kind: Literal["layer", "pipeline", "data"]
    data: int
    layer: int
    step_s: float
    memory: float
    solve: Solve | None = None
    microbatches: int = 1
    in_order: bool = False
    bias: float | None = 0.0

    @property
    def devices(self) -> int:
        """Number of devices in use."""
        return self.data * self.layer

    def is_usable(self, device: Device, bias_limit: float) -> bool:
        """True if it fits into memory and its bias is unknown or within the limit."""
        return (device.memory is None or self.memory <= device.memory) and (self.bias is None or self.bias <= bias_limit)

    @property
    def text(self) -> str:
        """A description for the user."""
        mesh = f"{self.data} × {self.layer}"
        if self.solve is not None:
            c, levels, forward, backward = self.solve
            if not levels:
                return f"layer-parallel {mesh}, windows of {c}, {forward}+{backward} sweeps"
            return f"layer-parallel {mesh}, c_f {c}, {levels} levels, {forward}+{backward} iterations"
        if self.kind == "data":
            return f"data parallel {mesh}"
        parts = "the whole batch" if self.microbatches == 1 else f"{self.microbatches} microbatches"
        return f"exact, layers in turn {mesh}, {parts}" if self.in_order else f"1F1B pipeline {mesh}, {parts}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the planner found.

    Attributes:
        serial_s: seconds per step on one device.
        options: all ways that were predicted, fastest first.
        best: the fastest usable one (see `Option.is_usable`), or the best exact one if that is hardly slower.
        exact: the fastest exact one that fits into memory.
        advice: what to do, in sentences.
    """

    serial_s: float
    options: tuple[Option, ...]
    best: Option | None
    exact: Option | None
    advice: str


def make_plan(
    config: TrainConfig,
    model: LayerModel,
    device: Device,
    devices: int,
    *,
    biases: Mapping[Solve, float] | None = None,
    bias_limit: float = 0.2,
    solves: Sequence[Solve] | None = None,
) -> Plan:
    """Predict the ways to train on meshes of up to `devices` workers, and advise one.

    Args:
        config: the run's settings.
        model: costs and sizes of a layer.
        device: network and memory of each device.
        devices: how many there are.
        biases: measured biases of the gradient, by solve.
        bias_limit: an approximate way with a larger known bias is not advised.
        solves: which to try on each mesh. By default, windows of as many layers as workers, and those of MGRIT with c_f 2 to 16, 2 to 4
            levels and 1+1 to 3+3 iterations which the depth allows and which may be the mesh's fastest or have a known bias.

    Raises:
        SettingsError: fewer than one device.
    """
    if devices < 1:
        raise SettingsError(f"{devices} devices: give at least one")
    options: list[Option] = []
    known = biases or {}
    for replicas, layer in _meshes(config, devices):
        options += _exact(config, model, device, replicas, layer)
        if layer == 1:
            continue
        options += _layer_parallel_options(config, model, device, replicas, layer, known, bias_limit, solves)
    options.sort(key=lambda option: option.step_s)
    usable = [option for option in options if option.is_usable(device, bias_limit)]
    exact = next((option for option in usable if option.solve is None), None)
    best = next(iter(usable), None)
    if exact is not None and best is not None and exact.step_s <= WORTH_IT * best.step_s:
        best = exact
    one = model.at(config.batch_size, device)
    serial_s = _block_s(config, one, config.model.layers, first=True, last=True)
    advice = _advise(best, exact, serial_s, devices)
    if best is not None and best.devices > 1 and config.middle_layers >= SHALLOWER:
        shallow = config.model.layers - config.middle_layers + config.middle_layers // SHALLOWER
        shallow_s = _block_s(config, one, shallow, first=True, last=True)
        if shallow_s < 1.5 * best.step_s:
            advice += (
                f". A network of {shallow} layers takes {1e3 * shallow_s:.4g} ms a step on one device: if it reaches the loss you want, "
                "it is the better buy (docs/frontier.md has both on two tasks)"
            )
    return Plan(serial_s=serial_s, options=tuple(options), best=best, exact=exact, advice=advice)


def _layer_parallel_options(
    config: TrainConfig,
    model: LayerModel,
    device: Device,
    replicas: int,
    layer: int,
    known: Mapping[Solve, float],
    bias_limit: float,
    solves: Sequence[Solve] | None,
) -> list[Option]:
    """Return the layer-parallel ways on one mesh: windows, and those of MGRIT that may be the fastest or have a known bias."""
    options: list[Option] = []
    costs = model.at(config.batch_size / replicas, device)
    fastest = math.inf
    found_windows = solves if solves is not None else [(layer, 0, *sweeps) for sweeps in SWEEPS]
    for solve in (solve for solve in found_windows if not solve[1]):
        found = _layer_parallel(config, model, device, costs, replicas, layer, solve, known)
        if found is not None:
            options.append(found)
    mgrit = _solves(config.middle_layers) if solves is None else (solve for solve in solves if solve[1])
    tried = [(_at_least(config, costs, layer, solve), solve) for solve in mgrit]
    for bound, solve in sorted(tried, key=itemgetter(0)):
        if solves is None and solve not in known and bound >= fastest:
            continue  # its lower bound is already slower than the mesh's fastest
        found = _layer_parallel(config, model, device, costs, replicas, layer, solve, known)
        if found is not None:
            options.append(found)
            if found.is_usable(device, bias_limit):
                fastest = min(fastest, found.step_s)
    return options


def _weights(config: TrainConfig, model: LayerModel, replicas: int) -> float:
    """Return the bytes of a layer's weights and gradients, and of the part of its optimizer state that one worker keeps."""
    settings = config.optimizer
    moments = MOMENTS[settings.name] - (settings.name == "sgd" and not settings.momentum) + (settings.ema is not None)
    return model.parameter_bytes + (1 + (moments / replicas if settings.sharded else moments)) * model.trained_bytes


def _meshes(config: TrainConfig, devices: int) -> Iterator[tuple[int, int]]:
    """Yield meshes (replicas, workers in each): replicas divide the batch, workers are powers of two and the largest possible number."""
    for replicas in range(1, min(config.batch_size, devices) + 1):
        if config.batch_size % replicas == 0:
            most = min(devices // replicas, config.middle_layers)
            yield from ((replicas, layer) for layer in sorted({most, *(2**n for n in range(most.bit_length()))}))


def _solves(layers: int) -> Iterator[Solve]:
    """Yield the settings of MGRIT that this number of layers allows."""
    for c in COARSENINGS:
        for levels in LEVELS:
            if layers > c ** (levels - 1):
                yield from ((c, levels, *iterations) for iterations in ITERATIONS)


def _at_least(config: TrainConfig, costs: Costs, layer: int, solve: Solve) -> float:
    """Return a lower bound of a step's seconds, much cheaper to compute than a prediction.

    It adds up a coarse solve, what the last worker has left to record, a coarse solve backwards, and the gradients of the first worker's
    layers. Of further iterations it counts only a relaxation each, since the rest overlaps with the first one's coarse solve.
    """
    c, levels, forward, backward = solve
    chain = 0 if config.mgrit.coarse_step_weight == 0 else math.ceil(config.middle_layers / c ** (levels - 1)) - 1
    last, first = config.middle_layers // layer, math.ceil(config.middle_layers / layer) + config.buffers.open
    ahead = chain * costs.forward + (forward - 1) * (c - 1) * costs.forward + (last - math.ceil(last / c)) * costs.record
    back = chain * costs.input_gradient + (backward - 1) * (c - 1) * costs.input_gradient + first * costs.full_gradient
    return ahead + back


def _block_s(config: TrainConfig, costs: Costs, layers: int, *, first: bool, last: bool) -> float:
    """Return the seconds of forward, gradient and update of this many layers on one worker, with embedding (first) and head (last)."""
    seconds = layers * (costs.record + costs.full_gradient + costs.update)
    return seconds + first * (costs.enter + costs.enter_gradient) + last * costs.leave


def _replicas_s(config: TrainConfig, model: LayerModel, device: Device, layers: int, replicas: int, adjoint_s: float) -> float:
    """Return the seconds that replicas spend on summing gradients and, if optimizer state is sharded, on exchanging updated parameters.

    Args:
        config, model, device: see `make_plan`.
        layers: number of layers on the worker.
        replicas: number of replicas.
        adjoint_s: seconds of computation during which gradients become final, so that their buckets are summed in the background.
    """
    size = layers * model.trained_bytes
    last_s = device.all_reduce_s(min(size, BUCKET_BYTES), replicas)
    gather_s = device.all_gather_s(size / replicas, replicas) if config.optimizer.sharded else 0.0
    return max(last_s, device.all_reduce_s(size, replicas) - adjoint_s) + gather_s


def _exact(config: TrainConfig, model: LayerModel, device: Device, replicas: int, layer: int) -> Iterator[Option]:
    """Yield exact ways to train on one mesh: data parallel if a replica has one worker, else the best 1F1B and layers in turn."""
    batch, layers = config.batch_size // replicas, config.model.layers
    if layer == 1:
        costs = model.at(batch, device)
        step_s = _block_s(config, costs, layers, first=True, last=True)
        step_s += _replicas_s(config, model, device, layers, replicas, layers * costs.full_gradient)
        memory = layers * (_weights(config, model, replicas) + batch * model.graph_bytes)
        yield Option(kind="data", data=replicas, layer=1, step_s=step_s, memory=memory)
        return
    owned = math.ceil(layers / layer)
    found = []
    for count in (m for m in range(layer, batch + 1) if batch % m == 0):  # 1F1B needs at least as many microbatches as stages
        costs = model.at(batch / count, device)
        ends = max(costs.enter + costs.enter_gradient, costs.leave)
        stage_s = owned * (costs.record + costs.full_gradient) + ends + 2 * costs.message
        step_s = (count + layer - 1) * stage_s + owned * costs.update
        step_s += _replicas_s(config, model, device, owned, replicas, owned * costs.full_gradient)  # of the last microbatch
        memory = owned * (_weights(config, model, replicas) + min(count, layer) * batch / count * model.graph_bytes)
        found.append(Option(kind="pipeline", data=replicas, layer=layer, step_s=step_s, memory=memory, microbatches=count))
    if found:
        yield min(found, key=lambda option: option.step_s)
    if layer <= config.middle_layers:
        counts = [m for m in range(1, batch + 1) if batch % m == 0]
        yield min((_in_order(config, model, device, replicas, layer, count) for count in counts), key=lambda option: option.step_s)


def _in_order(config: TrainConfig, model: LayerModel, device: Device, replicas: int, layer: int, count: int) -> Option:
    """Return exact training on a cyclic placement. With a microbatch per worker, all are busy but for one round of single layers."""
    batch, buffers = config.batch_size // replicas, config.buffers
    costs = model.at(batch / count, device)
    middle, ends = math.ceil(config.middle_layers / layer), max(buffers.open, buffers.close)
    layer_s = costs.record + costs.full_gradient
    if count >= layer:
        busy = (middle + ends) * layer_s + max(costs.enter + costs.enter_gradient, costs.leave)
        step_s = count * busy + (layer - 1) * (layer_s + 2 * costs.message)
    else:
        there_and_back = config.middle_layers * (costs.record + costs.input_gradient + 2 * costs.message)
        serial_ends = (buffers.open + buffers.close) * layer_s + costs.enter + costs.enter_gradient + costs.leave
        # Microbatches follow each other at a layer's distance; parameter gradients, except the first layer's, are computed in waits.
        step_s = there_and_back + serial_ends + (count - 1) * layer_s + count * costs.full_gradient
    owned = middle + ends
    step_s += owned * costs.update + _replicas_s(config, model, device, owned, replicas, owned * count * costs.full_gradient)
    memory = owned * (_weights(config, model, replicas) + batch * model.graph_bytes)
    return Option(kind="pipeline", data=replicas, layer=layer, step_s=step_s, memory=memory, microbatches=count, in_order=True)


def _layer_parallel(
    config: TrainConfig,
    model: LayerModel,
    device: Device,
    costs: Costs,
    replicas: int,
    layer: int,
    solve: Solve,
    biases: Mapping[Solve, float],
) -> Option | None:
    """Return a layer-parallel way on one mesh; None if the settings do not allow it."""
    c, levels, forward, backward = solve
    cyclic = not levels
    values = config.model_dump(mode="json")
    values |= {"workers": layer, "mode": "parallel", "mesh": {"data": 1}, "batch_size": config.batch_size // replicas, "microbatches": None}
    values["adaptive"]["ladder"] = None
    values["mgrit"] |= {"window": None, "iterations": {"forward": forward, "backward": backward}}
    if cyclic:
        values["mesh"]["placement"] = "cyclic"
        values["mgrit"]["window"] = c
        values["adaptive"] |= {"consistency": None, "smoothness": 0.0}
    else:
        values["mgrit"] |= {"coarsening": c, "levels": {"forward": levels, "backward": levels}}
    try:
        found = TrainConfig.model_validate(values | {"accumulate": 1})
    except ValueError:
        return None
    ends = {0: found.buffers.open}
    ends[layer - 1] = ends.get(layer - 1, 0) + found.buffers.close
    owned = max(len(found.layers_of(rank)) + ends.get(rank, 0) for rank in range(layer))
    state_bytes = config.batch_size // replicas * model.state_bytes
    costs = replace(costs, gather=device.all_gather_s(state_bytes, layer), total=device.all_reduce_s(state_bytes, layer))
    step_s = predict_step(found, Controller(found).chosen, costs)
    step_s += _replicas_s(config, model, device, owned, replicas, owned * costs.full_gradient)
    batch = config.batch_size / replicas
    graphs = (1 if cyclic else c) if config.mgrit.recompute else owned
    memory = owned * (_weights(config, model, replicas) + batch * model.state_bytes) + batch * graphs * model.graph_bytes
    return Option(kind="layer", data=replicas, layer=layer, step_s=step_s, memory=memory, solve=solve, bias=biases.get(solve))


def _advise(best: Option | None, exact: Option | None, serial_s: float, devices: int) -> str:
    if best is None:
        return (
            "nothing fits into the devices' memory: more devices, a smaller batch, mgrit.recompute=true, or with replicas "
            "optimizer.sharded=true"
        )

    def praise(option: Option) -> str:
        return f"{option.text}, {1e3 * option.step_s:.4g} ms a step, {serial_s / option.step_s:.3g} times as fast as one device"

    if best.solve is None:
        pipeline = "layers in turn (mode=serial, mesh.placement=cyclic)" if best.in_order else "the pipeline (mode=serial)"
        way = {"pipeline": pipeline, "data": "plain data parallelism"}[best.kind]
        return f"use {way} here: {praise(best)}. It is exact, and no layer-parallel setting that is known to be accurate enough is faster"
    known = (
        "its bias was not measured: try it with probes" if best.bias is None else f"its gradient's bias was measured to be {best.bias:.2g}"
    )
    idle = f"; {devices - best.devices} devices stay free" if best.devices < devices else ""
    other = "No exact way fits" if exact is None else f"The best exact way is {praise(exact)}"
    return f"layer-parallel pays here: {praise(best)}; {known}. {other}{idle}"
