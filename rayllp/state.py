"""Arithmetic on states. A state is a tensor or a tuple of tensors (an encoder–decoder carries two)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...]


def tensors(state: State) -> tuple[Tensor, ...]:
    """Return the state's tensors, in order."""
    return (state,) if isinstance(state, Tensor) else state


def like(state: State, parts: tuple[Tensor, ...]) -> State:
    """Return these tensors in the form of `state`: a bare tensor if `state` is one, otherwise a tuple."""
    if isinstance(state, Tensor):
        return parts[0]
    return parts or type(state)()  # the planner has an empty state of its own type (`plan/recording.py`)


def combine(function: Callable[..., Tensor], first: State, *others: State) -> State:
    """Apply `function` to the states tensor by tensor, and return the results as a state."""
    return like(first, tuple(function(*group) for group in zip(tensors(first), *map(tensors, others), strict=True)))


def add(x: State, y: State) -> State:
    """Return x + y."""
    return combine(torch.add, x, y)


def subtract(x: State, y: State) -> State:
    """Return x − y."""
    return combine(torch.sub, x, y)


def interpolate(x: State, y: State, weight: float) -> State:
    """Return x + weight·(y − x)."""
    return combine(lambda a, b: torch.lerp(a, b, weight), x, y)


def detach(state: State) -> State:
    """Return the same values without their autograd graph."""
    return combine(torch.Tensor.detach, state)


def squared_norm(state: State) -> Tensor:
    """Return the squared 2-norm as a float64 scalar on the state's device, without host synchronisation."""
    parts = [part.detach().double().square().sum() for part in tensors(state)]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def squared_norms(states: Sequence[State]) -> Tensor:
    """Return the squared 2-norm of each of these states, which have the same shapes: float64, shape (states,).

    They are summed in single precision at least, and without copies in double precision.
    """
    groups = [
        torch.stack(torch._foreach_norm(list(same), 2, dtype=torch.promote_types(same[0].dtype, torch.float32)))
        for same in zip(*map(tensors, states), strict=True)
    ]
    if not groups:  # the planner's
        return torch.zeros(len(states), dtype=torch.float64)
    return torch.stack([norms.double() for norms in groups]).square().sum(0)
