"""Schedules: what each worker does in a step, in which order; and their replay on simulated clocks.

In a replay each piece of work takes its time, and receivers wait for senders. Deferred work is done as in training: while a worker waits.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rayllp.timeline import Span

ENDS = ("enter", "loss")
"""Kinds of work at the ends of the network, which belong to no layer of the solve."""
MEETINGS = ("all_gather", "sum", "further_sum", "exchange_before", "exchange")
"""Kinds of messages in which all workers take part at once. Those of `exchange` may be under way since `begin`."""


class Work(NamedTuple):
    """A piece of work of one worker.

    Attributes:
        kind: a part of a step (see `Costs.kinds`), where parameter_gradient means that this work is deferred, and settle the same work done
            now; or a message: send, receive, broadcast, one of `MEETINGS`, or begin, with which the next of these begins; or finish, which
            does all deferred work.
        solve: forward or adjoint; enter or loss for these two parts.
        phase, level: of the cycle, as in `Span`.
        layer: the layer, counted from the worker's first one; 0 for messages and for the ends of the network.
        peer: rank of sender or receiver, minus the worker's own, modulo the number of workers; for a broadcast, the rank of its source.
    """

    kind: str
    solve: str
    phase: str
    level: int
    layer: int = 0
    peer: int = 0


RunWork = tuple[Work, ...]
"""The work of one run of layers, in order."""


class Clocks:
    """Each worker's simulated time, and what it did when.

    Args:
        workers: number of workers.
        spans: for each worker, a list to which its spans are appended; None: they are not needed.

    Attributes:
        now: each worker's time.
    """

    def __init__(self, workers: int, spans: Sequence[list[Span]] | None = None) -> None:
        self.now = [0.0] * workers
        self._spans = spans

    def spend(self, rank: int, seconds: float, solve: str, phase: str = "", level: int = 0, layer: int | None = None) -> None:
        """Let a worker be busy for some seconds."""
        begin = self.now[rank]
        end = self.now[rank] = begin + seconds
        if self._spans is not None and seconds:
            self._spans[rank].append(Span(begin, end, "compute", solve, phase, level, layer))

    def wait_until(self, rank: int, moment: float, solve: str, phase: str = "", level: int = 0) -> None:
        """Let a worker wait until this moment, unless it has passed."""
        begin = self.now[rank]
        if moment > begin:
            self.now[rank] = moment
            if self._spans is not None:
                self._spans[rank].append(Span(begin, moment, "wait", solve, phase, level))

    def meet(self, solve: str) -> None:
        """Let all workers wait for the last one."""
        together = max(self.now)
        for rank in range(len(self.now)):
            self.wait_until(rank, together, solve)


class DeferredWork:
    """The work that a worker has deferred, with layers counted from `first`.

    Attributes:
        runs: the last sweep of some runs of its forward solve, whose graphs the adjoint needs.
        gradients: gradients of parameters, for which nobody waits.
    """

    def __init__(self, runs: Sequence[RunWork], first: int) -> None:
        self.first = first
        self.runs = deque(deque(run) for run in runs)
        self.gradients: deque[Work] = deque()

    def pop(self) -> Work | None:
        """Remove and return the work of the next layer; None if nothing is left."""
        while self.runs:
            if self.runs[0]:
                return self.runs[0].popleft()
            self.runs.popleft()
        return self.gradients.popleft() if self.gradients else None

    def pop_until(self, layer: int) -> list[Work]:
        """Remove and return what is left of the run that contains this layer, up to the layer."""
        while self.runs and not self.runs[0]:
            self.runs.popleft()
        for run in self.runs:
            if run and run[0].layer <= layer - self.first <= run[-1].layer:
                count = sum(work.layer <= layer - self.first for work in run)
                return [run.popleft() for _ in range(count)]
        return []


@dataclass(frozen=True)
class Schedule:
    """The schedule of one solve, or of a step.

    Attributes:
        workers: each worker's work in order.
        first_layers: for each worker, the layer from which its work is counted.
        deferred: the work that each worker defers, by runs.
    """

    workers: tuple[RunWork, ...]
    first_layers: tuple[int, ...]
    deferred: tuple[tuple[RunWork, ...], ...]

    def deferred_work(self) -> list[DeferredWork]:
        """Return the work that each worker has deferred at the end of this solve."""
        return [DeferredWork(runs, first) for runs, first in zip(self.deferred, self.first_layers, strict=True)]

    def replay(self, seconds: Mapping[str, float], clocks: Clocks, deferred: Sequence[DeferredWork] | None = None) -> None:
        """Run the schedule on simulated clocks.

        Args:
            seconds: by kind of work (see `Costs.kinds`). Sending takes its worker no time; a message's time is from sending to arrival.
            clocks: the workers' clocks, which are advanced.
            deferred: the work deferred by an earlier solve; it is done while a message is awaited, or when a layer's graph is needed.
        """
        _Replay(self, seconds, clocks, deferred or [DeferredWork((), first) for first in self.first_layers]).run()


class _Replay:
    """One replay of a schedule (see `Schedule.replay`)."""

    def __init__(self, schedule: Schedule, seconds: Mapping[str, float], clocks: Clocks, deferred: Sequence[DeferredWork]) -> None:
        self._schedule, self._seconds, self._clocks, self._deferred = schedule, seconds, clocks, deferred
        self._size = len(schedule.workers)
        self._places = [0] * self._size  # index of the work that each worker is at
        self._ready = deque(range(self._size))
        # By sender and receiver: when messages arrive, and whether the receiver waits for one.
        self._arrivals: dict[tuple[int, int], deque[float]] = defaultdict(deque)
        self._awaited: set[tuple[int, int]] = set()
        self._meeting: list[int] = []  # workers that have come to an exchange of all with all
        self._begun: dict[int, float] = {}  # by worker: when it has begun its next one, if it has

    def run(self) -> None:
        """Run it to the end."""
        places, workers = self._places, self._schedule.workers
        while self._ready:
            rank = self._ready.popleft()
            work = workers[rank]
            while places[rank] < len(work) and self._do(rank, work[places[rank]]):
                places[rank] += 1
        stuck = [rank for rank, place in enumerate(places) if place < len(workers[rank])]
        assert not stuck, f"workers {stuck} wait for ever: the schedules differ"

    def _do(self, rank: int, work: Work) -> bool:
        """Do a piece of work. Returns False if the worker has to wait for another one first, and will come to the same work again."""
        kind = work.kind
        if kind == "send":
            self._send(rank, (rank + work.peer) % self._size)
        elif kind == "receive":
            return self._receive(rank, (rank + work.peer) % self._size, work)
        elif kind == "broadcast":
            if rank != work.peer:
                return self._receive(rank, work.peer, work)
            for other in range(self._size):
                if other != rank:
                    self._send(rank, other)
        elif kind == "begin":
            self._begun.setdefault(rank, self._clocks.now[rank])
        elif kind in MEETINGS:
            return self._meet(rank, work)
        elif kind == "parameter_gradient":
            self._deferred[rank].gradients.append(work)
        elif kind == "finish":
            while self._do_deferred(rank):
                pass
        elif kind in ENDS:
            self._clocks.spend(rank, self._seconds[kind], work.solve)
        else:
            deferred, layer = self._deferred[rank], self._schedule.first_layers[rank] + work.layer
            for needed in deferred.pop_until(layer) if deferred.runs else ():
                self._spend(rank, needed, deferred.first + needed.layer)
            self._spend(rank, work, layer)
        return True

    def _spend(self, rank: int, work: Work, layer: int) -> None:
        """Advance the worker's clock by the time of a piece of work on a layer."""
        self._clocks.spend(rank, self._seconds[work.kind], work.solve, work.phase, work.level, layer)

    def _do_deferred(self, rank: int) -> bool:
        """Do the next piece of deferred work. Returns False if none is left."""
        deferred = self._deferred[rank]
        work = deferred.pop()
        if work is not None:
            self._spend(rank, work, deferred.first + work.layer)
        return work is not None

    def _send(self, rank: int, destination: int) -> None:
        """Send a message. A receiver that waits for it goes on."""
        link = rank, destination
        self._arrivals[link].append(self._clocks.now[rank] + self._seconds["message"])
        if link in self._awaited:
            self._awaited.remove(link)
            self._ready.append(destination)

    def _receive(self, rank: int, source: int, work: Work) -> bool:
        """Receive a message. Returns False if it has not been sent yet."""
        link = source, rank
        if not self._arrivals[link]:
            self._awaited.add(link)
            return False
        arrival = self._arrivals[link].popleft()
        while arrival > self._clocks.now[rank] and self._do_deferred(rank):
            pass
        self._clocks.wait_until(rank, arrival, work.solve, work.phase, work.level)
        return True

    def _meet(self, rank: int, work: Work) -> bool:
        """Exchange messages with all workers, which ends for all at the same time. Returns False if others have not come to it yet."""
        if work.kind == "exchange_before" and not self._seconds[work.kind]:
            return True  # all of the messages are in what follows
        self._meeting.append(rank)
        if len(self._meeting) < self._size:
            return False
        end = max(self._begun.get(other, now) for other, now in enumerate(self._clocks.now)) + self._seconds[work.kind]
        self._begun.clear()
        for other in self._meeting:
            self._clocks.wait_until(other, end, work.solve, work.phase, work.level)
            if other != rank:
                self._places[other] += 1
                self._ready.append(other)
        self._meeting.clear()
        return True
