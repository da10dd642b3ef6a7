"""The state of a block as one flat tensor: weights, then the optimizer's averages, then step counts, each parameter by parameter.

Where replicas share out the optimizer's state, a worker's state has the averages of its share alone; those of a whole parameter are joined
from the states of all replicas.
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
    """What a state has of a parameter.

    Attributes:
        moments: by name, how many numbers there are of each average that the optimizer keeps of it.
        start, stop: the part of the flattened parameter whose averages these are.
    """

    name: str
    shape: tuple[int, ...]
    moments: dict[str, int]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Numbers of the parameter."""
        return math.prod(self.shape)


class Layout(NamedTuple):
    """Where a state has what.

    Attributes:
        places: the parameters, in order.
        has_weights: False: averages and step counts alone, of a share whose weights other replicas have too.
    """

    places: tuple[Place, ...]
    has_weights: bool = True

    @staticmethod
    def of(engine: Engine, names: Collection[str], replica: int, *, has_weights: bool = True) -> "Layout":
        """Of some of a block's parameters.

        Args:
            replica: whose share of the optimizer's state it is; 0 where none is shared out.
        """
        places, share = [], engine.optimizer.shares[replica]
        for name in names:
            parameter, part = engine.block.parameters[name], share.get(name, range(0))
            shape, shapes = tuple(parameter.shape), engine.optimizer.moments_of(parameter)
            # An average of another shape is of a parameter that is not cut.
            moments = {key: len(part) if of == shape else math.prod(of) * bool(part) for key, of in shapes.items()}
            places.append(Place(name, shape, moments, part.start, part.stop))
        return Layout(tuple(places), has_weights)

    @property
    def names(self) -> set[str]:
        """Of the parameters."""
        return {place.name for place in self.places}

    @property
    def weights(self) -> int:
        """Numbers of the weights, with which a state begins."""
        return sum(place.size for place in self.places) if self.has_weights else 0

    @property
    def size(self) -> int:
        """Numbers in all."""
        return self.weights + sum(sum(place.moments.values()) + 1 for place in self.places)

    @property
    def without_weights(self) -> "Layout":
        """Of what comes after them."""
        return self._replace(has_weights=False)


class Part(NamedTuple):
    """What a state has of a parameter, flat.

    Attributes:
        weights: None where the state has none.
        moments: as named by its place.
        steps: that the optimizer has done; of one that does not count them, 1 once it has done any.
    """

    place: Place
    weights: Tensor | None
    moments: tuple[Tensor, ...]
    steps: float


def parts_of(state: Tensor, layout: Layout) -> list[Part]:
    """A state parameter by parameter: views.

    Raises:
        ClusterError: it is not of this layout.
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
    """The optimizer's state of one parameter, or of a part of it, flat, from other parts; nothing before the first step.

    Args:
        parts: in any order; they may overlap, and then agree.
        wanted: which numbers of the flattened parameter.
        counted: whether it has "step", the number of steps done.

    Raises:
        ClusterError: they do not have all of it.
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
            if len(moment) != part.place.stop - part.place.start:  # of a parameter that is not cut
                found[name] = moment
                continue
            found.setdefault(name, moment.new_empty(len(wanted)))[start - wanted.start : stop - wanted.start] = moment[
                start - part.place.start : stop - part.place.start
            ]
    return found | ({"step": torch.tensor(held[0].steps)} if counted else {})


class BlockState:
    """Reads and writes a block's state, shape (size,), in the weights' dtype.

    Args:
        names: of the parameters that it is of; None: all.
        has_weights: False: averages and step counts alone.
    """

    def __init__(self, engine: Engine, names: Collection[str] | None = None, *, has_weights: bool = True) -> None:
        self.engine, optimizer = engine, engine.optimizer
        self.layout = Layout.of(engine, engine.block.parameters if names is None else names, optimizer.replica, has_weights=has_weights)
        self.parameters: list[nn.Parameter] = [engine.block.parameters[place.name] for place in self.layout.places]
        self.dtype = engine.block.dtype
        self.size = self.layout.size

    @property
    def copied(self) -> slice:
        """What nobody but this worker has: all of it, or where replicas share out the optimizer's state what is behind the weights."""
        return slice(self.layout.weights if self.engine.optimizer.is_sharded else 0, self.size)

    def room(self) -> Tensor:
        """An empty state on the host; where the block is on a GPU, in pinned memory."""
        return torch.empty(self.size, dtype=self.dtype, pin_memory=self.engine.device.type == "cuda")

    def take(self, into: Tensor) -> None:
        """Copy the block's state."""
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
        """Make the block what it was."""
        self.gather([(self.layout, state)])

    def gather(self, states: Sequence[tuple[Layout, Tensor]]) -> None:
        """Make the block what it was when its layers, or the optimizer's state of them, were shared out otherwise.

        Args:
            states: of the workers that had them, each with its layout.

        Raises:
            ClusterError: a parameter, or a part of its state, is in none of them.
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
    """By parameter, what these states, each of its layout, have of it."""
    found: dict[str, list[Part]] = {}
    for part in chain.from_iterable(parts_of(state, layout) for layout, state in states):
        found.setdefault(part.place.name, []).append(part)
    return found
