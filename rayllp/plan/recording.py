"""Find out what each worker does in a step, and in which order, by running the training code once per worker, without layers and messages.

That code is `MGRITSolver`, `WindowSolver`, `RollingSolver`, or `InOrderStep` for exact steps with layers in turn. A worker's order of work
does not depend on any values (how far a window rolls on does, and is given here), so its part can run alone: every message it receives is
an empty state that is there at once. Workers that do the same, with layers and workers counted from their own, are run once.
`Schedule.replay` then gives each piece of work its time.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, pairwise, repeat

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, Pending, StateSpec
from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.engine.in_order import InOrderStep, InOrderWork
from rayllp.engine.step_solves import StepSolves
from rayllp.mgrit import (
    Communicator,
    DeferredRun,
    DeferredSweeps,
    Hierarchy,
    Level,
    MGRITSolver,
    Problem,
    Propagator,
    SolverOptions,
    split_evenly,
)
from rayllp.mgrit.placement import Placement
from rayllp.mgrit.rolling import RollingOptions, RollingProblem, RollingSolver
from rayllp.mgrit.shares import EXCHANGE
from rayllp.mgrit.windows import WINDOW_END, WindowOptions, WindowProblem, WindowSolver
from rayllp.plan.schedule import RunWork, Schedule, Work
from rayllp.state import State

SPEC = StateSpec((), (), torch.device("cpu"), bare=False)


class Nothing(tuple[Tensor, ...]):
    """A state without tensors. Each one is a separate object, as real states are."""

    __slots__ = ()


class _Recorder(Channel):
    """The channel of one worker, which records what the worker does. All states that it returns are there at once.

    Args:
        rank, size: the worker, and the number of workers.
        first: the layer from which the worker's layers are counted.
    """

    def __init__(self, rank: int, size: int, first: int) -> None:
        self.rank, self.size, self._first = rank, size, first
        self._phase, self._level = "", 0
        self._done: list[Work] = []

    def enter(self, phase: str, level: int) -> None:
        """Begin a phase of the cycle."""
        self._phase, self._level = phase, level

    def work(self, kind: str, solve: str, layer: int) -> State:
        """Record a piece of work on a layer, and return its result."""
        self._done.append(Work(kind, solve, self._phase, self._level, layer=layer - self._first))
        return Nothing()

    def other(self, kind: str, solve: str, peer: int = 0) -> State:
        """Record a message, or what belongs to no layer, and return its result."""
        self._done.append(Work(kind, solve, self._phase, self._level, peer=peer))
        return Nothing()

    def collect(self, run: DeferredRun | None = None) -> RunWork:
        """Return the work recorded since the last call; with a deferred run, the work of that run."""
        while run is not None and run.advance():
            pass
        done, self._done = tuple(self._done), []
        return done

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self.other("send", tag.solve, (destination - self.rank) % self.size)

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        return self.other("receive", tag.solve, (source - self.rank) % self.size)

    def broadcast(self, state: State | None, spec: StateSpec, source: int, tag: MessageTag) -> State:
        return self.other("broadcast", tag.solve, source)  # one record for all workers, so that they are alike

    def begin_all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> Pending[list[State]]:
        # At a window's end states are summed. A worker with several layers of the window takes part once for each of them.
        kind = "all_gather" if tag.phase != WINDOW_END else "further_sum" if tag.level else "sum"
        if tag.phase.startswith(EXCHANGE):
            kind = "exchange"
            self.other("exchange_before", tag.solve)
            self.other("begin", tag.solve)
        return lambda: [self.other(kind, tag.solve)] * self.size

    def arrived(self, spec: StateSpec, source: int) -> bool:
        return True

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        return tensor

    def begin_all_reduce(self, tensor: Tensor, tag: MessageTag) -> Pending[Tensor]:
        raise NotImplementedError("solves sum nothing in the background")

    def begin_all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> Pending[list[Tensor]]:
        raise NotImplementedError("states without tensors are not summed in pieces")


class _RecordedLayers(Propagator):
    """The layers of a solve, whose steps are recorded.

    Args:
        recorder: records them.
        solve: forward or adjoint.
        c_points: layers whose graphs a forward solve keeps before its last sweep, which then need not evaluate them again.
    """

    def __init__(self, recorder: _Recorder, solve: str, c_points: frozenset[int] = frozenset()) -> None:
        self._recorder, self._solve, self._c_points = recorder, solve, c_points

    def step(self, layer: int, state: State) -> State:
        kind = "input_gradient" if self._solve == "adjoint" else "record" if layer in self._c_points else "forward"
        return self._recorder.work(kind, self._solve, layer)

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        if self._solve == "adjoint":
            return self._recorder.work("full_gradient", self._solve, layer)
        return self._recorder.work("record", self._solve, layer) if known is None else Nothing()

    def tentative_step(self, layer: int, state: State) -> State:
        return self._recorder.work("record" if self._solve == "forward" else "input_gradient", self._solve, layer)

    def settle(self, layer: int) -> None:
        if self._solve == "adjoint":
            self._recorder.work("settle", self._solve, layer)


class _RecordedWork(InOrderWork):
    """The work of an exact step with layers in turn, which is recorded."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def enter(self, number: int) -> State:
        return self._recorder.other("enter", "enter")

    def record(self, number: int, layer: int, state: State) -> State:
        return self._recorder.work("record", "forward", layer)

    def loss(self, number: int, state: State) -> State:
        return self._recorder.other("loss", "loss")

    def pull(self, number: int, layer: int, lam: State, *, defer: bool) -> State:
        if not defer:
            return self._recorder.work("full_gradient", "adjoint", layer)
        found = self._recorder.work("input_gradient", "adjoint", layer)
        self._recorder.work("parameter_gradient", "adjoint", layer)
        return found

    def advance(self) -> bool:
        self._recorder.other("finish", "adjoint")  # since all messages are there at once, this is called at the end alone
        return False


