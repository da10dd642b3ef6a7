"""Find out what each worker does in a step, in which order, by running the actual solver once per worker, without layers and messages.

A worker's order of work does not depend on any values, so its solver can run alone: every message it receives is an empty state that is
there at once. Workers whose parts of the hierarchy look alike do the same, so that only one of them is run. `Schedule.replay` then gives
each piece of work its time and lets receivers wait for senders. Work that the forward solve defers is replayed during the adjoint solve,
while a worker waits.
"""

from collections import defaultdict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, Reduction, StateSpec
from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.engine.step_solves import StepSolves
from rayllp.mgrit import Communicator, DeferredRun, DeferredSweeps, Hierarchy, Level, MGRITSolver, Problem, Propagator, SolverOptions
from rayllp.state import State
from rayllp.timeline import Span


class Nothing(tuple[Tensor, ...]):
    """A state without tensors. Each one is a separate object, as real states are."""

    __slots__ = ()


class Work(NamedTuple):
    """A piece of work of one worker.

    Attributes:
        kind: forward, record, input_gradient or full_gradient (see `Costs`), or send or receive.
        solve: forward or adjoint.
        phase, level: of the cycle, as in `Span`.
        layer: the layer, counted from the worker's first one in the order of the solve; 0 for messages.
        peer: sender or receiver, counted from the worker itself; 0 for work on a layer.
    """

    kind: str
    solve: str
    phase: str
    level: int
    layer: int = 0
    peer: int = 0


class _Recorder(Propagator, Channel):
    """The propagator and the channel of one worker, which record what the solver asks of them."""

    def __init__(self, rank: int, size: int, first: int, solve: str, c_points: frozenset[int]) -> None:
        self.rank, self.size, self._first, self._solve, self._c_points = rank, size, first, solve, c_points
        self._phase, self._level = "", 0
        self.done: list[Work] = []

    def enter(self, phase: str, level: int) -> None:
        self._phase, self._level = phase, level

    def _work(self, kind: str, layer: int) -> None:
        self.done.append(Work(kind, self._solve, self._phase, self._level, layer=layer - self._first))

    def _message(self, kind: str, peer: int) -> None:
        self.done.append(Work(kind, self._solve, self._phase, self._level, peer=peer - self.rank))

    def collect(self, run: DeferredRun | None = None) -> tuple[Work, ...]:
        """Return the work recorded since the last call; with a deferred run, the work of that run."""
        while run is not None and run.advance():
            pass
        done, self.done = tuple(self.done), []
        return done

    # As a propagator. The forward solve keeps the graph of C-points, so the last sweep need not evaluate them again.

    def step(self, layer: int, state: State) -> State:
        self._work("input_gradient" if self._solve == "adjoint" else "record" if layer in self._c_points else "forward", layer)
        return Nothing()

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        if self._solve == "adjoint" or known is None:
            self._work("full_gradient" if self._solve == "adjoint" else "record", layer)
        return Nothing()

    # As a channel

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self._message("send", destination)

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        self._message("receive", source)
        return Nothing()

    def arrived(self, spec: StateSpec, source: int) -> bool:
        return True

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        return tensor

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> Reduction:
        raise NotImplementedError("solves sum nothing in the background")

    def all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> list[State]:
        raise NotImplementedError("MGRIT on blocks gathers nothing")

    def all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> list[Tensor]:
        raise NotImplementedError("MGRIT on blocks gathers nothing")


def _spend(work: Work, first: int, costs: Mapping[str, float], now: float, spans: list[Span] | None) -> float:
    """Return the time when a piece of work on a layer is finished, and record its span."""
    then = now + costs[work.kind]
    if spans is not None:
        spans.append(Span(now, then, "compute", work.solve, work.phase, work.level, first + work.layer))
    return then


RunWork = tuple[Work, ...]
"""The work of one run of layers, in order."""


