"""The state of a block as one flat tensor: all weights, then all moments of the optimizer, then a step count for each parameter.

Moments are what the optimizer keeps for a parameter, such as AdamW's averages of gradients. If the optimizer's state is sharded over the
replicas, a worker's state has the moments of its share only; those of a whole parameter are joined from the states of all replicas.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rayllp.engine import Engine
from rayllp.errors import ClusterError


class ParameterLayout(NamedTuple):
    """The layout of one parameter's part of a state.

    Attributes:
        name, shape: those of the parameter.
        moments: number of elements of each moment, by the moment's name.
        start, stop: the range of the flattened parameter that the moments belong to.
    """

    name: str
    shape: tuple[int, ...]
    moments: dict[str, int]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements of the parameter."""
        return math.prod(self.shape)


class StateLayout(NamedTuple):
    """The layout of a state: what is where in the flat tensor.

    Attributes:
        parameters: the layouts of the parameters, in order.
        has_weights: False for a state of moments and step counts only, whose weights other replicas have too.
    """

    parameters: tuple[ParameterLayout, ...]
    has_weights: bool = True

    @staticmethod
    def of(engine: Engine, names: Collection[str], replica: int, *, has_weights: bool = True) -> "StateLayout":
        """Return the layout of the state of some of a block's parameters.

        Args:
            replica: the replica whose share of the optimizer's state it is; 0 without sharding.
        """
        parameters, share = [], engine.optimizer.shares[replica]
        for name in names:
            parameter, part = engine.block.parameters[name], share.get(name, range(0))
            shape, shapes = tuple(parameter.shape), engine.optimizer.moments_of(parameter)
            # A moment of another shape than its parameter belongs to a parameter that is not split over replicas.
            moments = {key: len(part) if of == shape else math.prod(of) * bool(part) for key, of in shapes.items()}
            parameters.append(ParameterLayout(name, shape, moments, part.start, part.stop))
        return StateLayout(tuple(parameters), has_weights)

    @property
    def names(self) -> set[str]:
        """Names of the parameters."""
        return {parameter.name for parameter in self.parameters}

    @property
    def weights(self) -> int:
        """Number of elements of all weights, which come first in a state."""
        return sum(parameter.size for parameter in self.parameters) if self.has_weights else 0

    @property
    def size(self) -> int:
        """Number of elements in all."""
        return self.weights + sum(sum(parameter.moments.values()) + 1 for parameter in self.parameters)

    @property
    def without_weights(self) -> "StateLayout":
        """The layout of the same state without its weights."""
        return self._replace(has_weights=False)


class ParameterState(NamedTuple):
    """One parameter's part of a state, as flat tensors.

    Attributes:
        layout: describes the parameter.
        weights: None if the state has no weights.
        moments: in the order of `layout.moments`.
        steps: number of steps that the optimizer has done; for an optimizer that does not count them, 1 after its first step.
    """

    layout: ParameterLayout
    weights: Tensor | None
    moments: tuple[Tensor, ...]
    steps: float


def split_state(state: Tensor, layout: StateLayout) -> list[ParameterState]:
    """Split a state by parameters; the tensors are views.

    Raises:
        ClusterError: the state does not have this layout.
    """
    if state.shape != (layout.size,):
        raise ClusterError(f"a state of {tuple(state.shape)} numbers, of which a block of this layout has {layout.size}")
    counts = state[len(state) - len(layout.parameters) :].tolist()
    return [ParameterState(*views, count) for views, count in zip(_split(state, layout), counts, strict=True)]


def _split(state: Tensor, layout: StateLayout) -> Iterator[tuple[ParameterLayout, Tensor | None, tuple[Tensor, ...]]]:
    """Yield each parameter's layout, weights and moments; the tensors are views."""
    weights_start, moments_start = 0, layout.weights
    for parameter in layout.parameters:
        moments_stop = moments_start + sum(parameter.moments.values())
        weights = state[weights_start : weights_start + parameter.size] if layout.has_weights else None
        yield parameter, weights, state[moments_start:moments_stop].split(list(parameter.moments.values()))
        weights_start, moments_start = weights_start + parameter.size, moments_stop


