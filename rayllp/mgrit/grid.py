"""One worker's part of one level: the values at its points, and the sweeps that move them.

A level solves u_{j+1} = Φ_j(u_j) − offset_j + rhs_{j+1}. Offset and right-hand side together are the FAS term; they are kept apart
because the offset belongs to the worker that takes the step and the right-hand side to the one that receives it.
"""

from collections.abc import Callable, Generator, Sequence

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.mgrit.deferred import DeferredRun, DeferredSweeps
from rayllp.mgrit.hierarchy import Level
from rayllp.mgrit.propagator import CoarseOperator, EvaluationCache
from rayllp.state import State, add, subtract

Step = Callable[[int], State]
Steps = Callable[[Sequence[int]], list[State]]


class Grid:
    """Values and sweeps of one worker on one level.

    Args:
        batched: whether whole intervals are swept side by side: on the finest level, where the method says so.
    """

    def __init__(
        self,
        level: Level,
        depth: int,
        propagator: EvaluationCache,
        operator: CoarseOperator,
        channel: Channel,
        spec: StateSpec,
        tag: MessageTag,
        *,
        batched: bool = False,
    ) -> None:
        self.level, self.depth = level, depth
        self.propagator, self.operator = propagator, operator
        self.channel, self.spec, self.tag = channel, spec, tag
        self.points = level.local(channel.rank)
        self.runs = level.runs(channel.rank)
        self.values: dict[int, State] = {}
        self.offsets: dict[int, State] = {}
        self.rhs: dict[int, State] = {}
        self.batched = batched

    # One step, and one message ------------------------------------------------------------------------------------------------

    def apply(self, j: int, state: State) -> State:
        """Φ_j(state) of this level."""
        layer = self.level.layers[j]
        if self.depth == 0:
            step = self.propagator.shared_step if j in self.level.is_c_point else self.propagator.step
            return step(layer, state)
        return self.operator(lambda x: self.propagator.shared_step(layer, x), state, self.level.ratios[j])

    def advance(self, j: int) -> State:
        """Φ_j(u_j) − offset_j: what point j hands to point j + 1."""
        state = self.apply(j, self.values[j])
        return subtract(state, self.offsets[j]) if j in self.offsets else state

    def advance_all(self, points: Sequence[int]) -> list[State]:
        """`advance` of several points; those of a batched level in one call."""
        layers = [self.level.layers[j] for j in points]
        if not self.batched or len(points) < 2 or self.propagator.remembers(layers):
            return [self.advance(j) for j in points]
        return self.propagator.steps(layers, [self.values[j] for j in points])

    def last_advance(self, j: int) -> State:
        """Φ_j(u_j) in the last sweep."""
        return self.propagator.last_step(self.level.layers[j], self.values[j])

    def last_advance_all(self, points: Sequence[int]) -> list[State]:
        """The same of several points."""
        layers = [self.level.layers[j] for j in points]
        if self.propagator.remembers(layers):
            return [self.last_advance(j) for j in points]
        return self.propagator.last_steps(layers, [self.values[j] for j in points])

    def arrive(self, j: int, state: State) -> State:
        """What point j becomes when its left neighbour hands over `state`."""
        return add(state, self.rhs[j]) if j in self.rhs else state

    def send(self, state: State, j: int, phase: str) -> None:
        """Hand `state` to the owner of point j."""
        self.channel.send(state, self.level.owners[j], self.tag.at(phase, self.depth))

    def receive(self, j: int, phase: str) -> State:
        """What the owner of point j − 1 hands to point j."""
        return self.channel.receive(self.spec, self.level.owners[j - 1], self.tag.at(phase, self.depth))

    # Sweeps -------------------------------------------------------------------------------------------------------------------

    def f_relax(self, *, but_last: bool = False) -> None:
        """New values at all F-points, from the C-points.

        Args:
            but_last: leave those of the last interval: no C-point comes after them.
        """
        last = self.level.c_points[-1] if but_last else self.level.size
        runs = [run for run in self.runs if run.start < last]
        self._sweep(self.advance, self.advance_all, "relaxation", runs, to_the_end=False)

    def last_sweep(self, keep: bool = True, deferred: DeferredSweeps | None = None) -> State | None:
        """F-relaxation that records (forward) or forms gradients (adjoint); also takes every interval's last step.

        Args:
            keep: the F-points' values; else they are dropped once the next one is there.
            deferred: takes the pieces that lead neither to another worker nor out of the last layer, where whole intervals are not swept
                side by side. None: all is done now.

        Returns the state after the last step of all, on the worker that takes it.
        """
        now = self.runs
        if deferred is not None and not self.whole(self.runs):
            now = [run for run in self.runs if self._leads_on(run) or run.stop == self.level.size]
        output = self._sweep(self.last_advance, self.last_advance_all, "last sweep", now, to_the_end=True, keep=keep)
        if deferred is not None:
            for run in self.runs:
                if run not in now:
                    self._defer(run, deferred, keep)
        return output

    def _defer(self, run: range, deferred: DeferredSweeps, keep: bool) -> None:
        """Put off its last sweep, unless the propagator will never want it. Its start is received now: messages keep their order."""
        self._await_start(run, "last sweep")
        first = self.level.layers[run.start]
        if self.propagator.defer(first, self.values[run.start]):
            steps = self._through(self.last_advance, "last sweep", run, to_the_end=True, keep=keep)
            deferred.runs.append(DeferredRun(range(first, first + len(run)), steps))

    def whole(self, runs: Sequence[range]) -> list[range]:
        """Of these runs, the whole intervals of the greatest length, if there are several and the level is batched."""
        return self.level.alike(runs) if self.batched else []

    def _sweep(self, step: Step, steps: Steps, phase: str, runs: list[range], *, to_the_end: bool, keep: bool = True) -> State | None:
        # The last run goes first: its end is what the next worker waits for. The first run, which may have to wait, goes last.
        output, whole = None, self.whole(runs)
        for run in reversed(runs):
            if run not in whole:
                self._await_start(run, phase)
                state = _exhaust(self._through(step, phase, run, to_the_end=to_the_end, keep=keep))
            elif run is whole[-1]:
                state = self._sweep_together(steps, whole, to_the_end, keep)
            else:
                continue
            output = state if run.stop == self.level.size else output
        return output

    def _leads_on(self, run: range) -> bool:
        """Whether its interval goes on at the next worker."""
        return run.stop < self.level.size and run.stop not in self.level.is_c_point

    def _await_start(self, run: range, phase: str) -> None:
        """Its first point, from the worker before, where it does not begin its interval."""
        if run.start not in self.level.is_c_point:
            self.values[run.start] = self.arrive(run.start, self.receive(run.start, phase))

    def _through(self, step: Step, phase: str, run: range, *, to_the_end: bool, keep: bool) -> Generator[None, None, State | None]:
        """A step of the run at a time; returns the state after the last one, where that was asked for or the interval goes on."""
        for j in run[:-1]:
            self.values[j + 1] = self.arrive(j + 1, step(j))
            if not keep and j > run.start:
                del self.values[j]
            yield
        state, leads_on = None, self._leads_on(run)
        if leads_on or to_the_end:
            state = step(run[-1])
            if leads_on:
                self.send(state, run.stop, phase)
            yield
        return state

    def _sweep_together(self, steps: Steps, runs: list[range], to_the_end: bool, keep: bool) -> State | None:
        """Whole intervals of one length, a point of each at a time; the state after the last of them, where they go to the end."""
        length = len(runs[0])
        for i in range(length - 1):
            points = [run[i] for run in runs]
            for j, state in zip(points, steps(points), strict=True):
                self.values[j + 1] = self.arrive(j + 1, state)
                if not keep and i > 0:
                    del self.values[j]
        return steps([run[-1] for run in runs])[-1] if to_the_end else None

    def arrivals(self, phase: str) -> dict[int, State]:
        """For each owned C-point but 0: the step from the F-point before it."""
        c_points, arrived = self.level.is_c_point, {}
        if self.points and self.points.stop in c_points:
            self.send(self.advance(self.points.stop - 1), self.points.stop, phase)
        inner = [run.start for run in self.runs[1:]]
        for point, state in zip(inner, self.advance_all([point - 1 for point in inner]), strict=True):
            arrived[point] = self.arrive(point, state)
        if self.points and self.points.start > 0 and self.points.start in c_points:
            arrived[self.points.start] = self.arrive(self.points.start, self.receive(self.points.start, phase))
        return arrived

    def c_relax(self) -> None:
        """New values at all C-points, from the F-points before them."""
        self.values.update(self.arrivals("C-relaxation"))

    def solve(self, step: Step | None = None, phase: str = "coarse solve") -> None:
        """All points in order, from point 0: the serial coarsest solve."""
        step = step or self.advance
        for j in self.points:
            if j > 0:
                state = step(j - 1) if j - 1 in self.points else self.receive(j, phase)
                self.values[j] = self.arrive(j, state)
        if self.points and self.points.stop < self.level.size:
            self.send(step(self.points.stop - 1), self.points.stop, phase)


def _exhaust(steps: Generator[None, None, State | None]) -> State | None:
    """Take them all; what they return."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: State | None = end.value
            return found
