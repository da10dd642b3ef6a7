"""How strongly each layer depends on the one before it, and where windows therefore have to be short.

In a window's first sweep, each layer is evaluated at the window's first state instead of at its true input. The error is the difference
between the layer's increments at these two states. The coupling of layer n is that difference for states one layer apart, relative to the
state, on the exact trajectory:

    κ_n = ‖d_n(u_n) − d_n(u_{n−1})‖ / ‖u_n‖,   d_n(x) = Φ_n(x) − x

To first order, a layer that is evaluated m layers too early is wrong by the sum of m couplings, and each of them is about as large as κ_n.
A window's error is the sum over its layers, so the couplings alone tell where to cut the network into windows of equal error (`cut_windows`
in `windows.py`), much as an ODE solver chooses its step size by an error estimate. The adjoint has couplings of its own.
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

    Each worker sends a layer's input on before it evaluates the layer, so that the next worker can evaluate its own layer there meanwhile.

    Args:
        owners: for each layer, the rank of the worker that owns it (`Placement.owners`).
        propagator: the steps of this worker's layers.
        communicator: for messages to the other workers.
        initial: the first state, on worker `source`.
        spec: shapes and dtypes of a state.
        source: the worker that has the first state.
        destination: the worker that is to get the last state.
        adjoint: solve from the last layer to the first. The forward solve records graphs (`last_step`), the adjoint forms no parameter
            gradients.

    Returns: the last state on worker `destination`, None elsewhere; and the squared couplings in the order of the network, float64 of shape
        (layers,), zero for other workers' layers and for the solve's first layer.
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
