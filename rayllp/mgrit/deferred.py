"""Last sweeps that a worker defers, because no other worker waits for them.

Of a forward solve's last sweep only the end of the last interval leads on: to the loss, and from there into the adjoint's coarse solve,
which reads graphs at C-points alone. So a worker defers the sweeps of its other intervals. The adjoint solve evaluates their layers
while it would wait for messages (`Communicator.receive`), and those that are left when it asks for their graphs (`DeferredSweeps.reach`).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class DeferredRun:
    """The last sweep through one run of layers, done a layer at a time.

    Attributes:
        layers: in the order in which they are evaluated.
        evaluate: takes the last sweep's step of a layer. It is called once for each layer, in order.
        done: how many layers have been evaluated.
    """

    layers: range
    evaluate: Callable[[int], None]
    done: int = 0

    def advance(self) -> bool:
        """Evaluate the next layer; False if all have been."""
        if self.done == len(self.layers):
            return False
        self.evaluate(self.layers[self.done])
        self.done += 1
        return True

    def reach(self, layer: int) -> None:
        """Evaluate the layers up to and including this one, as far as they have not been."""
        while self.done <= self.layers.index(layer):
            self.advance()


@dataclass
class DeferredSweeps:
    """All that one solve has deferred on this worker, in the order in which the adjoint's last sweep asks for it."""

    runs: deque[DeferredRun] = field(default_factory=deque)

    def add(self, run: DeferredRun) -> None:
        """Defer one more run."""
        self.runs.append(run)

    def advance(self) -> bool:
        """Evaluate one layer; False if nothing is left."""
        while self.runs:
            if self.runs[0].advance():
                return True
            self.runs.popleft()
        return False

    def reach(self, layer: int) -> None:
        """Evaluate what the layer's run has left, up to the layer; nothing if that was never deferred, or is done."""
        for run in self.runs:
            if layer in run.layers:
                run.reach(layer)
                return