class _RecordedRolling(RollingSolver):
    """A rolling window that rolls on by given numbers of layers, in turn and as far as there are any."""

    strides: Iterator[int]

    def stride(self, squares: Sequence[tuple[float, ...]]) -> int:
        return min(next(self.strides), len(squares))


def schedules_of(config: TrainConfig, accuracy: Accuracy, sweeps: tuple[float, float] | None = None) -> tuple[Schedule, Schedule]:
    """Return the forward and the adjoint schedule of a step that is solved by windows or MGRIT, or exactly over blocks of layers.

    Args:
        config, accuracy: how the step is solved.
        sweeps: of a rolling window, forward and adjoint; None: as few as there can be. How many there are depends on the network.
    """
    workers = config.layer_workers
    if accuracy.tolerance is not None:
        layers, length = len(config.solved_layers), config.longest_window
        counts = (1, 1) if sweeps is None else (round(sweeps[0]), round(sweeps[1]))
        recorded = [_record_rolling(layers, workers, length, *each) for each in zip(counts, ("forward", "adjoint"), strict=True)]
        return recorded[0], recorded[1]
    if config.placement == "cyclic":
        layers, windows = len(config.solved_layers), accuracy.windows
        assert windows is not None
        forward = _record_windows(layers, workers, windows.lengths, windows.forward, "forward")
        return forward, _record_windows(layers, workers, windows.lengths, windows.backward, "adjoint")
    solves = StepSolves.of(accuracy, config)
    # If a tolerance may end the iterations early, the largest number of them is predicted.
    options = [replace(options, tolerance=None) for options in (solves.forward_options, solves.adjoint_options)]
    return (
        _record_cycles(solves.forward, options[0], workers, "forward", solves.c_points),
        _record_cycles(solves.adjoint, options[1], workers, "adjoint", solves.c_points),
    )


@lru_cache(maxsize=1024)
def _record_cycles(hierarchy: Hierarchy, options: SolverOptions, workers: int, name: str, c_points: frozenset[int]) -> Schedule:
    """Return the schedule of a solve by MGRIT."""
    fine, alike = hierarchy.levels[0], _Alike(hierarchy, c_points)
    owned = [fine.local(rank) for rank in range(workers)]
    first_layers = [fine.layers[points.start] if points else 0 for points in owned]

    def record(rank: int) -> tuple[RunWork, tuple[RunWork, ...]]:
        recorder, deferred = _Recorder(rank, workers, first_layers[rank]), DeferredSweeps()
        problem = Problem(hierarchy, _RecordedLayers(recorder, name, c_points), SPEC)
        solver = MGRITSolver(problem, options, Communicator(recorder, MessageTag(0, name)), on_phase=recorder.enter)
        solver.solve(Nothing() if rank == fine.owners[0] else None, defer_to=deferred if name == "forward" else None)
        return recorder.collect(), tuple(recorder.collect(run) for run in deferred.runs)

    return _of_all(record, first_layers, [alike.signature(rank, first) for rank, first in enumerate(first_layers)])


