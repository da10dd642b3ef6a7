"""Costs of the parts of a training step on a device, as measured or assumed; predictions are made from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of the parts of a step, in seconds.

    Attributes:
        forward: a layer's forward without an autograd graph.
        record: a layer's forward with its graph.
        input_gradient: a layer's vector-Jacobian product.
        full_gradient: the same, with the gradients of the layer's parameters.
        enter, enter_gradient: embedding, forward and gradient (without opening buffers).
        leave: head and loss, forward and gradient (without closing buffers).
        update: gradient norm, clipping and optimizer step of one layer.
        message: sending a state to the neighbour.
        all_gather: all-gather of the workers' states; None: log2(workers) messages one after the other, rounded up.
        all_reduce: all-reduce of the workers' states; None: as long as `all_gather`.
        few_numbers: all-gather of a few numbers of each worker.
        in_pieces: whether workers do the arithmetic of sweeps in pieces (`rayllp/mgrit/shares.py`); None: where that is faster.
    """

    forward: float
    record: float
    input_gradient: float
    full_gradient: float
    enter: float = 0.0
    enter_gradient: float = 0.0
    leave: float = 0.0
    update: float = 0.0
    message: float = 0.0
    all_gather: float | None = None
    all_reduce: float | None = None
    few_numbers: float = 0.0
    in_pieces: bool | None = None

    def all_gather_s(self, workers: int) -> float:
        """Return the seconds of an all-gather of a state among this many workers."""
        if workers == 1:
            return 0.0
        return self.message * math.ceil(math.log2(workers)) if self.all_gather is None else self.all_gather

    def kinds(self, workers: int, open_layers: int = 0, close_layers: int = 0) -> dict[str, float]:
        """Return the seconds by kind of work or message, as schedules name the kinds.

        Buffer layers count where the embedding and the head do. A deferred gradient of a layer's parameters alone takes as long as they add
        to the input's gradient (`rayllp/engine/deferred_gradients.py`).

        At a window's end states are summed by an all-gather or in pieces: an all-to-all and an all-gather of pieces, which together take
        as long as an all-reduce. A further state of each worker adds one more all-to-all, half of an all-reduce. A sweep of a rolling
        window takes an all-gather, or two all-to-alls of a state with an all-gather of a few numbers between them. While the all-gather of
        states or the second all-to-all is under way, workers form gradients of parameters.

        Args:
            workers: number of workers.
            open_layers, close_layers: numbers of buffer layers at the beginning and at the end.
        """
        all_gather = self.all_gather_s(workers)
        all_reduce = math.inf if self.all_reduce is None else self.all_reduce
        in_pieces = all_gather > all_reduce + self.few_numbers if self.in_pieces is None else self.in_pieces
        parameters = max(0.0, self.full_gradient - self.input_gradient)
        return {
            "forward": self.forward,
            "record": self.record,
            "input_gradient": self.input_gradient,
            "full_gradient": self.full_gradient,
            "parameter_gradient": parameters,
            "settle": parameters,
            "enter": self.enter + open_layers * self.record,
            "enter_gradient": open_layers * self.full_gradient + self.enter_gradient,
            "loss": close_layers * (self.record + self.full_gradient) + self.leave,
            "message": self.message,
            "all_gather": all_gather,
            "sum": all_reduce if in_pieces else all_gather,
            "further_sum": all_reduce / 2 if in_pieces else all_gather,
            "exchange_before": all_reduce / 2 + self.few_numbers if in_pieces else 0.0,
            "exchange": all_reduce / 2 if in_pieces else all_gather,
        }


FREE = Costs(forward=0, record=0, input_gradient=0, full_gradient=0)
"""The costs of an empty batch, from which a single measurement is scaled in proportion."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Network and memory of one worker's device.

    Attributes:
        latency_s: latency of a message to the neighbour, in seconds.
        bandwidth: bytes per second, to the neighbour and in an all-reduce.
        memory: bytes; None: unlimited.
    """

    latency_s: float = 2e-5
    bandwidth: float = 1e10
    memory: float | None = None

    def message_s(self, size: float) -> float:
        """Return the seconds of a message of `size` bytes to the neighbour."""
        return self.latency_s + size / self.bandwidth

    def all_gather_s(self, size: float, count: int) -> float:
        """Return the seconds of an all-gather among `count` workers of `size` bytes from each."""
        return 0.0 if count == 1 else (count - 1) * size / self.bandwidth + math.ceil(math.log2(count)) * self.latency_s

    def all_reduce_s(self, size: float, count: int) -> float:
        """Return the seconds of a ring all-reduce of `size` bytes among `count` workers."""
        if count == 1:
            return 0.0
        return 2 * (count - 1) / count * size / self.bandwidth + 2 * math.ceil(math.log2(count)) * self.latency_s


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
        """Return costs at a batch size by linear interpolation, or extrapolation beyond the last; of one measurement, in proportion."""
        points = sorted(self.measured if len(self.measured) > 1 else {0, *self.measured})
        upper = next((n for n, size in enumerate(points[1:], 1) if size >= batch), len(points) - 1)
        low, high = points[upper - 1], points[upper]
        weight = max(0.0, (batch - low) / (high - low))
        below, above = (vars(self.measured.get(size, FREE)) for size in (low, high))
        seconds = {name: value + weight * max(0.0, above[name] - value) for name, value in below.items() if value is not None}
        return Costs(**seconds | {"message": device.message_s(batch * self.state_bytes)})
