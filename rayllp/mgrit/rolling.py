"""Rolling windows: Picard iteration on the next W layers, where the window rolls on as soon as its first layers have converged.

As with windows of fixed lengths (`windows.py`), neighbouring layers are on different workers, and in each sweep all layers n of the window
are evaluated at once, each at the state u_n that is known so far:

    d_n = Φ_n(u_n) − u_n,   u_{n+1} = u_a + Σ_{a ≤ m ≤ n} d_m

The window's first state u_a is exact, and so is u_{a+1}. A sweep changes the other states; where such a change is small, the layer need not
be evaluated again at the new state. So after each sweep the window rolls on by m layers: the first one, and those that follow it as long as
‖change of u_n‖ ≤ tolerance · ‖u_n‖. Where layers depend strongly on each other, m is 1 and a sweep takes the time of an exact layer; where
they hardly do, it is W. No lengths and no numbers of sweeps have to be chosen, each batch takes what it needs, and a layer has been
evaluated several times, ever closer to its state, by the time the window's beginning gets there. (Sliding windows are used in the same way
to sample from diffusion models: ParaDiGMS, arXiv:2305.16317.)

A layer that was evaluated before, at u_n', has shown how it responds to a change. The second and further sweeps therefore add the part of
the response to the new change that follows from the old one, along the same direction, for each row of the state by itself:

    u_{n+1} = u_n + d_n + α (d_n − d_n'),   α = ⟨change of u_n, u_n − u_n'⟩ / ‖u_n − u_n'‖²

with (u_n, d_n) from this sweep, (u_n', d_n') from the one before. This is the secant method (with one pair, a multisecant quasi-Newton
method such as Anderson's; ParaTAA, arXiv:2402.09970, does so for diffusion). At Δt = 1 it saves a quarter of the time for the same
accuracy; where layers hardly depend on each other it changes nothing. If a layer's response to changes is known (`responses.py`) that takes
the secant's place, also in a layer's first sweep: at Δt = 1 that saves another sixth.

The adjoint is the same solve from the other end. What changes in λ is a relative error of the gradients at once, what changes in u is
damped by the layers' normalisation, so the adjoint's tolerance is ADJOINT_TOLERANCE times as large: of four ratios that one gave the most
accurate gradients in a given time, on four trained networks.

The arithmetic of a sweep, sums, secants and norms, is done by every worker for all rows of the states, after one all-gather of increments;
or, where states are large, by each worker for its share of the rows, with an exchange of these before and after (`shares.py`). Either way
all workers come to the same decisions.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayllp.channel.base import StateSpec
from rayllp.errors import SettingsError
from rayllp.mgrit.communicator import Communicator, PhaseListener
from rayllp.mgrit.placement import Placement
from rayllp.mgrit.propagator import Propagator
from rayllp.mgrit.responses import Response
from rayllp.mgrit.result import ResidualShares, Solution
from rayllp.mgrit.shares import EXCHANGE, shares_of
from rayllp.state import State, add, combine, squared_norms, subtract, tensors

ADJOINT_TOLERANCE = 4.0
"""The adjoint's tolerance over that of the forward solve."""
RIDGE = 1e-3
"""Relative regularisation of α."""
MOST_EXTRAPOLATION = 2.0
"""Bound of |α|."""


@dataclass(frozen=True)
class RollingProblem:
    """u_{n+1} = Φ_n(u_n) over all layers, as one worker sees it, and the window in which it is solved.

    Attributes:
        placement: which worker owns which layer; the same on every worker.
        length: W, the largest number of layers in the window; the same on every worker.
        propagator: Φ_n of this worker's layers.
        spec: shapes and dtypes of a state.
        adjoint: solve λ_n = (∂Φ_n/∂x)ᵀ λ_{n+1} instead, from the last layer to the first.

    Raises:
        SettingsError: no layer in the window.
    """

    placement: Placement
    length: int
    propagator: Propagator
    spec: StateSpec
    adjoint: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise SettingsError(f"a window of {self.length} layers: it must have at least 1")


@dataclass(frozen=True, kw_only=True)
class RollingOptions:
    """Everything about a solve by a rolling window but the problem itself.

    Attributes:
        tolerance: largest relative change of a layer's input that its last sweep may leave unheeded; 0: none, so the solve is exact.
        rounding: relative rounding error of a layer's increment, where it is computed in a lower precision than the state's; otherwise 0.
        responses: of layers whose response to changes is known; the same on every worker.
        observe: called with a layer of this worker, its input and its increment, for each evaluation.

    Raises:
        SettingsError: a negative tolerance.
    """

    tolerance: float
    rounding: float = 0.0
    responses: Mapping[int, Response] = field(default_factory=dict)
    observe: Callable[[int, State, State], None] | None = None

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise SettingsError(f"tolerance {self.tolerance:g}: it must be 0 or larger")