class DeferredWork:
    """The work that a worker has deferred: the last sweep of some runs of its forward solve, with layers counted from `first`."""

    def __init__(self, runs: Sequence[RunWork], first: int) -> None:
        self.first = first
        self._runs = deque(deque(run) for run in runs)

    def pop(self) -> Work | None:
        """Remove and return the work of the next layer; None if nothing is left."""
        while self._runs:
            if self._runs[0]:
                return self._runs[0].popleft()
            self._runs.popleft()
        return None

    def pop_until(self, layer: int) -> list[Work]:
        """Remove and return what is left of the run that contains this layer, up to the layer."""
        while self._runs and not self._runs[0]:
            self._runs.popleft()
        for run in self._runs:
            if run and run[0].layer <= layer - self.first <= run[-1].layer:
                count = sum(work.layer <= layer - self.first for work in run)
                return [run.popleft() for _ in range(count)]
        return []


@dataclass(frozen=True)
class Schedule:
    """The schedule of one solve.

    Attributes:
        workers: each worker's work in order.
        first_layers: for each worker, the layer from which its work is counted.
        deferred: the work that each worker defers, by runs.
    """

    workers: tuple[tuple[Work, ...], ...]
    first_layers: tuple[int, ...]
    deferred: tuple[tuple[RunWork, ...], ...]

    def deferred_work(self) -> list[DeferredWork]:
        """Return the work that each worker has deferred at the end of this solve."""
        return [DeferredWork(runs, first) for runs, first in zip(self.deferred, self.first_layers, strict=True)]

    def replay(
        self,
        costs: Mapping[str, float],
        message_s: float,
        clocks: list[float],
        spans: Sequence[list[Span]] | None = None,
        deferred: Sequence[DeferredWork] | None = None,
    ) -> None:
        """Run the schedule on simulated clocks, advancing `clocks` in place.

        Args:
            costs: seconds by kind of work.
            message_s: seconds from sending to arrival; sending itself takes no time.
            clocks: each worker's time.
            spans: for each worker, a list to which its spans are appended; None: they are not needed.
            deferred: the work deferred by an earlier solve; it is done while a message is awaited, or when a layer's graph is needed.
        """
        arrivals: dict[tuple[int, int], deque[float]] = defaultdict(deque)
        positions = [0] * len(self.workers)
        ready = deque(range(len(self.workers)))
        waiting: dict[tuple[int, int], int] = {}
        while ready:
            rank = ready.popleft()
            work, position, now = self.workers[rank], positions[rank], clocks[rank]
            own_spans, first = None if spans is None else spans[rank], self.first_layers[rank]
            own_deferred = None if deferred is None else deferred[rank]
            while position < len(work):
                kind, solve, phase, level, layer, peer = work[position]
                if kind == "send":
                    link = rank, rank + peer
                    arrivals[link].append(now + message_s)
                    if link in waiting:
                        ready.append(waiting.pop(link))
                elif kind == "receive":
                    link = rank + peer, rank
                    queue = arrivals[link]
                    if not queue:
                        waiting[link] = rank
                        break
                    arrival = queue.popleft()
                    while arrival > now and own_deferred is not None and (deferred_work := own_deferred.pop()) is not None:
                        now = _spend(deferred_work, own_deferred.first, costs, now, own_spans)
                    if arrival > now:
                        if own_spans is not None:
                            own_spans.append(Span(now, arrival, "wait", solve, phase, level))
                        now = arrival
                else:
                    if own_deferred is not None:
                        for deferred_work in own_deferred.pop_until(first + layer):
                            now = _spend(deferred_work, own_deferred.first, costs, now, own_spans)
                    now = _spend(work[position], first, costs, now, own_spans)
                position += 1
            positions[rank], clocks[rank] = position, now
        stuck = [rank for rank, position in enumerate(positions) if position < len(self.workers[rank])]
        assert not stuck, f"workers {stuck} wait for ever: the schedules differ"


