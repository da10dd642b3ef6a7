"""What the parts of a step cost."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds.

    Attributes:
        forward: a layer's forward without a graph.
        record: a layer's forward with its graph.
        input_gradient: a layer's vector-Jacobian product.
        full_gradient: that, and the gradients of its parameters.
        enter, enter_gradient: embedding (without opening buffers).
        leave: head and loss, forward and gradient (without closing buffers).
        update: gradient norm, clipping and optimizer, a layer.
        message: a state's way to the neighbour.
        gather: every worker's state to every other; None: as many messages one after the other as the number of workers has doublings.
        total: the sum of all workers' states, on all of them; None: as long as to gather them.
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
        """Seconds of an all-gather of a state among so many workers."""
        if workers == 1:
            return 0.0
        return self.message * math.ceil(math.log2(workers)) if self.gather is None else self.gather

    def total_s(self, workers: int) -> float:
        """Seconds until all of so many workers have the sum of their states."""
        return self.gather_s(workers) if workers == 1 or self.total is None else min(self.total, self.gather_s(workers))

    @property
    def kinds(self) -> dict[str, float]:
        """By kind of a layer's work, as schedules name it."""
        names = ("forward", "record", "input_gradient", "full_gradient")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a worker has.

    Attributes:
        latency_s: of a message to the neighbour.
        bandwidth: bytes a second, to the neighbour and in an all-reduce.
        memory: bytes; None: enough.
    """

    latency_s: float = 2e-5
    bandwidth: float = 1e10
    memory: float | None = None

    def message_s(self, size: float) -> float:
        """Seconds of a message of so many bytes to the neighbour."""
        return self.latency_s + size / self.bandwidth

    def all_gather_s(self, size: float, count: int) -> float:
        """So many bytes of each of so many workers to all."""
        return 0.0 if count == 1 else (count - 1) * size / self.bandwidth + math.ceil(math.log2(count)) * self.latency_s

    def all_reduce_s(self, size: float, count: int) -> float:
        """A ring's."""
        if count == 1:
            return 0.0
        return 2 * (count - 1) / count * size / self.bandwidth + 2 * math.ceil(math.log2(count)) * self.latency_s
