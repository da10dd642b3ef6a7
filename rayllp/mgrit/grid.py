"""One worker's part of one level: the values at its points, and the sweeps that update them.

A level solves u_{j+1} = Φ_j(u_j) + τ_{j+1}, where τ is the FAS right-hand side (`fas.py`), zero on the finest level. A *run* is the part of
one coarse interval that a worker owns: consecutive points, of which only the first can be a C-point.
"""

from collections.abc import Callable, Sequence
from functools import partial

from rayllp.channel.base import StateSpec
from rayllp.mgrit.communicator import Communicator
from rayllp.mgrit.deferred import DeferredRun, DeferredSweeps
from rayllp.mgrit.fas import FASRightHandSide
from rayllp.mgrit.hierarchy import Level
from rayllp.mgrit.propagator import CoarseOperator, EvaluationCache
from rayllp.state import State


class Grid:
    """One worker's values and sweeps on one level.

    Args:
        level: the level's points, and which worker owns them.
        depth: the number of the level, 0 for the finest.
        cache: evaluates this worker's layers.
        operator: makes a coarse step out of a layer's fine step; not used on the finest level.
        communicator: for messages to the other workers.
        spec: shapes and dtypes of a state.
        batched: sweep whole intervals side by side, one layer of each in one call; only on the finest level.

    Attributes:
        values: u_j by point j, for the points that this worker owns.
        tau: the FAS right-hand side.
    """

    def __init__(
        self,
        level: Level,
        depth: int,
        cache: EvaluationCache,
        operator: CoarseOperator,
        communicator: Communicator,
        spec: StateSpec,
        *,
        batched: bool = False,
    ) -> None:
        self.level, self.depth = level, depth
        self.cache, self.operator = cache, operator
        self.communicator, self.spec = communicator, spec
        self.points = level.local(communicator.rank)
        self.runs = level.runs(communicator.rank)
        self.values: dict[int, State] = {}
        self.tau = FASRightHandSide()
        self.batched = batched

    # Single steps and messages ------------------------------------------------------------------------------------------------

    def apply(self, j: int, state: State) -> State:
        """Return Φ_j(state): a layer's step on the finest level, the coarse operator on all others."""
        layer = self.level.layers[j]
        if self.depth == 0:
            # A coarse level asks again only for steps from C-points, so no others are cached. In the adjoint solve the layer of a coarse
            # step is also that of its interval's last F-point: a step cached from there would evict what the coarse level still needs.
            source = self.cache if j in self.level.is_c_point else self.cache.propagator
            return source.step(layer, state)
        return self.operator(partial(self.cache.step, layer), state, self.level.ratios[j])

    def advance(self, j: int, *, last: bool = False) -> State:
        """Take step j from u_j. The owner of point j + 1 makes the result u_{j+1} by `tau.add_fine`.

        Args:
            last: this is the last sweep, in which the propagator records the layer's graph or forms its parameter gradients.
        """
        if last:
            return self.cache.last_step(self.level.layers[j], self.values[j])
        return self.tau.subtract_coarse(j, self.apply(j, self.values[j]))

    def advance_all(self, points: Sequence[int], *, last: bool = False) -> list[State]:
        """Take the steps of several points, in one call if the level is batched and none of their evaluations may be cached."""
        layers = [self.level.layers[j] for j in points]
        if not self.batched or len(points) < 2 or self.cache.may_hold(layers):
            return [self.advance(j, last=last) for j in points]
        steps = self.cache.propagator.last_steps if last else self.cache.propagator.steps
        return steps(layers, [self.values[j] for j in points])

    def send(self, state: State, j: int, phase: str) -> None:
        """Send the result of step j − 1 to the owner of point j."""
        self.communicator.send(state, self.level.owners[j], phase, self.depth)

    def receive(self, j: int, phase: str) -> State:
        """Receive the result of step j − 1 from the owner of point j − 1."""
        return self.communicator.receive(self.spec, self.level.owners[j - 1], phase, self.depth)

    # Sweeps -------------------------------------------------------------------------------------------------------------------

    def f_relax(self, *, but_last: bool = False) -> None:
        """F-relaxation: compute new values at all F-points, starting from the C-points.

        Args:
            but_last: leave out the last interval. There is no C-point after it, so nothing depends on its F-points during an iteration.
        """
        last = self.level.c_points[-1] if but_last else self.level.size
        self._sweep([run for run in self.runs if run.start < last])

    def c_relax(self) -> None:
        """C-relaxation: compute new values at all C-points, from the F-points before them."""
        self.values.update(self.arrivals("C-relaxation"))

    def arrivals(self, phase: str) -> dict[int, State]:
        """Return, for each owned C-point but point 0, the value at which the step before it arrives, τ included. Changes no u_j."""
        c_points, arrived = self.level.is_c_point, {}
        if self.points and self.points.stop in c_points:
            self.send(self.advance(self.points.stop - 1), self.points.stop, phase)
        inner = [run.start for run in self.runs[1:]]
        for point, state in zip(inner, self.advance_all([point - 1 for point in inner]), strict=True):
            arrived[point] = self.tau.add_fine(point, state)
        if self.points and self.points.start > 0 and self.points.start in c_points:
            arrived[self.points.start] = self.tau.add_fine(self.points.start, self.receive(self.points.start, phase))
        return arrived

    def solve(self, step: Callable[[int], State] | None = None, phase: str = "coarse solve") -> None:
        """Solve this level serially: all points in order, starting from point 0. Each worker waits for the one before it.

        Args:
            step: the step to take from each point, in place of this level's own.
            phase: the name of this solve in errors.
        """
        step = step or self.advance
        for j in self.points:
            if j > 0:
                state = step(j - 1) if j - 1 in self.points else self.receive(j, phase)
                self.values[j] = self.tau.add_fine(j, state)
        if self.points and self.points.stop < self.level.size:
            self.send(step(self.points.stop - 1), self.points.stop, phase)

    def last_sweep(self, defer_to: DeferredSweeps | None = None) -> State | None:
        """Do the last F-relaxation, in which the propagator records graphs (forward) or forms parameter gradients (adjoint).

        Unlike the other sweeps, it takes the last step of every interval, too. Each value is dropped once the next one is computed.

        Args:
            defer_to: collects the runs whose last step leads neither to another worker nor out of the last layer, instead of sweeping them
                now. Nothing is deferred if it is None, or if intervals are swept side by side.

        Returns: the state after the level's last step, on the worker that takes it; None elsewhere.
        """
        deferrable = [run for run in self.runs if not self._leads_on(run) and run.stop != self.level.size]
        if defer_to is None or self.whole_intervals(self.runs):
            deferrable = []
        now = [run for run in self.runs if run not in deferrable]
        output = self._sweep(now, last=True)
        for run in deferrable:
            assert defer_to is not None
            self._defer(run, defer_to)
        return output

    def _defer(self, run: range, defer_to: DeferredSweeps) -> None:
        """Defer a run's last sweep, or drop it if the propagator never needs it.

        The run's first value is received now, since messages from one worker have to be received in the order in which they were sent.
        """
        self._await_start(run, "last sweep")
        first = self.level.layers[run.start]

        def evaluate(layer: int) -> None:
            j = run.start + layer - first
            state = self.advance(j, last=True)
            if j != run[-1]:
                self._set_next(j, state, last=True)

        if self.cache.propagator.defer(first, self.values[run.start]):
            defer_to.add(DeferredRun(range(first, first + len(run)), evaluate))

    def whole_intervals(self, runs: Sequence[range]) -> list[range]:
        """Return the runs to sweep side by side: on a batched level, the longest whole intervals if there are at least two; else none."""
        return self.level.alike(runs) if self.batched else []

    def _sweep(self, runs: list[range], *, last: bool = False) -> State | None:
        """Sweep these runs. Returns the state after the level's last step, on the worker that takes it and only in the last sweep."""
        # The last run goes first: its end is what the next worker waits for. The first run, which may have to wait, goes last.
        output, whole = None, self.whole_intervals(runs)
        for run in reversed(runs):
            if run not in whole:
                state = self._sweep_run(run, last=last)
            elif run is whole[-1]:
                state = self._sweep_together(whole, last=last)
            else:
                continue
            output = state if run.stop == self.level.size else output
        return output

    def _leads_on(self, run: range) -> bool:
        """Return True if the run's interval continues on the next worker."""
        return run.stop < self.level.size and run.stop not in self.level.is_c_point

    def _await_start(self, run: range, phase: str) -> None:
        """Receive the run's first value if its interval began on the previous worker."""
        if run.start not in self.level.is_c_point:
            self.values[run.start] = self.tau.add_fine(run.start, self.receive(run.start, phase))

    def _sweep_run(self, run: range, *, last: bool) -> State | None:
        """Take the steps of one run, and send the result on if the run's interval continues on the next worker.

        Returns: the state after the run's last step, in the last sweep or if the interval continues on the next worker; otherwise None.
        """
        phase = "last sweep" if last else "relaxation"
        self._await_start(run, phase)
        for j in run[:-1]:
            self._set_next(j, self.advance(j, last=last), last=last)
        leads_on = self._leads_on(run)
        if not (leads_on or last):
            return None
        state = self.advance(run[-1], last=last)
        if leads_on:
            self.send(state, run.stop, phase)
        return state

    def _set_next(self, j: int, state: State, *, last: bool) -> None:
        """Set the value of point j + 1 from the result of step j. The last sweep drops u_j, which nothing reads again."""
        self.values[j + 1] = self.tau.add_fine(j + 1, state)
        if last:
            del self.values[j]

    def _sweep_together(self, runs: list[range], *, last: bool) -> State | None:
        """Sweep whole intervals of equal length side by side, one step of each in one call.

        Returns: the state after the last step of the last interval, in the last sweep; otherwise None.
        """
        for i in range(len(runs[0]) - 1):
            points = [run[i] for run in runs]
            for j, state in zip(points, self.advance_all(points, last=last), strict=True):
                self._set_next(j, state, last=last)
        return self.advance_all([run[-1] for run in runs], last=True)[-1] if last else None
