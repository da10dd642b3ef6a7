"""How strongly each layer depends on the one before it, and where windows therefore have to be short.

In a window's first sweep, a layer is evaluated at the window's first state and not at the state that the layers before it lead to. What
this costs is the change of the layer's increment between the two. The coupling of layer n is that change over one layer, relative to the
state, on the exact trajectory:

    κ_n = ‖d_n(u_n) − d_n(u_{n−1})‖ / ‖u_n‖,   d_n(x) = Φ_n(x) − x

To first order, a layer that is evaluated m layers too early is wrong by the sum of m couplings, and each of them is about as large as κ_n.
A window's error is the sum over its layers, so windows of equal error follow from the couplings alone: they are the error control that
solvers of differential equations have for their step size, with a layer as the smallest step. The adjoint has couplings of its own.
"""

from collections.abc import Sequence
from math import factorial

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.mgrit.propagator import Propagator
from rayllp.mgrit.windows import Placement
from rayllp.state import State, squared_norm, subtract

WINDOW_ERROR = 0.1
"""The relative error that a window is to have after its sweeps."""


def choose_windows(couplings: Sequence[float], longest: int, sweeps: int) -> tuple[int, ...]:
    """Return the lengths of as few windows as possible of which none has a larger error than `WINDOW_ERROR` after these sweeps.

    The error after k sweeps is estimated as E^k / k!, where E is the error after the first one.

    Args:
        couplings: those of the second layer to the last one. What is not finite ends a window.
        longest: the largest number of layers in a window.
        sweeps: number of sweeps in each window.
    """
    limit = (factorial(sweeps) * WINDOW_ERROR) ** (1 / sweeps)
    lengths, error = [1], 0.0
    for coupling in couplings:
        error += lengths[-1] * coupling
        if lengths[-1] < longest and error <= limit:
            lengths[-1] += 1
        else:
            lengths.append(1)
            error = 0.0
    return tuple(lengths)


def window_step_cost(windows: Sequence[int], forward: int, backward: int, workers: int) -> float:
    """Return the time of a step by windows, in forward evaluations of a layer, if messages cost nothing.

    Args:
        windows: lengths of the windows, none longer than there are workers.
        forward, backward: number of sweeps.
        workers: number of workers.
    """
    chained = sum(length == 1 for length in windows)
    sweeps = sum(min(forward, length) + min(backward, length) + 1 for length in windows if length > 1)
    return sweeps + 2 * chained + 2 * chained / workers


def exact_step_cost(layers: int, workers: int) -> float:
    """Return the same of an exact step with layers in turn, whose batch is not split."""
    return 2 * layers + 2 * layers / workers


def solve_with_couplings(
    placement: Placement,
    propagator: Propagator,
    channel: Channel,
    initial: State | None,
    spec: StateSpec,
    tag: MessageTag,
    *,
    source: int,
    destination: int,
    adjoint: bool = False,
) -> tuple[State | None, Tensor]:
    """Solve exactly, layer after layer and from worker to worker, and measure the couplings on the way.

    Each worker passes a layer's first state on before it takes the layer, so the next worker evaluates its layer there in the meantime.

    Args:
        initial: the first state, on worker `source`.
        destination: the worker that is to get the last state.
        adjoint: solve from the last layer to the first. The forward leaves graphs (`last_step`); the adjoint forms no parameter gradients.

    Returns: the last state, on worker `destination`, and None on the others; and the squared couplings by layer, in the order of the
        network: float64, zeros for other workers' layers and for the first one of the solve.
    """
    rank, in_order, early = channel.rank, tag.at("in order", 0), tag.at("a layer early", 0)
    order = range(len(placement.owners))[::-1] if adjoint else range(len(placement.owners))
    # Who has the state before the first layer, after each layer but the last, and at the end.
    workers = [source, *(placement.owners[layer] for layer in order), destination]
    squared = torch.zeros(len(order), dtype=torch.float64, device=spec.device)
    take = propagator.step if adjoint else (lambda layer, state: propagator.last_step(layer, state, None))

    state = initial
    before: State | None = None
    if rank == source != workers[1]:
        assert state is not None
        channel.send(state, workers[1], in_order)
    for place, layer in enumerate(order):
        behind, here, ahead = workers[place : place + 3]
        if here != rank:
            continue
        increment = None
        if place:
            before = before if behind == rank else channel.receive(spec, behind, early)
            assert before is not None
            increment = subtract(propagator.step(layer, before), before)
        state = state if behind == rank else channel.receive(spec, behind, in_order)
        assert state is not None
        if ahead != rank and place + 1 < len(order):
            channel.send(state, ahead, early)
        after = take(layer, state)
        if increment is not None:
            change = squared_norm(subtract(subtract(after, state), increment))
            squared[layer] = change / squared_norm(state).clamp_min(torch.finfo(torch.float64).tiny)
        if ahead != rank:
            channel.send(after, ahead, in_order)
        state, before = after, state
    if rank == destination != workers[-2]:
        state = channel.receive(spec, workers[-2], in_order)
    return (state if rank == destination else None), squared