@dataclass
class _Place:
    """A layer of the window. Layers are counted in the order in which the solve takes them.

    Attributes:
        input: its input as it is known so far, on the worker that owns it; elsewhere it may be None.
        rows: this worker's share of the input's rows.
        before: the same of input and increment at its latest evaluation; None if there is none.
        sweeps: number of sweeps that have changed its input.
        first_change: squared norm of what the first of them has changed in it.
    """

    input: State | None
    rows: State
    before: tuple[State, State] | None = None
    sweeps: int = 0
    first_change: float = 0.0


class RollingSolver:
    """One solve on one worker. Every worker of the channel makes a solver with the same window and options, and calls `solve` once.

    Args:
        problem: the equations to solve, as this worker sees them.
        options: tolerance and rounding.
        communicator: for messages to the other workers.
        on_phase: called with the name of each sweep and level 0 as the sweep begins.
    """

    def __init__(
        self, problem: RollingProblem, options: RollingOptions, communicator: Communicator, on_phase: PhaseListener | None = None
    ) -> None:
        self.placement, self.length, self.propagator, self.spec = problem.placement, problem.length, problem.propagator, problem.spec
        self.options, self.communicator = options, communicator
        self.channel, self.tag = communicator.channel, communicator.tag
        self.on_phase = on_phase or (lambda phase, level: None)
        layers = range(len(problem.placement.owners))
        self._order: Sequence[int] = layers[::-1] if problem.adjoint else layers
        self._share = shares_of(communicator, problem.placement, problem.spec, problem.length, self._settle_due, rolling=True)
        self._settled: deque[int] = deque()  # this worker's layers with work left that no other worker waits for
        self._due = 0  # number of layers to settle in the next sweep
        self.sweeps = 0
        # Of each layer that was swept twice before the window came to it: squared norms of both changes, and the rounding in the second.
        self._changes: list[tuple[float, float, float]] = []

    def solve(self, initial: State | None, source: int) -> Solution:
        """Solve from state `initial`, which worker `source` has. Every worker gets the output."""
        window = self._first_window(self.channel.broadcast(initial, self.spec, source, self.tag.at("broadcast", 0)))
        strides = 0
        while True:
            stride, rows = self._sweep(window)
            strides += stride > 1
            if not window:
                break
        output = self._share.joined(rows, "output")
        while self._settle_one():
            pass
        return Solution(output=output, residuals=self._residuals(exact=not strides or not self.options.tolerance))

    def _first_window(self, state: State) -> dict[int, _Place]:
        """Return the layers of the first window by their places, all of which are first evaluated at the solve's first state."""
        rows = self._share.rows(state)
        return {place: _Place(state, rows) for place in range(min(self.length, len(self._order)))}

    def _sweep(self, window: dict[int, _Place]) -> tuple[int, State]:
        """Evaluate all layers of the window, roll on, and give the layers that are then in it new inputs.

        Returns: by how many layers it has rolled on, and this worker's rows of the state behind the layers that were in it.
        """
        self.on_phase("sweep", 0)
        front, places, layers = min(window), list(window.values()), [self._order[place] for place in window]
        mine = {
            self._order[place]: self._increment(self._order[place], known.input)
            for place, known in window.items()
            if self._owner(place) == self.channel.rank
        }
        if not mine:  # while other workers evaluate theirs
            self._settle_one()
        # The first place is part of the tag, so workers that have come to different decisions do not go on. A tag is short.
        phase = f"{EXCHANGE} {self.sweeps}@{front}"
        increments = self._share.of_increments(layers, mine, phase)
        self.sweeps += 1
        states = self._add_up(places, layers, increments)
        squares = self._share.summed(self._squares(places, states, increments), phase)
        stride = self.stride([tuple(row) for row in squares])
        for known, (change, _, rounding) in zip(places[1:], squares[1:], strict=True):
            self._note_change(known, change, rounding)
        for known, rows in zip(places, states, strict=False):
            known.rows = rows
        self._roll(window, stride, states[-1])
        if window:
            rows_of_next = [known.rows for known in window.values()]
            inputs = self._share.of_states([self._order[place] for place in window], rows_of_next, phase)
            for known, new in zip(window.values(), inputs, strict=True):
                known.input = new
        return stride, states[-1]

    def _roll(self, window: dict[int, _Place], stride: int, rows: State) -> None:
        """Take the first `stride` layers out of the window, and new ones in.

        Args:
            window: the layers of the window by their places.
            stride: number of layers that have converged.
            rows: this worker's rows of the new layers' input.
        """
        front = min(window) + stride
        for place in range(front - stride, front):
            del window[place]
            if self._owner(place) == self.channel.rank:
                self._settled.append(self._order[place])
        for place in range(front, min(front + self.length, len(self._order))):
            if place not in window:
                window[place] = _Place(None, rows)
        # Once the window has passed P layers, each worker has one more to settle; so no worker waits for another.
        self._due += front // self.channel.size - (front - stride) // self.channel.size

    def _increment(self, layer: int, state: State | None) -> State:
        assert state is not None
        increment = subtract(self.propagator.tentative_step(layer, state), state)
        if self.options.observe is not None:
            self.options.observe(layer, state, increment)
        return increment

    def _add_up(self, window: Sequence[_Place], layers: Sequence[int], increments: Sequence[State]) -> list[State]:
        """Return the new inputs of the window's layers, and the state behind it: of all these, this worker's share of the rows."""
        states = [window[0].rows]
        for known, layer, increment in zip(window, layers, increments, strict=True):
            response = increment
            if len(states) > 1:
                error, shown = subtract(states[-1], known.rows), None
                if known.before is not None:
                    shown = subtract(known.rows, known.before[0]), subtract(increment, known.before[1])
                if layer in self.options.responses:
                    response = self.options.responses[layer].follow(increment, error, shown)
                elif shown is not None:
                    response = combine(_with_secant, increment, shown[1], error, shown[0])
            states.append(add(states[-1], response))
            known.before = known.rows, increment
        return states

    def _squares(self, window: Sequence[_Place], states: Sequence[State], increments: Sequence[State]) -> Tensor:
        """Return squared norms of this worker's rows: of the change of each layer's input, of the input, and of its rounding.

        They are float64, of shape (layers, 3).
        """
        changes = [subtract(state, known.rows) for known, state in zip(window, states, strict=False)]
        changed, squares = squared_norms(changes), squared_norms(states)
        own = max((torch.finfo(part.dtype).eps for part in tensors(states[0])), default=0.0)
        rounding = own**2 * squares[1:]
        if self.options.rounding:
            rounding = rounding + self.options.rounding**2 * squared_norms(increments)
        # A layer's input has the rounding of all steps before it.
        return torch.stack([changed, squares[:-1], rounding.cumsum(0) - rounding], dim=1)

    def stride(self, squares: Sequence[tuple[float, ...]]) -> int:
        """Return by how many layers the window rolls on.

        Args:
            squares: squared norms of the change of each layer's input, and of the input.
        """
        small = [change <= self.options.tolerance**2 * norm for change, norm, *_ in squares[1:]]
        return 1 + next((place for place, holds in enumerate(small) if not holds), len(small))

    def _note_change(self, known: _Place, change: float, rounding: float) -> None:
        """Note what the latest sweep changes in a layer's input, and add its first two changes to `_changes` once there are both."""
        if known.sweeps == 1:
            self._changes.append((known.first_change, change, rounding))
        known.first_change = known.first_change if known.sweeps else change
        known.sweeps += 1

    def _residuals(self, *, exact: bool) -> ResidualShares:
        """Return how the solve went; all of it on the first worker, since every worker knows it."""
        mine = self._changes if self.channel.rank == 0 else []
        found = torch.tensor([sum(each[place] for each in mine) for place in range(3)], dtype=torch.float64, device=self.spec.device)
        return ResidualShares(
            squared=found[:2] if self._changes else found[:0],
            squared_floor=found[2],
            informative=2,
            exact=exact,
            converged=True,
            sweeps=self.sweeps,
        )

    # Work that no other worker waits for ----------------------------------------------------------------------------------------------

    def _settle_due(self) -> None:
        """Settle the layers that are due, while messages of a sweep are under way."""
        for _ in range(self._due):
            self._settle_one()
        self._due = 0

    def _settle_one(self) -> bool:
        """Do what is left to do for one layer. Returns False if there is none."""
        if not self._settled:
            return False
        self.on_phase("settle", 0)
        self.propagator.settle(self._settled.popleft())
        return True

    def _owner(self, place: int) -> int:
        return self.placement.owners[self._order[place]]


def _with_secant(increment: Tensor, response: Tensor, error: Tensor, step: Tensor) -> Tensor:
    """Return an increment at a state that is off by `error` from where it was evaluated, of each row by itself.

    Args:
        increment: as evaluated.
        response: how much it has changed for a change `step` of the state before.
    """
    squares = (step * step).sum(-1, keepdim=True)
    share = (error * step).sum(-1, keepdim=True) / (squares * (1 + RIDGE) + torch.finfo(step.dtype).tiny)
    return increment + share.clamp(-MOST_EXTRAPOLATION, MOST_EXTRAPOLATION) * response