def schedules_of(config: TrainConfig, accuracy: Accuracy) -> tuple[Schedule, Schedule]:
    """Return the forward and the adjoint schedule of a layer-parallel step."""
    solves, workers = StepSolves.of(accuracy, config), config.layer_workers
    # If a tolerance may end the iterations early, the largest number of them is predicted.
    forward, adjoint = (replace(options, tolerance=None) for options in (solves.forward_options, solves.adjoint_options))
    return (
        _record(solves.forward, forward, workers, "forward", solves.c_points),
        _record(solves.adjoint, adjoint, workers, "adjoint", solves.c_points),
    )


@lru_cache(maxsize=1024)
def _record(hierarchy: Hierarchy, options: SolverOptions, workers: int, name: str, c_points: frozenset[int]) -> Schedule:
    """Run the solver once for each kind of worker and return the schedule of all workers."""
    spec = StateSpec((), (), torch.device("cpu"), bare=False)
    fine, alike = hierarchy.levels[0], _Alike(hierarchy, c_points)
    by_worker: list[tuple[RunWork, tuple[RunWork, ...]]] = []
    first_layers: list[int] = []
    by_signature: dict[Hashable, tuple[RunWork, tuple[RunWork, ...]]] = {}
    for rank in range(workers):
        owned = fine.local(rank)
        first_layers.append(fine.layers[owned.start] if owned else 0)
        signature = alike.signature(rank, first_layers[-1])
        if signature not in by_signature:
            recorder, deferred = _Recorder(rank, workers, first_layers[-1], name, c_points), DeferredSweeps()
            initial = Nothing() if rank == fine.owners[0] else None
            solver = MGRITSolver(
                Problem(hierarchy, recorder, spec), options, Communicator(recorder, MessageTag(0, name)), on_phase=recorder.enter
            )
            solver.solve(initial, defer_to=deferred if name == "forward" else None)
            by_signature[signature] = recorder.collect(), tuple(recorder.collect(run) for run in deferred.runs)
        by_worker.append(by_signature[signature])
    work, deferred_work = zip(*by_worker, strict=True)
    return Schedule(work, tuple(first_layers), deferred_work)


class _Alike:
    """Tells which workers do the same, by all that a worker's cycle reads of a hierarchy, with layers and workers counted from its own."""

    def __init__(self, hierarchy: Hierarchy, c_points: frozenset[int]) -> None:
        self._hierarchy, self._c_points = hierarchy, c_points
        first = [level.owners[0] for level in hierarchy.levels]
        self._initial = list(pairwise(first))  # sender and receiver of the initial state, from level to level

    def signature(self, rank: int, first: int) -> Hashable:
        """Return a value that is equal for workers which do the same."""
        levels = [self._level(level, rank, first) for level in self._hierarchy.levels]
        moves = [
            tuple(
                (fine.layers[move.point] - first, coarse.layers[move.coarse] - first, move.owner - rank, move.coarse_owner - rank)
                for move in transfers.get(rank, ())
            )
            for transfers, fine, coarse in zip(self._hierarchy.transfers, self._hierarchy.levels, self._hierarchy.levels[1:], strict=False)
        ]
        initial = [(a - rank, b - rank) if rank in (a, b) else None for a, b in self._initial]
        return tuple(levels), tuple(moves), tuple(initial)

    def _level(self, level: Level, rank: int, first: int) -> Hashable:
        """Return all that a worker's cycle reads of one level; None if it has no points there."""
        points = level.local(rank)
        if not points:
            return None
        start, stop, last = points.start, points.stop, level.c_points[-1]
        layers = level.layers[start:stop]
        return (
            start == 0,
            stop == level.size,
            start in level.is_c_point,
            stop in level.is_c_point,
            tuple((len(run), run.start < last) for run in level.runs(rank)),
            tuple((layer - first, layer in self._c_points) for layer in layers),
            level.ratios[start:stop],
            level.owners[start - 1] - rank if start else None,
            level.owners[stop] - rank if stop < level.size else None,
        )
