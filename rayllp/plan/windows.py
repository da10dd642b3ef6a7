"""Steps on a cyclic placement on simulated clocks: by windows, and exact steps with layers in turn.

Workers of a window solve meet in an all-gather after every sweep, so their clocks are equal. In an exact step, microbatches wait for each
other as in `engine/in_order.py`.
"""

from collections.abc import Sequence

from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.mgrit.windows import Placement
from rayllp.plan.costs import Costs
from rayllp.timeline import Span


class Clocks:
    """Each worker's simulated time, and what it did when.

    Args:
        workers: number of workers.
        spans: for each worker, a list to which its spans are appended; None: they are not needed.
    """

    def __init__(self, workers: int, spans: Sequence[list[Span]] | None) -> None:
        self.now = [0.0] * workers
        self._spans = spans

    def spend(self, rank: int, seconds: float, solve: str, phase: str = "", kind: str = "compute", layer: int | None = None) -> None:
        """Let a worker be busy, or wait, for some seconds."""
        if self._spans is not None and seconds:
            self._spans[rank].append(Span(self.now[rank], self.now[rank] + seconds, kind, solve, phase, 0, layer))
        self.now[rank] += seconds

    def wait_until(self, rank: int, moment: float, solve: str) -> None:
        """Let a worker wait until a message arrives, if it has not yet."""
        self.spend(rank, max(0.0, moment - self.now[rank]), solve, kind="wait")

    def meet(self, message: float, solve: str) -> None:
        """Let all workers wait for each other and for a message of `message` seconds."""
        together = max(self.now) + (message if len(self.now) > 1 else 0.0)
        for rank in range(len(self.now)):
            self.wait_until(rank, together, solve)


def window_step(config: TrainConfig, accuracy: Accuracy, costs: Costs, clocks: Clocks) -> None:
    """Run a step by windows on the clocks, without the update."""
    workers = config.layer_workers
    placement = Placement.cyclic(config.middle_layers, workers)
    windows = placement.windows(accuracy.windows)
    all_gather_s, all_reduce_s = costs.all_gather_s(workers), costs.all_reduce_s(workers)
    deferred = [0] * workers
    arrival = 0.0  # when the state after a chain of windows of one layer has reached the next worker

    def sweep(window: range, sweeps: int, inner_s: float, final_s: float, solve: str) -> None:
        """Run the sweeps of one window: each layer takes `inner_s` in all sweeps but the last, in which it takes `final_s`."""
        nonlocal arrival
        if len(window) == 1:
            layer, owner = window[0], placement.owners[window[0]]
            defers = solve == "adjoint" and workers > 1 and layer > 0
            deferred[owner] += defers
            clocks.wait_until(owner, arrival, solve)
            clocks.spend(owner, inner_s if defers else final_s, solve, "last sweep", layer=layer)
            arrival = clocks.now[owner] + (costs.message if workers > 1 else 0.0)
            return
        for rank in range(workers):
            clocks.wait_until(rank, arrival, solve)
        count = min(sweeps, len(window))
        for number in range(1, count + 1):
            is_last = number == count
            for layer in window:
                phase = "last sweep" if is_last else "relaxation"
                clocks.spend(placement.owners[layer], final_s if is_last else inner_s, solve, phase, layer=layer)
            clocks.meet(all_reduce_s if is_last else all_gather_s, solve)

    clocks.spend(0, costs.enter + config.buffers.open * costs.record, "enter")
    clocks.meet(costs.message, "forward")
    for window in windows:
        sweep(window, accuracy.iterations_forward, costs.forward, costs.record, "forward")
    clocks.wait_until(workers - 1, arrival, "forward")
    clocks.spend(workers - 1, config.buffers.close * (costs.record + costs.full_gradient) + costs.leave, "loss")
    clocks.meet(costs.message, "adjoint")
    for window in reversed(windows):
        sweep(window, accuracy.iterations_backward, costs.input_gradient, costs.full_gradient, "adjoint")
    clocks.spend(0, config.buffers.open * costs.full_gradient + costs.enter_gradient, "enter")
    for rank, count in enumerate(deferred):
        clocks.spend(rank, count * costs.full_gradient, "adjoint", "last sweep")


def in_order_step(config: TrainConfig, microbatches: int, costs: Costs, clocks: Clocks) -> None:
    """Run an exact step with layers in turn on the clocks, without the update.

    Args:
        config: the settings.
        microbatches: number of microbatches.
        costs: costs of one microbatch.
        clocks: the workers' clocks.
    """
    workers, layers = config.layer_workers, config.middle_layers
    owners = Placement.cyclic(layers, workers).owners
    left_at = [0.0] * microbatches  # when each microbatch's state has left the previous layer
    for number in range(microbatches):
        clocks.spend(0, costs.enter + config.buffers.open * costs.record, "enter")
        left_at[number] = clocks.now[0]

    def arrival(number: int, source: int, rank: int) -> float:
        """Return when a microbatch's state arrives at a worker."""
        return left_at[number] + (costs.message if source != rank else 0.0)

    for layer in range(layers):
        rank, source = owners[layer], owners[layer - 1] if layer else 0
        for number in range(microbatches):
            clocks.wait_until(rank, arrival(number, source, rank), "forward")
            clocks.spend(rank, costs.record, "forward", "microbatch", layer=layer)
            left_at[number] = clocks.now[rank]
    for number in range(microbatches):
        clocks.wait_until(workers - 1, arrival(number, owners[-1], workers - 1), "loss")
        clocks.spend(workers - 1, config.buffers.close * (costs.record + costs.full_gradient) + costs.leave, "loss")
        left_at[number] = clocks.now[workers - 1]
    defers, deferred = microbatches < workers, [0] * workers
    for layer in reversed(range(layers)):
        rank, source = owners[layer], owners[layer + 1] if layer + 1 < layers else workers - 1
        for number in range(microbatches):
            arrives_at = arrival(number, source, rank)
            while deferred[rank] and clocks.now[rank] < arrives_at:  # while waiting, compute parameter gradients, for which no worker waits
                deferred[rank] -= 1
                clocks.spend(rank, costs.full_gradient, "adjoint", "microbatch")
            clocks.wait_until(rank, arrives_at, "adjoint")
            clocks.spend(rank, costs.input_gradient if defers else costs.full_gradient, "adjoint", "microbatch", layer=layer)
            deferred[rank] += defers
            left_at[number] = clocks.now[rank]
    for rank, count in enumerate(deferred):
        clocks.spend(rank, count * costs.full_gradient, "adjoint", "microbatch")
    for _ in range(microbatches):
        clocks.spend(0, config.buffers.open * costs.full_gradient + costs.enter_gradient, "enter")
