"""What the parts of a step cost on a device."""

import math
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
        gather: all-gather of the workers' states; None: log2(workers) messages one after the other, rounded up.
        total: all-reduce of the workers' states; None: as long as `gather`.
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
    gather: float | None = None
    total: float | None = None

    def gather_s(self, workers: int) -> float:
        """Return the seconds of an all-gather of a state among this many workers."""
        if workers == 1:
            return 0.0
        return self.message * math.ceil(math.log2(workers)) if self.gather is None else self.gather

    def total_s(self, workers: int) -> float:
        """Return the seconds of an all-reduce of a state among this many workers."""
        return self.gather_s(workers) if workers == 1 or self.total is None else min(self.total, self.gather_s(workers))

    @property
    def kinds(self) -> dict[str, float]:
        """Seconds by kind of work on a layer, as schedules name the kinds."""
        names = ("forward", "record", "input_gradient", "full_gradient")
        return {name: getattr(self, name) for name in names}


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
