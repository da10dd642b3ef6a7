"""The state of a block as one flat tensor: all weights, then all moments of the optimizer, then a step count for each parameter.

Moments are what the optimizer keeps of a parameter, such as AdamW's averages of gradients. If the optimizer's state is sharded over the
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


class Place(NamedTuple):
    """What a state contains of one parameter.

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


class Layout(NamedTuple):
    """The layout of a state: what is where in the flat tensor.

    Attributes:
        places: the parameters, in order.
        has_weights: False for a state of moments and step counts only, whose weights other replicas have too.
    """

    places: tuple[Place, ...]
    has_weights: bool = True

    @staticmethod
    def of(engine: Engine, names: Collection[str], replica: int, *, has_weights: bool = True) -> "Layout":
        """Return the layout of the state of some of a block's parameters.

        Args:
            replica: the replica whose share of the optimizer's state it is; 0 without sharding.
        """
        places, share = [], engine.optimizer.shares[replica]
        for name in names:
            parameter, part = engine.block.parameters[name], share.get(name, range(0))
            shape, shapes = tuple(parameter.shape), engine.optimizer.moments_of(parameter)
            # A moment of another shape than its parameter belongs to a parameter that is not split over replicas.
            moments = {key: len(part) if of == shape else math.prod(of) * bool(part) for key, of in shapes.items()}
            places.append(Place(name, shape, moments, part.start, part.stop))
        return Layout(tuple(places), has_weights)

    @property
    def names(self) -> set[str]:
        """Names of the parameters."""
        return {place.name for place in self.places}

    @property
    def weights(self) -> int:
        """Number of elements of all weights, which come first in a state."""
        return sum(place.size for place in self.places) if self.has_weights else 0

    @property
    def size(self) -> int:
        """Number of elements in all."""
        return self.weights + sum(sum(place.moments.values()) + 1 for place in self.places)

    @property
    def without_weights(self) -> "Layout":
        """The layout of the same state without its weights."""
        return self._replace(has_weights=False)


class Part(NamedTuple):
    """What a state contains of one parameter, as flat tensors.

    Attributes:
        place: describes the parameter.
        weights: None if the state has no weights.
        moments: in the order of `place.moments`.
        steps: number of steps that the optimizer has done; for an optimizer that does not count them, 1 after its first step.
    """

    place: Place
    weights: Tensor | None
    moments: tuple[Tensor, ...]
    steps: float


def parts_of(state: Tensor, layout: Layout) -> list[Part]:
    """Split a state by parameters; the tensors are views.

    Raises:
        ClusterError: the state does not have this layout.
    """
    if state.shape != (layout.size,):
        raise ClusterError(f"a state of {tuple(state.shape)} numbers, of which a block of this layout has {layout.size}")
    counts = state[len(state) - len(layout.places) :].tolist()
    views = _views(state, layout)
    return [Part(place, weights, moments, count) for (place, weights, moments), count in zip(views, counts, strict=True)]


def _views(state: Tensor, layout: Layout) -> Iterator[tuple[Place, Tensor | None, tuple[Tensor, ...]]]:
    first, then = 0, layout.weights
    for place in layout.places:
        end = then + sum(place.moments.values())
        weights = state[first : first + place.size] if layout.has_weights else None
        yield place, weights, state[then:end].split(list(place.moments.values()))
        first, then = first + place.size, end


def join(parts: Sequence[Part], wanted: range, *, counted: bool) -> dict[str, Tensor]:
    """Join the optimizer's state of one parameter, or of a range of it, from parts; empty before the first step.

    Args:
        parts: in any order; where they overlap they agree.
        wanted: range of the flattened parameter.
        counted: True if the optimizer's state contains "step", the number of steps done.

    Returns: flat moments by name, and "step" if it is counted.

    Raises:
        ClusterError: the parts do not cover the range.
    """
    held = [part for part in parts if max(part.place.start, wanted.start) < min(part.place.stop, wanted.stop)]
    held.sort(key=lambda part: part.place.start)
    reached = wanted.start
    for part in held:
        if part.place.start <= reached:
            reached = max(reached, part.place.stop)
    place = parts[0].place
    if reached < wanted.stop:
        raise ClusterError(f"the optimizer's state of {place.name} is not in the states of the workers that had it")
    if not held or not held[0].steps:
        return {}
    found: dict[str, Tensor] = {}
    for part in held:
        start, stop = max(part.place.start, wanted.start), min(part.place.stop, wanted.stop)
        for name, moment in zip(part.place.moments, part.moments, strict=True):
            if len(moment) != part.place.stop - part.place.start:  # the moment of a parameter that is not split
                found[name] = moment
                continue
            found.setdefault(name, moment.new_empty(len(wanted)))[start - wanted.start : stop - wanted.start] = moment[
                start - part.place.start : stop - part.place.start
            ]
    return found | ({"step": torch.tensor(held[0].steps)} if counted else {})


