"""Windows: solve a few layers at once by Picard iteration, window after window, with neighbouring layers on different workers.

MGRIT's coarse step replaces an interval of layers by one of them, so it is cheap but only first-order accurate. A window's coarse step is
the sum over all of its c layers, each evaluated at the window's first state C:

    u_{j+1} = u_j + d_j(C),   d_j(x) = Φ_j(x) − x

Weights that differ between layers cause no error; what remains is of second order in the window's length. The step costs as many
evaluations as the window has layers, but these are independent: with layer n on worker n mod P, a window of P layers takes the time of one
layer. Every worker evaluates only layers that it owns, so none is idle and no layer is evaluated twice. A further sweep evaluates each
layer at the state that the sweep before has found for it (Picard iteration, also called waveform relaxation; it is MGRIT on the window with
the identity as the coarse operator). After k sweeps the first k layers of each window are exact; after as many sweeps as layers the whole
window is.

Windows may have any lengths. A window of one layer is exact, and several of these in a row form a chain: states go from owner to owner, and
no worker waits for the gradients of their parameters. Each window may take a number of sweeps of its own. In a rolling window
(`rolling.py`) neither lengths nor sweeps have to be chosen.

The adjoint is the same solve from the other end, with the transposed steps. With one sweep in both directions, the gradient is the exact
gradient of the network whose windows are evaluated in this way. That is why training with a single sweep is stable.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from rayllp.channel.base import StateSpec
from rayllp.errors import SettingsError
from rayllp.mgrit.communicator import Communicator, PhaseListener
from rayllp.mgrit.placement import Placement, gather
from rayllp.mgrit.propagator import Propagator
from rayllp.mgrit.relay import relay
from rayllp.mgrit.result import ResidualShares, Solution, squared_rounding
from rayllp.mgrit.shares import shares_of
from rayllp.state import State, add, squared_norm, subtract

WINDOW_END = "window's end"
"""The phase of the messages by which the increments of a window are summed."""


def equal_windows(layers: int, length: int) -> tuple[int, ...]:
    """Return the lengths of windows of `length` layers; the last one is shorter if `length` does not divide the number of layers."""
    return tuple(min(length, layers - start) for start in range(0, layers, length))


def lengths_in_words(lengths: Sequence[int]) -> str:
    """Return the lengths of windows as a short text: "1 (4 times), 3, 8 (7 times)", or "8" if all but a shorter last one are equal."""
    return str(lengths[0]) if lengths == equal_windows(sum(lengths), lengths[0]) else _repeated(map(str, lengths))


def _repeated(texts: Iterable[str]) -> str:
    """Return the texts with commas between them; the same several times in a row as "1 (4 times)"."""
    runs = [(text, len(list(run))) for text, run in groupby(texts)]
    return ", ".join(text if count == 1 else f"{text} ({count} times)" for text, count in runs)


@dataclass(frozen=True)
class Windows:
    """The windows of a network, in its order, and how accurately each is solved.

    Attributes:
        lengths: number of layers of each.
        sweeps: of each, forward and backward. No more are taken than it has layers.
    """

    lengths: tuple[int, ...]
    sweeps: tuple[tuple[int, int], ...]

    @staticmethod
    def alike(lengths: tuple[int, ...], forward: int = 1, backward: int = 1) -> "Windows":
        """Return windows that all take the same sweeps."""
        return Windows(lengths, ((forward, backward),) * len(lengths))

    @staticmethod
    def of(windows: Iterable[tuple[int, int, int]]) -> "Windows":
        """Return these windows, each given by its length, forward and backward sweeps."""
        lengths, forward, backward = zip(*windows, strict=True)
        return Windows(lengths, tuple(zip(forward, backward, strict=True)))

    @property
    def forward(self) -> tuple[int, ...]:
        """Forward sweeps of each window."""
        return tuple(forward for forward, _ in self.sweeps)

    @property
    def backward(self) -> tuple[int, ...]:
        """Sweeps of each window in the adjoint solve."""
        return tuple(backward for _, backward in self.sweeps)


@dataclass(frozen=True)
class WindowProblem:
    """u_{n+1} = Φ_n(u_n) over all layers, as one worker sees it, and the windows in which it is solved.

    Attributes:
        placement: which worker owns which layer; the same on every worker.
        windows: number of layers in each window, in the order of the network; the same on every worker.
        propagator: Φ_n of this worker's layers.
        spec: shapes and dtypes of a state.
        adjoint: solve λ_n = (∂Φ_n/∂x)ᵀ λ_{n+1} instead, from the last layer to the first.
    """

    placement: Placement
    windows: Sequence[int]
    propagator: Propagator
    spec: StateSpec
    adjoint: bool = False


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """Everything about a solve by windows but the problem itself.

    Attributes:
        sweeps: number of Picard sweeps in every window, or in each of them in the order of the network; at least 1. A window takes no more
            of them than it has layers.
        rounding: relative rounding error of a layer's increment, where it is computed in a lower precision than the state's; otherwise 0.

    Raises:
        SettingsError: no sweep.
    """

    sweeps: int | tuple[int, ...] = 1
    rounding: float = 0.0

    def __post_init__(self) -> None:
        least = min(self.sweeps, default=1) if isinstance(self.sweeps, tuple) else self.sweeps
        if least < 1:
            raise SettingsError(f"{least} sweeps: there must be at least 1")

    def of_each(self, windows: int) -> tuple[int, ...]:
        """Return the sweeps of each window.

        Raises:
            SettingsError: sweeps of another number of windows.
        """
        if not isinstance(self.sweeps, tuple):
            return (self.sweeps,) * windows
        if len(self.sweeps) != windows:
            raise SettingsError(f"sweeps of {len(self.sweeps)} windows, and there are {windows}: give one number for each, or one for all")
        return self.sweeps


class WindowSolver:
    """One solve on one worker. Every worker of the channel makes a solver with the same windows and options, and calls `solve` once.

    Args:
        problem: the equations to solve, as this worker sees them.
        options: sweeps and rounding.
        communicator: for messages to the other workers.
        on_phase: called with the name of each sweep and level 0 as the sweep begins.

    Raises:
        SettingsError: windows that do not make up the network, or sweeps of another number of windows.
    """

    def __init__(
        self, problem: WindowProblem, options: WindowOptions, communicator: Communicator, on_phase: PhaseListener | None = None
    ) -> None:
        self.placement, self.propagator, self.spec = problem.placement, problem.propagator, problem.spec
        self.communicator, self.channel, self.tag = communicator, communicator.channel, communicator.tag
        self.on_phase = on_phase or (lambda phase, level: None)
        cut = problem.placement.windows(problem.windows)
        self._share = shares_of(communicator, problem.placement, problem.spec, max(problem.windows))
        self.windows: list[Sequence[int]] = [layers[::-1] for layers in reversed(cut)] if problem.adjoint else list(cut)
        sweeps = [min(pair) for pair in zip(options.of_each(len(cut)), problem.windows, strict=True)]
        self._sweeps_of = {layers[0]: count for layers, count in zip(self.windows, sweeps[:: -1 if problem.adjoint else 1], strict=True)}
        self.sweeps, self.rounding = max(sweeps), options.rounding
        # Changes are compared from sweep to sweep, so they are those of the windows that take all sweeps.
        self._longest = max(length for length, count in zip(problem.windows, sweeps, strict=True) if count == self.sweeps)
        # In a chain the next worker waits for the adjoint state alone, so parameter gradients are deferred.
        self._defers = problem.adjoint and self.channel.size > 1
        self._deferred: list[tuple[int, State]] = []
        # For each sweep, the squared norm of the change in the inputs of the layers owned here. It takes the place of a residual.
        self._changes = torch.zeros(self.sweeps - 1, dtype=torch.float64, device=self.spec.device)
        # The part of the first change that rounding error alone would cause.
        self._squared_floor = torch.zeros((), dtype=torch.float64, device=self.spec.device)

    def solve(self, initial: State | None, source: int) -> Solution:
        """Solve from state `initial`, which worker `source` has. Every worker gets the output."""
        state = self.channel.broadcast(initial, self.spec, source, self.tag.at("broadcast", 0))
        for is_chain, windows in groupby(self.windows, key=lambda layers: len(layers) == 1):
            if is_chain:
                state = self._solve_chain([layer for (layer,) in windows], state)
            else:
                for layers in windows:
                    state = self._solve_window(layers, state)
        self._form_deferred()
        shares = ResidualShares(
            squared=self._changes,
            squared_floor=self._squared_floor,
            # The inputs of a window's first k layers are exact after k − 1 sweeps, so later changes are zero by construction.
            informative=self._longest - 1,
            exact=all(count >= len(layers) for layers, count in zip(self.windows, self._sweeps_of.values(), strict=True)),
        )
        return Solution(output=state, residuals=shares)

    def _solve_window(self, layers: Sequence[int], start: State) -> State:
        """Return the state after these layers, which are given in the order in which they are taken."""
        mine = [layer for layer in layers if self.placement.owners[layer] == self.channel.rank]
        inputs = dict.fromkeys(mine, start)
        sweeps = self._sweeps_of[layers[0]]
        for sweep in range(sweeps - 1):
            self.on_phase("relaxation", 0)
            found = {layer: subtract(self.propagator.step(layer, inputs[layer]), inputs[layer]) for layer in mine}
            increments = gather(self.communicator, self.placement, self.spec, layers, found, f"sweep {sweep}")
            inputs = self._next_inputs(layers, start, increments, inputs, sweep)
        self.on_phase("last sweep", 0)
        found = {layer: subtract(self.propagator.last_step(layer, inputs[layer], None), inputs[layer]) for layer in mine}
        return self._end(layers, start, found)

    def _solve_chain(self, layers: Sequence[int], start: State) -> State:
        """Return the state after these layers, which are taken one after the other, each by the worker that owns it."""
        self.on_phase("last sweep", 0)
        owners, end = [self.placement.owners[layer] for layer in layers], self.windows[-1][-1]

        def take(place: int, state: State) -> State:
            layer = layers[place]
            if not self._defers or layer == end:
                return self.propagator.last_step(layer, state, None)
            self._deferred.append((layer, state))
            return self.propagator.step(layer, state)

        state = relay(self.communicator, owners, take, start, self.spec, "chain", source=owners[0], destination=owners[-1])
        if layers[-1] == end and owners[-1] != self.channel.rank:
            self._form_deferred()  # while the others go on to the end
        return self.channel.broadcast(state, self.spec, owners[-1], self.tag.at("broadcast", 0))

    def _form_deferred(self) -> None:
        """Take the last sweep of the layers for which only `step` was called, since other workers waited for it."""
        for layer, state in self._deferred:
            self.propagator.last_step(layer, state, None)
        self._deferred.clear()

    def _next_inputs(
        self, layers: Sequence[int], start: State, increments: Sequence[State], before: dict[int, State], sweep: int
    ) -> dict[int, State]:
        """Return the next sweep's inputs of this worker's layers: the window's first state plus the increments of all layers before.

        In a window that takes all sweeps, also adds the squared change of these inputs to `_changes`, and in the first sweep its rounding
        error to `_squared_floor`.

        Args:
            increments: the increments that sweep `sweep` has found, of all layers of the window in order.
            before: that sweep's inputs of this worker's layers.
        """
        state, inputs = start, {}
        counts = self._sweeps_of[layers[0]] == self.sweeps
        # Needed only if there will be two changes, whose ratio is ρ unless both are of the size of rounding error.
        rounding = torch.zeros_like(self._squared_floor) if counts and sweep == 0 and len(self._changes) > 1 else None
        for layer, increment in zip(layers, increments, strict=True):
            if layer in before:
                inputs[layer] = state
                if counts:
                    self._changes[sweep] += squared_norm(subtract(state, before[layer]))
                if rounding is not None:
                    self._squared_floor += rounding
            state = add(state, increment)
            if rounding is not None:
                rounding += squared_rounding(state, increment, self.rounding)
        return inputs

    def _end(self, layers: Sequence[int], start: State, mine: dict[int, State]) -> State:
        """Return the state after the window: its first state plus all increments, added in the order of the layers.

        Where each worker does that for its share of the rows, the order of the sum is the same, and so is the result, bit for bit.
        """
        rows = self._share.rows(start)
        for increment in self._share.of_increments(layers, mine, WINDOW_END):
            rows = add(rows, increment)
        return self._share.joined(rows, WINDOW_END)
