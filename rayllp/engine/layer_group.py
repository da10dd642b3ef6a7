"""One worker's end of its layer group: its block of layers, the channel to the other blocks, and how they solve together."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.control import Accuracy
from rayllp.data.base import Inputs
from rayllp.engine.block import Block
from rayllp.engine.layer_responses import LayerResponses
from rayllp.engine.step_solves import StepSolves, kind_of
from rayllp.mgrit import Communicator, DeferredSweeps, MGRITSolver, PhaseListener, Problem, Solution, SolverOptions
from rayllp.mgrit.rolling import RollingOptions, RollingProblem, RollingSolver
from rayllp.mgrit.windows import WindowOptions, WindowProblem, WindowSolver
from rayllp.state import State, tensors
from rayllp.timeline import TimedChannel, TimedPropagator, Timeline, span_on

AnyProblem = TypeVar("AnyProblem", Problem, WindowProblem, RollingProblem)


class LayerGroup:
    """What all parts of a step on one worker share: its layers, its channel, and the group's solves.

    Args:
        found: the factors of the layers' responses that this worker knows from an earlier group (`LayerResponses`).

    Attributes:
        block: this worker's layers.
        channel: the channel to the workers of the same replica, in order of the layers.
        config: the settings of the run.
        timeline: the timeline on which steps record their spans; None if they record none.
        responses: what is known of the layers' responses to changes, on a cyclic placement; otherwise None.
    """

    def __init__(self, block: Block, channel: Channel, found: dict[int, Tensor] | None = None) -> None:
        self.block, self.channel, self.config = block, channel, block.config
        cyclic = self.config.placement == "cyclic"
        self.responses = LayerResponses(self.config.cyclic_placement, channel, {} if found is None else found) if cyclic else None
        self.timeline: Timeline | None = None
        self._solves: dict[Accuracy, StepSolves] = {}
        self._specs: dict[tuple[torch.Size, ...], StateSpec] = {}

    @property
    def device(self) -> torch.device:
        """The device that this worker's layers are on."""
        return self.block.device

    def solves(self, accuracy: Accuracy) -> StepSolves:
        """Return hierarchies and options for a step of this accuracy."""
        key = kind_of(accuracy)
        if key not in self._solves:
            self._solves[key] = StepSolves.of(accuracy, self.config)
        return self._solves[key]

    def spec(self, inputs: Inputs) -> StateSpec:
        """Return shapes and dtypes of the state for these inputs."""
        shapes = tuple(part.shape for part in tensors(inputs))
        if shapes not in self._specs:
            self._specs[shapes] = self.block.architecture.state_spec(inputs, self.block.dtype, self.device)
        return self._specs[shapes]

    def solve_by_mgrit(
        self,
        problem: Problem,
        options: SolverOptions,
        tag: MessageTag,
        u0: State | None,
        *,
        defer_to: DeferredSweeps | None = None,
        while_waiting: DeferredSweeps | None = None,
    ) -> Solution:
        """Solve by MGRIT on all workers of the group.

        Args:
            problem: the equations to solve.
            options: how to solve them.
            tag: names the solve in errors.
            u0: the state before the first step, on the worker that takes it.
            defer_to: collects the last sweeps that no other worker waits for.
            while_waiting: sweeps that an earlier solve has deferred, to be done while this one waits for messages.

        Raises:
            ChannelError: a message did not arrive in time.
        """
        problem, communicator, on_phase = self._timed(problem, tag, while_waiting)
        return MGRITSolver(problem, options, communicator, on_phase).solve(u0, defer_to=defer_to)

    def solve_by_windows(
        self, problem: WindowProblem, options: WindowOptions, tag: MessageTag, initial: State | None, *, source: int
    ) -> Solution:
        """Solve by windows on all workers of the group.

        Args:
            problem: the equations to solve.
            options: how to solve them.
            tag: names the solve in errors.
            initial: the state that the solve begins with, on worker `source`.
            source: rank of the worker that has it.

        Raises:
            ChannelError: a message did not arrive in time.
        """
        problem, communicator, on_phase = self._timed(problem, tag)
        return WindowSolver(problem, options, communicator, on_phase).solve(initial, source)

    def solve_by_rolling(
        self, problem: RollingProblem, options: RollingOptions, tag: MessageTag, initial: State | None, *, source: int
    ) -> Solution:
        """Solve by a rolling window on all workers of the group, which use what they know of the layers' responses.

        Arguments and errors are those of `solve_by_windows`.
        """
        problem, communicator, on_phase = self._timed(problem, tag)
        assert self.responses is not None
        known = self.responses.known(tag.solve, problem.spec, tag.step)
        options = replace(options, responses=known, observe=self.responses.observer(tag.solve))
        return RollingSolver(problem, options, communicator, on_phase).solve(initial, source)

    def _timed(
        self, problem: AnyProblem, tag: MessageTag, while_waiting: DeferredSweeps | None = None
    ) -> tuple[AnyProblem, Communicator, PhaseListener | None]:
        """Return the problem, communicator and phase listener for a solver; they record its spans if there is a timeline."""
        if self.timeline is None:
            return problem, Communicator(self.channel, tag, while_waiting), None
        problem = replace(problem, propagator=TimedPropagator(problem.propagator, self.timeline, tag.solve))
        communicator = Communicator(TimedChannel(self.channel, self.timeline), tag, while_waiting)
        return problem, communicator, self.timeline.begin_solve(tag.solve)

    def span(self, solve: str, kind: str = "compute") -> AbstractContextManager[None]:
        """Return a context whose content is recorded as one span on the timeline, if there is one."""
        return span_on(self.timeline, solve, kind)
