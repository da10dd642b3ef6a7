"""How strongly each layer depends on the one before it, which says how accurate a window is (`fitting.py`).

In a window's first sweep, each layer is evaluated at the window's first state instead of at its true input. The error is the difference
between the layer's increments at these two states. The coupling of layer n is that difference for states one layer apart, on the exact
trajectory:

    κ_n = ‖d_n(u_n) − d_n(u_{n−1})‖,   d_n(x) = Φ_n(x) − x

Later sweeps pass errors on from layer to layer. The gain of layer n is how much its increment changes for such an error of its input, over
the size of that error, where the error is the one that layer n − 1 makes if it is evaluated a layer too early:

    g_n = ‖d_n(u_n) − d_n(u_n − δ_{n−1})‖ / ‖δ_{n−1}‖,   δ_n = d_n(u_n) − d_n(u_{n−1})

It is not κ_n / ‖d_{n−1}‖: at Δt = 1 layers were up to five times as sensitive to errors as to their predecessors' increments. The adjoint
solve has couplings and gains of its own.

Not every error of a state matters alike: an encoder's output may be off while a decoder hardly looks at it yet, and padding may be
anything. What an error e of a state does to the loss is, to first order, ⟨λ, e⟩ with the adjoint λ of that state. So forward norms are
weighted by it, element by element, ‖λ_{n+1} ∘ x‖ (goal-oriented error estimation by dual-weighted residuals, Becker and Rannacher 2001).
All are relative to the same norm of the state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllp.channel.base import StateSpec
from rayllp.mgrit.communicator import Communicator
from rayllp.mgrit.propagator import Propagator
from rayllp.mgrit.relay import own_steps
from rayllp.state import State, squared_norm, subtract, tensors


@dataclass(frozen=True)
class Visit:
    """What a solve has found at a layer.

    Attributes:
        layer: its number.
        before, after: the states before and after it.
        change: of its increment, if it is evaluated at the state one layer earlier; None for the solve's first layer.
        error: of `before`, if the layer before is evaluated one layer too early; None for the solve's first two layers.
        response: the change of the increment for that error.
    """

    layer: int
    before: State
    after: State
    change: State | None = None
    error: State | None = None
    response: State | None = None


@dataclass(frozen=True)
class Coupling:
    """How strongly layers depend on each other in one direction, in the order of the network; 0 where a solve has no layer before.

    Attributes:
        couplings: κ of each layer, relative to the state after it.
        increments: sizes of the increments, relative to the same.
        gains: of the layers.
    """

    couplings: tuple[float, ...]
    increments: tuple[float, ...]
    gains: tuple[float, ...]


@dataclass(frozen=True)
class Couplings:
    """How strongly layers depend on each other.

    Attributes:
        forward, adjoint: in the two solves.
    """

    forward: Coupling
    adjoint: Coupling

    @staticmethod
    def read(table: Tensor) -> "Couplings":
        """Return the couplings from `CouplingTable.squared`, summed over all workers."""
        rows = [tuple(row) for row in table.sqrt().tolist()]
        return Couplings(Coupling(*rows[:3]), Coupling(*rows[3:]))

    @staticmethod
    def restored(kept: Mapping[str, Mapping[str, Sequence[float]]]) -> "Couplings":
        """Return couplings from their dict (`dataclasses.asdict`), whose tuples may have become lists."""
        forward, adjoint = (Coupling(**{name: tuple(row) for name, row in kept[way].items()}) for way in ("forward", "adjoint"))
        return Couplings(forward, adjoint)


class CouplingTable:
    """What one worker measures during an exact solve and its adjoint.

    Args:
        layers: number of layers, of all workers.
        device: of the states.

    Attributes:
        squared: squares of the numbers of `Couplings`, a row each; float64 of shape (6, layers), zeros for other workers' layers.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.squared = torch.zeros((6, layers), dtype=torch.float64, device=device)
        self._visits: dict[int, Visit] = {}

    def visit_forward(self, visit: Visit) -> None:
        """Keep what the adjoint solve will weight."""
        self._visits[visit.layer] = visit

    def visit_adjoint(self, visit: Visit) -> None:
        """Measure a layer in both directions."""
        forward = self._visits.pop(visit.layer)
        # The adjoint comes from the other side: what it has before the layer is the weight of the state after it.
        self.squared[:3, visit.layer] = self._measure(forward, before=visit.after, after=visit.before)
        self.squared[3:, visit.layer] = self._measure(visit, before=None, after=None)

    def _measure(self, visit: Visit, before: State | None, after: State | None) -> Tensor:
        """Return the squares of a layer's coupling, increment and gain.

        Args:
            visit: what the solve has found.
            before, after: weights of the states before and after the layer; None: they are not weighted.
        """
        reached = self._squared(visit.after, after)
        coupling, increment, response = (
            _ratio(self._squared(state, after), reached) for state in (visit.change, subtract(visit.after, visit.before), visit.response)
        )
        error = _ratio(self._squared(visit.error, before), self._squared(visit.before, before))
        return torch.stack([coupling, increment, _ratio(response, error)])

    def _squared(self, state: State | None, weight: State | None) -> Tensor:
        """Return the squared norm of a state, multiplied by a weight element by element if there is one; 0 for None."""
        if state is None:
            return torch.zeros((), dtype=torch.float64, device=self.squared.device)
        if weight is None:
            return squared_norm(state).double()
        pairs = zip(tensors(state), tensors(weight), strict=True)
        return torch.stack([(part.double() * other.double()).square().sum() for part, other in pairs]).sum()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, or 0 if the whole is 0: no sample that was measured has a term of the loss, or two layers are independent."""
    return torch.where(whole == 0, 0.0, part / whole)


def solve_a_layer_early(
    owners: Sequence[int],
    propagator: Propagator,
    communicator: Communicator,
    initial: State | None,
    spec: StateSpec,
    visit: Callable[[Visit], None],
    *,
    source: int,
    destination: int,
    adjoint: bool = False,
) -> State | None:
    """Solve exactly, layer after layer and from worker to worker, and evaluate each layer a layer too early on the way.

    Each worker sends a layer's input on before it evaluates the layer, so that the next worker can evaluate its own layer there meanwhile.
    After it has sent the output on, it sends the output that the early evaluation would have given.

    Args:
        owners: for each layer, the rank of the worker that owns it (`Placement.owners`).
        propagator: the steps of this worker's layers.
        communicator: for messages to the other workers.
        initial: the first state, on worker `source`.
        spec: shapes and dtypes of a state.
        visit: called for each of this worker's layers.
        source: the worker that has the first state.
        destination: the worker that is to get the last state.
        adjoint: solve from the last layer to the first. The forward solve records graphs (`last_step`), the adjoint forms no parameter
            gradients.

    Returns: the last state on worker `destination`, None elsewhere.

    Raises:
        ChannelError: a message did not arrive in time.
    """
    rank, in_order, early, off = communicator.rank, "in order", "a layer early", "off by the error"
    order = range(len(owners))[:: -1 if adjoint else 1]
    owners = [owners[layer] for layer in order]
    take = propagator.step if adjoint else (lambda layer, state: propagator.last_step(layer, state, None))

    def increment(layer: int, state: State) -> State:
        return subtract(propagator.step(layer, state), state)

    def taken(own: State | None, behind: int, phase: str) -> State:
        state = own if behind == rank else communicator.receive(spec, behind, phase, 0)
        assert state is not None
        return state

    state = initial
    before: State | None = None  # the input of the layer before
    wrong: State | None = None  # the input, if the layer before was evaluated a layer too early
    if rank == source != owners[0]:
        communicator.send(taken(initial, rank, in_order), owners[0], in_order, 0)
    for place, behind, ahead in own_steps(owners, rank, source=source, destination=destination):
        layer, goes_on = order[place], ahead != rank and place + 1 < len(order)
        evaluated_early = increment(layer, taken(before, behind, early)) if place else None
        state = taken(state, behind, in_order)
        # Received before this worker sends: over NCCL, two workers that both send first wait for each other for ever.
        wrong = taken(wrong, behind, off) if place > 1 else None
        if goes_on:
            communicator.send(state, ahead, early, 0)
        after = take(layer, state)
        if ahead != rank:
            communicator.send(after, ahead, in_order, 0)
        own = subtract(after, state)
        change = None if evaluated_early is None else subtract(own, evaluated_early)
        next_wrong = None if change is None else subtract(after, change)
        if goes_on and next_wrong is not None:
            communicator.send(next_wrong, ahead, off, 0)
        error, response = (None, None) if wrong is None else (subtract(state, wrong), subtract(own, increment(layer, wrong)))
        visit(Visit(layer, state, after, change, error, response))
        state, before, wrong = after, state, next_wrong
    if rank == destination != owners[-1]:
        state = communicator.receive(spec, owners[-1], in_order, 0)
    return state if rank == destination else None
