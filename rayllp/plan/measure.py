"""Measure on this machine how long the parts of a step take. Predictions start from these times."""

import time
from collections.abc import Callable
from statistics import median
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rayllp.channel.local import LocalChannel
from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.engine import Engine
from rayllp.engine.step_gradients import loss_and_seed
from rayllp.models import build_architecture
from rayllp.plan.costs import Costs
from rayllp.state import State, like, tensors

T = TypeVar("T")
LAYERS = 4
ROUNDS = 7


def measure_costs(config: TrainConfig, data: Batches, *, message_s: float, device: str, rounds: int = ROUNDS) -> Costs:
    """Measure a training step's parts with these settings, on one worker in this process, and return the medians of all rounds.

    Args:
        config: the settings.
        data: their data set.
        message_s: seconds of sending a state to the neighbour, which a single process cannot measure.
        device: a torch device.
        rounds: number of measurements.
    """
    return costs_of(engine_alone(config, data, device), message_s=message_s, rounds=rounds)


def engine_alone(config: TrainConfig, data: Batches, device: str) -> Engine:
    """Return one worker in this process, with a network like `config`'s but only a few middle layers: enough to time one."""
    whole = config.model_dump(mode="json")
    middle = min(LAYERS, config.middle_layers)
    whole["model"]["layers"] = middle + config.buffers.open + config.buffers.close
    whole["model"]["encoder_layers"] = None  # of an encoder–decoder: half of the few layers
    whole["windows"] = {}  # layers are called one by one, and may be too few for windows of given lengths, or for a coarse interval
    if config.solver == "mgrit":
        whole["mgrit"]["levels"] = {"forward": 1, "backward": 1}
    alone = {"workers": 1, "mesh": {"data": 1}, "batch_size": config.replica_batch, "nested": {}, "mode": "serial"}
    small = TrainConfig.model_validate(whole | alone)
    architecture = build_architecture(small, data.facts)
    channel = LocalChannel.alone()
    return Engine(architecture, small, data, channel, channel, torch.device(device))


def costs_of(engine: Engine, *, message_s: float, rounds: int = ROUNDS) -> Costs:
    """Return the costs of a training step's parts, measured on an engine that is the only worker."""
    block = engine.block
    batch = engine.step_batch(0)
    with torch.no_grad():
        parts = parts_of_step(engine, block.bind(batch).enter(batch.inputs))
    times = [[_clocked(work) for work in parts] for _ in range(1 + rounds)][1:]
    once = Parts(*(median(column) for column in zip(*times, strict=True)))
    count, owned = len(block.indices), len(block.layers)
    # `enter` and `leave` include the buffer layers, which a prediction counts as layers.
    enter = max(0.0, once.enter - once.record / count * len(block.open))
    leave = max(0.0, once.leave - (once.record + once.full_gradient) / count * len(block.close))
    return Costs(
        forward=once.forward / count, record=once.record / count, input_gradient=once.input_gradient / count,
        full_gradient=once.full_gradient / count, enter=enter, enter_gradient=enter, leave=leave,
        update=once.update / owned, message=message_s,
    )  # fmt: skip


class Parts(NamedTuple, Generic[T]):
    """One value per part of a step: a function that does it, or its seconds. The first four concern all middle layers together."""

    forward: T
    record: T
    input_gradient: T
    full_gradient: T
    enter: T
    leave: T
    update: T


def parts_of_step(engine: Engine, state: State) -> Parts[Callable[[], None]]:
    """Return functions that do the parts of a training step on this worker, to be timed in this order.

    Args:
        engine: the worker.
        state: input of every layer, used as the seed of its gradients as well.
    """
    block, layers = engine.block, list(engine.block.indices)
    batch = engine.step_batch(0)
    bound = block.bind(batch)
    recorded: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[nn.Parameter]]] = []

    def forward() -> None:
        with torch.no_grad():
            for n in layers:
                bound.layer(n, state)

    def record() -> None:
        for n in layers:
            leaves = tuple(part.detach().requires_grad_(part.is_floating_point()) for part in tensors(state))
            recorded.append((leaves, tensors(bound.layer(n, like(state, leaves))), list(block.layers[n].parameters())))

    def input_gradients() -> None:
        for leaves, outputs, _ in recorded:
            torch.autograd.grad(outputs, leaves, tensors(state), retain_graph=True, allow_unused=True)

    def full_gradients() -> None:
        while recorded:  # as in a step: from the last layer to the first, each freeing its graph
            leaves, outputs, parameters = recorded.pop()
            torch.autograd.backward(outputs, tensors(state), inputs=[*leaves, *parameters])

    def enter() -> None:
        if block.first:
            bound.enter(batch.inputs)

    def leave() -> None:
        loss_and_seed(bound, state, batch)

    def update() -> None:
        engine.optimizer.step(engine.config.optimizer.lr)
        engine.optimizer.zero_grad()

    return Parts(forward, record, input_gradients, full_gradients, enter, leave, update)


def _clocked(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
