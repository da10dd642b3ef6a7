"""Work on layers that a worker defers because no other worker waits for it.

Of a forward solve's last sweep, only the end of the last interval is needed at once: it yields the loss, with which the adjoint's coarse
solve begins, and that solve reads graphs at C-points only. So a worker defers the last sweep of its other intervals. The adjoint solve
evaluates their layers while it would otherwise wait for messages (`Communicator.receive`). Layers that are left when it needs their graphs
are evaluated then (`DeferredSweeps.reach`).

An exact step on a cyclic placement defers parameter gradients in the same way, layer by layer (`engine/in_order.py`).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class DeferredRun:
    """Deferred work on consecutive layers, such as a last sweep through them, done one layer at a time.

    Attributes:
        layers: the layers in the order in which they are evaluated.
        evaluate: does the work on one layer, such as its step of the last sweep. It is called once for each layer, in order.
        done: how many of the layers have been evaluated.
    """

    layers: range
    evaluate: Callable[[int], None]
    done: int = 0

    def advance(self) -> bool:
        """Evaluate the next layer. Returns False if none is left."""
        if self.done == len(self.layers):
            return False
        self.evaluate(self.layers[self.done])
        self.done += 1
        return True

    def reach(self, layer: int) -> None:
        """Evaluate all layers up to and including `layer` that have not been evaluated yet."""
        while self.done <= self.layers.index(layer):
            self.advance()


@dataclass
class DeferredSweeps:
    """All runs that one solve has deferred on this worker, in the order in which the adjoint's last sweep asks for their graphs."""

    runs: deque[DeferredRun] = field(default_factory=deque)

    def add(self, run: DeferredRun) -> None:
        """Add a run behind the others."""
        self.runs.append(run)

    def advance(self) -> bool:
        """Evaluate one layer of the first unfinished run. Returns False if nothing is left."""
        while self.runs:
            if self.runs[0].advance():
                return True
            self.runs.popleft()
        return False

    def reach(self, layer: int) -> None:
        """Evaluate the run that contains `layer`, up to that layer. Does nothing if the layer was not deferred or is evaluated already."""
        for run in self.runs:
            if layer in run.layers:
                run.reach(layer)
                return
