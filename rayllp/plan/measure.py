"""What this machine's layers cost: the times that a prediction starts from."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from rayllp.channel.local import LocalChannel
from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.engine import Engine
from rayllp.models import build_architecture
from rayllp.plan.cost import Costs
from rayllp.state import combine, like, tensors

LAYERS = 4
ROUNDS = 7


def measure_costs(config: TrainConfig, data: Batches, *, message_s: float, device: str = "cpu", rounds: int = ROUNDS) -> Costs:
    """Costs of a training step's parts with these settings, on one worker of this process; the median of `rounds` measurements.

    Args:
        data: the settings' data set.
        message_s: seconds of a state's way to the neighbour, which one process alone cannot measure.
    """
    whole = config.model_dump(mode="json")
    middle = min(LAYERS, config.middle_layers)  # as many as tell a layer's time
    whole["model"]["layers"] = middle + config.buffers.open + config.buffers.close
    alone = {"workers": 1, "mesh": {"data": 1}, "batch_size": config.replica_batch, "nested": {}, "mode": "serial"}
    small = TrainConfig.model_validate(whole | alone | {"mgrit": {**whole["mgrit"], "coarsening": 2}})
    architecture = build_architecture(small, data.facts)  # type: ignore[attr-defined]  # a data set of ours
    channel = LocalChannel.alone()
    engine = Engine(architecture, small, data, channel, channel, torch.device(device))
    return _measure(engine, message_s, rounds)


def _measure(engine: Engine, message_s: float, rounds: int) -> Costs:
    block = engine.block
    inputs, targets, samples, terms = engine.my_batch("train", 0)
    block.begin(0, samples, inputs, training=True)
    with torch.no_grad():
        entered = block.enter(inputs)
    layers = list(block.middle)
    seed = combine(torch.ones_like, entered)
    recorded: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[nn.Parameter]]] = []

    def forward() -> None:
        with torch.no_grad():
            for n in layers:
                block.layer(n, entered)

    def record() -> None:
        for n in layers:
            leaves = tuple(part.detach().requires_grad_(part.is_floating_point()) for part in tensors(entered))
            recorded.append((leaves, tensors(block.layer(n, like(entered, leaves))), list(block.layers[n].parameters())))

    def input_gradients() -> None:
        for leaves, outputs, _ in recorded:
            torch.autograd.grad(outputs, leaves, tensors(seed), retain_graph=True, allow_unused=True)

    def full_gradients() -> None:
        while recorded:  # as in a step: the last layer first, its graph freed
            leaves, outputs, parameters = recorded.pop()
            torch.autograd.backward(outputs, tensors(seed), inputs=[*leaves, *parameters])

    def enter() -> None:
        block.enter(inputs)

    def leave() -> None:
        engine.loss_and_seed(entered, targets, 1 / max(1, terms))

    def update() -> None:
        engine.optimizer.step()
        engine.optimizer.zero_grad(set_to_none=True)

    works = (forward, record, input_gradients, full_gradients, enter, leave, update)
    times = [[_clocked(work) for work in works] for _ in range(1 + rounds)][1:]
    once = [median(column) for column in zip(*times, strict=True)]
    count, owned = len(layers), len(block.layers)
    buffers = (once[1] + once[3]) / count * len(block.close)  # `leave` went through the closing buffers
    return Costs(
        forward=once[0] / count, record=once[1] / count, input_gradient=once[2] / count, full_gradient=once[3] / count,
        enter=once[4], enter_gradient=once[4], leave=max(0.0, once[5] - buffers), update=once[6] / owned, message=message_s,
    )  # fmt: skip


def _clocked(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