def join_optimizer_state(parts: Sequence[ParameterState], wanted: range, *, counted: bool) -> dict[str, Tensor]:
    """Join the optimizer's state of one parameter, or of a range of it, from parts; empty before the first step.

    Args:
        parts: in any order; where they overlap they agree.
        wanted: range of the flattened parameter.
        counted: True if the optimizer's state contains "step", the number of steps done.

    Returns: flat moments by name, and "step" if it is counted.

    Raises:
        ClusterError: the parts do not cover the range.
    """
    held = [part for part in parts if max(part.layout.start, wanted.start) < min(part.layout.stop, wanted.stop)]
    held.sort(key=lambda part: part.layout.start)
    covered = wanted.start
    for part in held:
        if part.layout.start <= covered:
            covered = max(covered, part.layout.stop)
    if covered < wanted.stop:
        raise ClusterError(f"the optimizer's state of {parts[0].layout.name} is not in the states of the workers that had it")
    if not held or not held[0].steps:
        return {}
    joined: dict[str, Tensor] = {}
    for part in held:
        start, stop = max(part.layout.start, wanted.start), min(part.layout.stop, wanted.stop)
        for name, moment in zip(part.layout.moments, part.moments, strict=True):
            if len(moment) != part.layout.stop - part.layout.start:  # the moment of a parameter that is not split
                joined[name] = moment
                continue
            joined.setdefault(name, moment.new_empty(len(wanted)))[start - wanted.start : stop - wanted.start] = moment[
                start - part.layout.start : stop - part.layout.start
            ]
    return joined | ({"step": torch.tensor(held[0].steps)} if counted else {})


class BlockState:
    """Reads and writes a block's state, shape (size,), in the dtype of the weights.

    Args:
        names: the parameters that it covers; None: all of the block.
        has_weights: False for a state of moments and step counts only.
    """

    def __init__(self, engine: Engine, names: Collection[str] | None = None, *, has_weights: bool = True) -> None:
        self.engine, optimizer = engine, engine.optimizer
        self.layout = StateLayout.of(
            engine, engine.block.parameters if names is None else names, optimizer.replica, has_weights=has_weights
        )
        self.parameters: list[nn.Parameter] = [engine.block.parameters[layout.name] for layout in self.layout.parameters]
        self.dtype = engine.block.dtype
        self.size = self.layout.size

    @property
    def copied(self) -> slice:
        """The part of the state that no other worker has: all of it, or only moments and step counts if those are sharded over replicas."""
        return slice(self.layout.weights if self.engine.optimizer.is_sharded else 0, self.size)

    def new_buffer(self) -> Tensor:
        """Return an uninitialised state, shape (size,), in host memory, pinned if the block is on a GPU."""
        return torch.empty(self.size, dtype=self.dtype, pin_memory=self.engine.device.type == "cuda")

    def copy_into(self, buffer: Tensor) -> None:
        """Copy the block's state into `buffer`, a tensor like those of `new_buffer`."""
        targets, sources = [], []
        for parameter, (layout, weights, moments) in zip(self.parameters, _split(buffer, self.layout), strict=True):
            state = self.engine.optimizer.state_of(parameter)
            if weights is not None:
                targets.append(weights)
                sources.append(parameter.data.reshape(-1))
            for name, target in zip(layout.moments, moments, strict=True):
                if name in state:
                    targets.append(target)
                    sources.append(state[name].reshape(-1))
                else:
                    target.zero_()
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)
        buffer[-len(self.parameters) :] = torch.tensor([self._count(p) for p in self.parameters], dtype=self.dtype)
        if self.engine.device.type == "cuda":
            torch.cuda.current_stream(self.engine.device).synchronize()

    def restore(self, state: Tensor) -> None:
        """Set the block to a state that `copy_into` has copied."""
        self.restore_from([(self.layout, state)])

    def restore_from(self, states: Sequence[tuple[StateLayout, Tensor]]) -> None:
        """Restore the block from the states of workers over which layers or moments were distributed differently.

        Args:
            states: the workers' states, each with its layout.

        Raises:
            ClusterError: a parameter, or a part of its moments, is in none of them.
        """
        tied, by_name = self.engine.block.architecture.tied_to, states_by_name(states)
        for parameter, layout in zip(self.parameters, self.layout.parameters, strict=True):
            parts = by_name.get(layout.name) or by_name.get(tied.get(layout.name, layout.name), [])
            weights = next((part.weights for part in parts if part.weights is not None), None)
            if weights is None or any(part.layout.shape != layout.shape for part in parts):
                raise ClusterError(f"{layout.name} {layout.shape} is not in the states of the workers that had this block's layers")
            mine = range(layout.start, layout.stop)
            self._put(parameter, weights, join_optimizer_state(parts, mine, counted=self.engine.optimizer.counts_steps(parameter)))

    def _put(self, parameter: nn.Parameter, weights: Tensor | None, optimizer_state: Mapping[str, Tensor]) -> None:
        if weights is not None:
            parameter.data.copy_(weights.view(parameter.shape))
        self.engine.optimizer.set_state(parameter, optimizer_state)

    def _count(self, parameter: nn.Parameter) -> float:
        state = self.engine.optimizer.state_of(parameter)
        return float(state.get("step", bool(state)))


def states_by_name(states: Iterable[tuple[StateLayout, Tensor]]) -> dict[str, list[ParameterState]]:
    """Return the parts of these states, each state given with its layout, by the name of the parameter."""
    parts: dict[str, list[ParameterState]] = {}
    for part in chain.from_iterable(split_state(state, layout) for layout, state in states):
        parts.setdefault(part.layout.name, []).append(part)
    return parts