@lru_cache(maxsize=1024)
def _record_windows(layers: int, workers: int, windows: tuple[int, ...], sweeps: tuple[int, ...], name: str) -> Schedule:
    """Return the schedule of a solve by windows, of layers in turn."""
    placement, adjoint = Placement.cyclic(layers, workers), name == "adjoint"
    source = workers - 1 if adjoint else 0

    def record(rank: int) -> tuple[RunWork, tuple[RunWork, ...]]:
        recorder = _Recorder(rank, workers, rank)
        problem = WindowProblem(placement, windows, _RecordedLayers(recorder, name), SPEC, adjoint)
        communicator = Communicator(recorder, MessageTag(0, name))
        WindowSolver(problem, WindowOptions(sweeps=sweeps), communicator, on_phase=recorder.enter).solve(
            Nothing() if rank == source else None, source
        )
        return recorder.collect(), ()

    # Workers do the same if all their layers are in the same windows. A window of a single layer is on one worker alone.
    window_of = [number for number, window in enumerate(placement.windows(windows)) for _ in window]
    return _of_all(record, range(workers), [tuple(window_of[rank::workers]) for rank in range(workers)])


@lru_cache(maxsize=1024)
def _record_rolling(layers: int, workers: int, length: int, sweeps: int, name: str) -> Schedule:
    """Return the schedule of a solve by a rolling window, of layers in turn, with strides as equal as this number of sweeps allows.

    It takes more sweeps if the window is too short for so few.
    """
    source = workers - 1 if name == "adjoint" else 0

    def record(rank: int) -> tuple[RunWork, tuple[RunWork, ...]]:
        recorder = _Recorder(rank, workers, rank)
        problem = RollingProblem(Placement.cyclic(layers, workers), length, _RecordedLayers(recorder, name), SPEC, name == "adjoint")
        solver = _RecordedRolling(problem, RollingOptions(tolerance=1.0), Communicator(recorder, MessageTag(0, name)), recorder.enter)
        solver.strides = chain(split_evenly(layers, sweeps), repeat(length))
        solver.solve(Nothing() if rank == source else None, source)
        return recorder.collect(), ()

    return _of_all(record, range(workers), list(range(workers)))


@lru_cache(maxsize=64)
def in_order_schedule(layers: int, workers: int, microbatches: int) -> Schedule:
    """Return the schedule of an exact step with layers in turn, from embedding to the gradient at the first layer of the solve."""
    placement = Placement.cyclic(layers, workers)

    def record(rank: int) -> tuple[RunWork, tuple[RunWork, ...]]:
        recorder = _Recorder(rank, workers, rank)
        recorder.enter("microbatch", 0)
        InOrderStep(_RecordedWork(recorder), placement, recorder, SPEC, 0, microbatches).take()
        return recorder.collect(), ()

    # Workers at the ends of the network do more than the others.
    ends = {0, placement.owners[-1], workers - 1}
    signatures = [(len(placement.owners[rank::workers]), rank if rank in ends else None) for rank in range(workers)]
    return _of_all(record, range(workers), signatures)


def _of_all(
    record: Callable[[int], tuple[RunWork, tuple[RunWork, ...]]], first_layers: Sequence[int], signatures: Sequence[Hashable]
) -> Schedule:
    """Return the schedule of all workers.

    Args:
        record: returns the work of a worker, and the runs that it defers.
        first_layers: for each worker, the layer from which its work is counted.
        signatures: for each worker, a value that is equal for workers which do the same.
    """
    found: dict[Hashable, tuple[RunWork, tuple[RunWork, ...]]] = {}
    for rank, signature in enumerate(signatures):
        if signature not in found:
            found[signature] = record(rank)
    work, deferred = zip(*(found[signature] for signature in signatures), strict=True)
    return Schedule(work, tuple(first_layers), deferred)


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
