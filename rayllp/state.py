"""Arithmetic on states. A state is a tensor, or a tuple of tensors (an encoder-decoder carries two)."""

from collections.abc import Callable

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...]


def tensors(state: State) -> tuple[Tensor, ...]:
    """The state's tensors, in order."""
    return (state,) if isinstance(state, Tensor) else state


def like(state: State, parts: tuple[Tensor, ...]) -> State:
    """`parts` in the form of `state`: a bare tensor where `state` is one."""
    if isinstance(state, Tensor):
        return parts[0]
    return parts or type(state)()  # of a kind of its own where there is nothing in it (`plan/schedule.py`)


def combine(function: Callable[..., Tensor], first: State, *others: State) -> State:
    """Apply `function` tensor by tensor."""
    return like(first, tuple(function(*group) for group in zip(tensors(first), *map(tensors, others), strict=True)))


def add(x: State, y: State) -> State:
    """x + y, part by part."""
    return combine(torch.add, x, y)


def subtract(x: State, y: State) -> State:
    """x − y, part by part."""
    return combine(torch.sub, x, y)


def interpolate(x: State, y: State, weight: float) -> State:
    """x + weight * (y - x)."""
    return combine(lambda a, b: torch.lerp(a, b, weight), x, y)


def detach(state: State) -> State:
    """The same values without a graph."""
    return combine(torch.Tensor.detach, state)


def squared_norm(state: State) -> Tensor:
    """The squared 2-norm as a float64 scalar on the state's device (no host synchronisation)."""
    parts = [part.detach().double().square().sum() for part in tensors(state)]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
