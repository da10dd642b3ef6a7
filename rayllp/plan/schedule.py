"""What each worker does in a step, in which order: the very cycle that trains, run once for each worker without layers and without others.

A worker's order of work depends on no number, so its cycle can run alone: what it is sent is a state without contents, there at once.
`Schedule.replay` then gives every piece of work its time and lets receivers wait for senders.
"""

from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rayllp.channel.base import MessageTag, StateSpec
from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.mgrit import Hierarchy, Method, Propagator, solve
from rayllp.state import State
from rayllp.timeline import Span


class Nothing(tuple[Tensor, ...]):
    """A state without tensors. Each is an object of its own, as states are."""

    __slots__ = ()


class Work(NamedTuple):
    """Something that a worker does.

    Attributes:
        kind: of its cost: forward, record, input_gradient, full_gradient, or send or receive.
        peer: to or from whom; -1 for work on a layer.
        layer: counted from the first middle layer; -1 for messages.
    """

    kind: str
    solve: str
    phase: str
    level: int
    layer: int = -1
    peer: int = -1


class _Recorder(Propagator):
    """A propagator and a channel of one worker, which write down what they are asked for."""

    def __init__(self, rank: int, size: int, solve: str, c_points: frozenset[int], done: list[Work]) -> None:
        self.rank, self.size, self._solve, self._c_points, self._done = rank, size, solve, c_points, done
        self._phase, self._level = "", 0

    def enter(self, phase: str, level: int) -> None:
        self._phase, self._level = phase, level

    def _note(self, kind: str, layer: int = -1, peer: int = -1) -> None:
        self._done.append(Work(kind, self._solve, self._phase, self._level, layer, peer))

    # As a propagator: the forward keeps a graph at C-points, which the last sweep then need not make.

    def step(self, layer: int, state: State) -> State:
        self._note("input_gradient" if self._solve == "adjoint" else "record" if layer in self._c_points else "forward", layer)
        return Nothing()

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        if self._solve == "adjoint" or known is None:
            self._note("full_gradient" if self._solve == "adjoint" else "record", layer)
        return Nothing()

    # As a channel

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        self._note("send", peer=destination)

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        self._note("receive", peer=source)
        return Nothing()

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        return tensor

    def program(self, key: Hashable | None) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Schedule:
    """Of one solve: what each worker does, in order."""

    workers: tuple[tuple[Work, ...], ...]

    def replay(self, costs: Mapping[str, float], message_s: float, clocks: list[float]) -> list[list[Span]]:
        """Spans of each worker; `clocks` are its times before, and after.

        Args:
            costs: seconds by kind of work.
            message_s: from sending to arrival; sending itself takes no time.
        """
        spans: list[list[Span]] = [[] for _ in self.workers]
        arrivals: dict[tuple[int, int], deque[float]] = defaultdict(deque)
        places = [0] * len(self.workers)
        ready = deque(range(len(self.workers)))
        waiting: dict[tuple[int, int], int] = {}
        while ready:
            rank = ready.popleft()
            work, now = self.workers[rank], clocks[rank]
            while places[rank] < len(work):
                kind, solve_, phase, level, layer, peer = work[places[rank]]
                if kind == "send":
                    arrivals[rank, peer].append(now + message_s)
                    if (rank, peer) in waiting:
                        ready.append(waiting.pop((rank, peer)))
                elif kind == "receive":
                    queue = arrivals[peer, rank]
                    if not queue:
                        waiting[peer, rank] = rank
                        break
                    there = queue.popleft()
                    if there > now:
                        spans[rank].append(Span(now, there, "wait", solve_, phase, level))
                        now = there
                else:
                    spans[rank].append(Span(now, now + costs[kind], "compute", solve_, phase, level, layer))
                    now += costs[kind]
                places[rank] += 1
            clocks[rank] = now
        stuck = [rank for rank, place in enumerate(places) if place < len(self.workers[rank])]
        assert not stuck, f"workers {stuck} wait for ever: the schedules differ"
        return spans


def schedules_of(config: TrainConfig, accuracy: Accuracy) -> tuple[Schedule, Schedule]:
    """Forward and adjoint of a layer-parallel step."""
    forward = config.hierarchy(accuracy.levels_forward)
    adjoint = config.hierarchy(accuracy.levels_backward).adjoint()
    c_points = frozenset(range(0, config.middle_layers, config.first_coarsening))
    # Where a tolerance may end the iterations early, their cap is what is predicted.
    methods = [replace(method, tolerance=None) for method in accuracy.methods(config)]
    workers = config.layer_workers
    return (
        _record(forward, methods[0], workers, "forward", c_points),
        _record(adjoint, methods[1], workers, "adjoint", c_points),
    )


@lru_cache(maxsize=1024)
def _record(hierarchy: Hierarchy, method: Method, workers: int, name: str, c_points: frozenset[int]) -> Schedule:
    spec = StateSpec((), (), torch.device("cpu"), bare=False)
    found: list[tuple[Work, ...]] = []
    for rank in range(workers):
        done: list[Work] = []
        recorder = _Recorder(rank, workers, name, c_points, done)
        first = rank == hierarchy.levels[0].owners[0]
        initial = Nothing() if first else None
        solve(
            hierarchy, method, recorder, recorder, initial=initial, spec=spec, tag=MessageTag(0, name), reduce=False, watch=recorder.enter
        )
        found.append(tuple(done))
    return Schedule(tuple(found))
