"""Timelines: what a worker does at which time within a step, as spans on a real clock or, in predictions, on a logical one."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, TypeVar

from torch import Tensor

from rayllp.channel.base import Channel, ChannelWrapper, MessageTag, Receives, Sends, StateSpec
from rayllp.mgrit.propagator import Propagator
from rayllp.state import State

T = TypeVar("T")

KINDS = ("compute", "send", "wait")
"""The kinds of spans."""


class Span(NamedTuple):
    """Something that one worker did, with its beginning and end.

    Attributes:
        begin, end: seconds, on the timeline's clock.
        kind: "compute", "send", or "wait" (for a message, or for all workers).
        solve: "forward" or "adjoint"; for other parts of a step "enter", "loss", "gradients" (shared ones), "statistics" or "update".
        phase: phase of the cycle, such as "coarse solve" or "last sweep"; "microbatch" in the exact steps' pipeline; otherwise empty.
        level: level of the cycle, 0 for the finest.
        layer: number of the layer, counted from the first of the solve; None if the span belongs to no layer.
    """

    begin: float
    end: float
    kind: str
    solve: str
    phase: str = ""
    level: int = 0
    layer: int | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def shifted(self, seconds: float) -> "Span":
        """Return the span as a clock shows it that is ahead by this many seconds."""
        return self._replace(begin=self.begin + seconds, end=self.end + seconds)

    @property
    def name(self) -> str:
        """The name under which sums and charts count the span: solve and phase for computation, otherwise its kind."""
        return f"{self.solve} {self.phase}".strip() if self.kind == "compute" else self.kind


class TimedStep(NamedTuple):
    """One worker's step.

    Attributes:
        started: when it began, by the node's clock, in seconds since the epoch.
        seconds: how long it took.
        spans: its spans, with times in seconds from its beginning.
    """

    started: float
    seconds: float
    spans: tuple[Span, ...]


def sum_kinds(step: TimedStep) -> dict[str, float]:
    """Return the seconds of a worker's step by kind: compute, send, wait, and "other" for what no span covers (the batch, bookkeeping)."""
    sums = dict.fromkeys(KINDS, 0.0)
    for span in step.spans:
        sums[span.kind] += span.seconds
    return sums | {"other": max(0.0, step.seconds - sum(sums.values()))}


def sum_phases(spans: Sequence[Span]) -> dict[str, float]:
    """Return seconds by `Span.name`, in the order in which the names first occur."""
    sums: dict[str, float] = {}
    for span in spans:
        sums[span.name] = sums.get(span.name, 0.0) + span.seconds
    return sums


class Timeline:
    """One worker's spans, in the order in which they ended.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.spans: list[Span] = []
        self.solve, self.phase, self.level = "", "", 0

    @contextmanager
    def span(self, kind: str, solve: str) -> Iterator[None]:
        """Record what happens inside as one span that belongs to no solve."""
        begin = self.clock()
        yield
        self.spans.append(Span(begin, self.clock(), kind, solve))

    def fill(self, first: int, begin: float) -> None:
        """Record the gaps between spans as waiting for messages.

        Args:
            first: number of the first span to consider.
            begin: time at which the first gap may begin. The last gap ends now.
        """
        for span in [*self.spans[first:], Span(now := self.clock(), now, "", "")]:
            if span.begin > begin:
                self.spans.append(Span(begin, span.begin, "wait", span.solve))
            begin = max(begin, span.end)

    def begin_solve(self, solve: str) -> Callable[[str, int], None]:
        """Assign the spans that follow to this solve. Returns a function to call with phase and level whenever a phase begins."""
        self.solve = solve
        return self._begin_phase

    def _begin_phase(self, phase: str, level: int) -> None:
        self.phase, self.level = phase, level

    def add(self, begin: float, kind: str, layer: int | None = None, phase: tuple[str, str, int] | None = None) -> None:
        """Record a span that ends now. It began at `begin`, or at the end of the last span if that ended later (a span within this one).

        Args:
            phase: solve, phase and level; None: the current ones.
        """
        if self.spans:
            begin = max(begin, self.spans[-1].end)
        self.spans.append(Span(begin, self.clock(), kind, *(phase or (self.solve, self.phase, self.level)), layer))


def span_on(timeline: Timeline | None, solve: str, kind: str = "compute") -> AbstractContextManager[None]:
    """Return a context whose content is recorded as one span on the timeline, if there is one."""
    return nullcontext() if timeline is None else timeline.span(kind, solve)


class TimedPropagator(Propagator):
    """A propagator whose steps are recorded as spans of `solve`.

    Several steps in one call are one span, with the first one's layer.
    """

    def __init__(self, inner: Propagator, timeline: Timeline, solve: str) -> None:
        self.inner, self.timeline, self.solve = inner, timeline, solve

    def defer(self, layer: int, state: State) -> bool:
        return self.inner.defer(layer, state)

    def step(self, layer: int, state: State) -> State:
        begin = self.timeline.clock()
        after = self.inner.step(layer, state)
        self.timeline.add(begin, "compute", layer)
        return after

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        begin = self.timeline.clock()
        after = self.inner.last_step(layer, state, known)
        # The phase is given, since a deferred step is taken during another solve.
        self.timeline.add(begin, "compute", layer, (self.solve, "last sweep", 0))
        return after

    def tentative_step(self, layer: int, state: State) -> State:
        begin = self.timeline.clock()
        after = self.inner.tentative_step(layer, state)
        self.timeline.add(begin, "compute", layer)
        return after

    def settle(self, layer: int) -> None:
        begin = self.timeline.clock()
        self.inner.settle(layer)
        self.timeline.add(begin, "compute", layer)

    def steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        begin = self.timeline.clock()
        after = self.inner.steps(layers, states)
        self.timeline.add(begin, "compute", layers[0])
        return after

    def last_steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        begin = self.timeline.clock()
        after = self.inner.last_steps(layers, states)
        self.timeline.add(begin, "compute", layers[0])
        return after


class TimedChannel(ChannelWrapper):
    """A channel whose messages are recorded as spans."""

    def __init__(self, inner: Channel, timeline: Timeline) -> None:
        super().__init__(inner)
        self.timeline = timeline

    def send(self, state: State, destination: int, tag: MessageTag) -> None:
        begin = self.timeline.clock()
        self.inner.send(state, destination, tag)
        self.timeline.add(begin, "send")

    def receive(self, spec: StateSpec, source: int, tag: MessageTag) -> State:
        return self._wait(partial(self.inner.receive, spec, source, tag))

    def exchange(self, sends: Sends, receives: Receives, tag: MessageTag) -> list[State]:
        return self._wait(partial(self.inner.exchange, sends, receives, tag))

    def all_reduce(self, tensor: Tensor, tag: MessageTag) -> Tensor:
        return self._wait(partial(self.inner.all_reduce, tensor, tag))

    def begin_all_gather(self, state: State, spec: StateSpec, tag: MessageTag) -> Callable[[], list[State]]:
        begin = self.timeline.clock()
        end = self.inner.begin_all_gather(state, spec, tag)
        self.timeline.add(begin, "send")
        return partial(self._wait, end)

    def begin_all_to_all(self, parts: Sequence[Tensor], tag: MessageTag) -> Callable[[], list[Tensor]]:
        begin = self.timeline.clock()
        end = self.inner.begin_all_to_all(parts, tag)
        self.timeline.add(begin, "send")
        return partial(self._wait, end)

    def _wait(self, end: Callable[[], T]) -> T:
        begin = self.timeline.clock()
        found = end()
        self.timeline.add(begin, "wait")
        return found