class BlockState:
    """Reads and writes a block's state, shape (size,), in the dtype of the weights.

    Args:
        names: the parameters that it covers; None: all of the block.
        has_weights: False for a state of moments and step counts only.
    """

    def __init__(self, engine: Engine, names: Collection[str] | None = None, *, has_weights: bool = True) -> None:
        self.engine, optimizer = engine, engine.optimizer
        self.layout = Layout.of(engine, engine.block.parameters if names is None else names, optimizer.replica, has_weights=has_weights)
        self.parameters: list[nn.Parameter] = [engine.block.parameters[place.name] for place in self.layout.places]
        self.dtype = engine.block.dtype
        self.size = self.layout.size

    @property
    def copied(self) -> slice:
        """The part of the state that no other worker has: all of it, or only moments and step counts if those are sharded over replicas."""
        return slice(self.layout.weights if self.engine.optimizer.is_sharded else 0, self.size)

    def room(self) -> Tensor:
        """Return an empty state in host memory, pinned if the block is on a GPU."""
        return torch.empty(self.size, dtype=self.dtype, pin_memory=self.engine.device.type == "cuda")

    def take(self, into: Tensor) -> None:
        """Copy the block's state into this tensor."""
        rooms, sources = [], []
        for parameter, (place, weights, moments) in zip(self.parameters, _views(into, self.layout), strict=True):
            state = self.engine.optimizer.state_of(parameter)
            if weights is not None:
                rooms.append(weights)
                sources.append(parameter.data.reshape(-1))
            for name, room in zip(place.moments, moments, strict=True):
                if name in state:
                    rooms.append(room)
                    sources.append(state[name].reshape(-1))
                else:
                    room.zero_()
        if rooms:
            torch._foreach_copy_(rooms, sources, non_blocking=True)
        into[-len(self.parameters) :] = torch.tensor([self._count(p) for p in self.parameters], dtype=self.dtype)
        if self.engine.device.type == "cuda":
            torch.cuda.current_stream(self.engine.device).synchronize()

    def put(self, state: Tensor) -> None:
        """Set the block to a state that `take` has copied."""
        self.gather([(self.layout, state)])

    def gather(self, states: Sequence[tuple[Layout, Tensor]]) -> None:
        """Set the block to what it was, from states of workers among which layers or moments were distributed differently.

        Args:
            states: the workers' states, each with its layout.

        Raises:
            ClusterError: a parameter, or a part of its moments, is in none of them.
        """
        tied, known = self.engine.block.architecture.tied_to, by_name(states)
        for parameter, place in zip(self.parameters, self.layout.places, strict=True):
            parts = known.get(place.name) or known.get(tied.get(place.name, place.name), [])
            weights = next((part.weights for part in parts if part.weights is not None), None)
            if weights is None or any(part.place.shape != place.shape for part in parts):
                raise ClusterError(f"{place.name} {place.shape} is not in the states of the workers that had this block's layers")
            mine = range(place.start, place.stop)
            self._put(parameter, weights, join(parts, mine, counted=self.engine.optimizer.counts_steps(parameter)))

    def _put(self, parameter: nn.Parameter, weights: Tensor | None, kept: Mapping[str, Tensor]) -> None:
        if weights is not None:
            parameter.data.copy_(weights.view(parameter.shape))
        self.engine.optimizer.set_state(parameter, kept)

    def _count(self, parameter: nn.Parameter) -> float:
        state = self.engine.optimizer.state_of(parameter)
        return float(state.get("step", bool(state)))


def by_name(states: Iterable[tuple[Layout, Tensor]]) -> dict[str, list[Part]]:
    """Return what these states contain, by the name of the parameter.

    Args:
        states: each with its layout.
    """
    found: dict[str, list[Part]] = {}
    for part in chain.from_iterable(parts_of(state, layout) for layout, state in states):
        found.setdefault(part.place.name, []).append(part)
    return found
