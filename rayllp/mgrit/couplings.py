"""How strongly each layer depends on the one before it, and where windows therefore have to be short.

In a window's first sweep, a layer is evaluated at the window's first state and not at the state that the layers before it lead to. What
this costs is the change of the layer's increment between the two. The coupling of layer n is that change over one layer, relative to the
state, on the exact trajectory:

    κ_n = ‖d_n(u_n) − d_n(u_{n−1})‖ / ‖u_n‖,   d_n(x) = Φ_n(x) − x

To first order, a layer that is evaluated m layers too early is wrong by the sum of m couplings, and each of them is about as large as κ_n.
A window's error is the sum over its layers, so windows of equal error follow from the couplings alone: they are the error control that
solvers of differential equations have for their step size, with a layer as the smallest step (`cut_windows` in `windows.py`). The adjoint
has couplings of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayllp.channel.base import StateSpec
from rayllp.mgrit.communicator import Communicator
from rayllp.mgrit.propagator import Propagator
from rayllp.mgrit.relay import own_steps
from rayllp.state import State, squared_norm, subtract


def solve_with_couplings(
    owners: Sequence[int],
    propagator: Propagator,
    communicator: Communicator,
    initial: State | None,
    spec: StateSpec,
    *,
    source: int,
    destination: int,
    adjoint: bool = False,
) -> tuple[State | None, Tensor]:
    """Solve exactly, layer after layer and from worker to worker, and measure the couplings on the way.

    Each worker passes a layer's first state on before it takes the layer, so the next worker evaluates its layer there in the meantime.

    Args:
        owners: for each layer, the worker that owns it; as `Placement.cyclic` has them.
        propagator: the steps of this worker's layers.
        communicator: for messages to the other workers.
        initial: the first state, on worker `source`.
        spec: shapes and dtypes of a state.
        source: the worker that has the first state.
        destination: the worker that is to get the last state.
        adjoint: solve from the last layer to the first. The forward leaves graphs (`last_step`); the adjoint forms no parameter gradients.

    Returns: the last state, on worker `destination`, and None on the others; and the squared couplings by layer, in the order of the
        network: float64, zeros for other workers' layers and for the first one of the solve.
    """
    rank, in_order, early = communicator.rank, "in order", "a layer early"
    order = range(len(owners))[:: -1 if adjoint else 1]
    owners = [owners[layer] for layer in order]
    squared = torch.zeros(len(order), dtype=torch.float64, device=spec.device)
    take = propagator.step if adjoint else (lambda layer, state: propagator.last_step(layer, state, None))

    state = initial
    before: State | None = None
    if rank == source != owners[0]:
        assert state is not None
        communicator.send(state, owners[0], in_order, 0)
    for place, behind, ahead in own_steps(owners, rank, source=source, destination=destination):
        layer, increment = order[place], None
        if place:
            before = before if behind == rank else communicator.receive(spec, behind, early, 0)
            assert before is not None
            increment = subtract(propagator.step(layer, before), before)
        state = state if behind == rank else communicator.receive(spec, behind, in_order, 0)
        assert state is not None
        if ahead != rank and place + 1 < len(order):
            communicator.send(state, ahead, early, 0)
        after = take(layer, state)
        if increment is not None:
            change = squared_norm(subtract(subtract(after, state), increment))
            squared[layer] = change / squared_norm(state).clamp_min(torch.finfo(torch.float64).tiny)
        if ahead != rank:
            communicator.send(after, ahead, in_order, 0)
        state, before = after, state
    if rank == destination != owners[-1]:
        state = communicator.receive(spec, owners[-1], in_order, 0)
    return (state if rank == destination else None), squared
