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
    placement, last = Placement.cyclic(config.middle_layers, config.layer_workers), config.layer_workers - 1
    windows, meetings = placement.windows(accuracy.window), (costs.gather_s(config.layer_workers), costs.total_s(config.layer_workers))
    clocks.spend(0, costs.enter + config.buffers.open * costs.record, "enter")
    clocks.meet(costs.message, "forward")
    for window in windows:
        _sweeps(placement, window, accuracy.iterations_forward, costs.forward, costs.record, meetings, "forward", clocks)
    clocks.spend(last, config.buffers.close * (costs.record + costs.full_gradient) + costs.leave, "loss")
    clocks.meet(costs.message, "adjoint")
    for window in reversed(windows):
        gradients = costs.input_gradient, costs.full_gradient
        _sweeps(placement, window, accuracy.iterations_backward, *gradients, meetings, "adjoint", clocks)
    clocks.spend(0, config.buffers.open * costs.full_gradient + costs.enter_gradient, "enter")


def _sweeps(
    placement: Placement, window: range, sweeps: int, inner: float, final: float, meetings: tuple[float, float], solve: str, clocks: Clocks
) -> None:
    """Run the sweeps of one window: each layer costs `inner` in all sweeps but the last, which costs `final`."""
    for sweep in range(min(sweeps, len(window))):
        is_last = sweep == min(sweeps, len(window)) - 1
        for layer in window:
            phase = "last sweep" if is_last else "relaxation"
            clocks.spend(placement.owners[layer], final if is_last else inner, solve, phase, layer=layer)
        clocks.meet(meetings[is_last], solve)


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
    there = [0.0] * microbatches  # when each microbatch's state leaves the previous layer
    for number in range(microbatches):
        clocks.spend(0, costs.enter + config.buffers.open * costs.record, "enter")
        there[number] = clocks.now[0]

    def arrive(rank: int, number: int, source: int, solve: str) -> None:
        clocks.wait_until(rank, there[number] + (costs.message if source != rank else 0.0), solve)

    for layer in range(layers):
        rank, source = owners[layer], owners[layer - 1] if layer else 0
        for number in range(microbatches):
            arrive(rank, number, source, "forward")
            clocks.spend(rank, costs.record, "forward", "microbatch", layer=layer)
            there[number] = clocks.now[rank]
    for number in range(microbatches):
        arrive(workers - 1, number, owners[-1], "loss")
        clocks.spend(workers - 1, config.buffers.close * (costs.record + costs.full_gradient) + costs.leave, "loss")
        there[number] = clocks.now[workers - 1]
    waits, left = microbatches < workers, [0] * workers
    for layer in reversed(range(layers)):
        rank, source = owners[layer], owners[layer + 1] if layer + 1 < layers else workers - 1
        for number in range(microbatches):
            due = there[number] + (costs.message if source != rank else 0.0)
            while left[rank] and clocks.now[rank] < due:  # while waiting, compute parameter gradients, for which no worker waits
                left[rank] -= 1
                clocks.spend(rank, costs.full_gradient, "adjoint", "microbatch")
            clocks.wait_until(rank, due, "adjoint")
            clocks.spend(rank, costs.input_gradient if waits else costs.full_gradient, "adjoint", "microbatch", layer=layer)
            left[rank] += waits
            there[number] = clocks.now[rank]
    for rank, count in enumerate(left):
        clocks.spend(rank, count * costs.full_gradient, "adjoint", "microbatch")
    for _ in range(microbatches):
        clocks.spend(0, config.buffers.open * costs.full_gradient + costs.enter_gradient, "enter")
