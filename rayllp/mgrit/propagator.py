"""What the cycle knows of a model: a step of one layer, and how a coarse step is made from it."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from rayllp.state import State, interpolate


class Propagator(Protocol):
    """The steps of the layers that this worker owns: forward, x_n -> x_{n+1}, or adjoint, λ_{n+1} -> λ_n."""

    def step(self, layer: int, state: State) -> State:
        """One fine step inside an iteration: no parameter gradient is formed."""
        ...

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        """One fine step of the last sweep: forward records the layer's graph, adjoint adds its parameter gradients.

        Args:
            known: what `step` has given from this very state; None: it was not asked, or is forgotten.
        """
        ...

    def defer(self, layer: int, state: State) -> bool:
        """Be told that the last sweep's piece from this layer and state on is put off; whether it will be wanted at all."""
        return True

    def steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """`step` of several layers, each from a state of its own. What can, takes them in one call."""
        return [self.step(layer, state) for layer, state in zip(layers, states, strict=True)]

    def last_steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """`last_step` of several layers, of none of which anything is known."""
        return [self.last_step(layer, state, None) for layer, state in zip(layers, states, strict=True)]


class EvaluationCache:
    """A propagator whose steps are not taken twice from one state.

    The coarse step from a C-point and the fine step from it ask for the same Φ(x), and so do a FAS term and the sweep before it. A state is
    the same if it is the same object: none is changed in place.

    Args:
        layers: that coarse levels evaluate; others are not remembered.
    """

    def __init__(self, inner: Propagator, layers: frozenset[int]) -> None:
        self.inner, self.layers = inner, layers
        # Two of each layer: a FAS term asks for what was known before the relaxation that came between.
        self._known: dict[int, deque[tuple[State, State]]] = {}

    def step(self, layer: int, state: State) -> State:
        """As the inner one's; not remembered."""
        return self.inner.step(layer, state)

    def shared_step(self, layer: int, state: State) -> State:
        """The same, for steps that may be asked for again."""
        if layer not in self.layers:
            return self.inner.step(layer, state)
        known = self._recall(layer, state)
        if known is None:
            known = self.inner.step(layer, state)
            self._known.setdefault(layer, deque(maxlen=2)).append((state, known))
        return known

    def remembers(self, layers: Iterable[int]) -> bool:
        """Whether it remembers any of these."""
        return not self.layers.isdisjoint(layers)

    def steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """As the inner one's, of layers that are not remembered."""
        return self.inner.steps(layers, states)

    def last_steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """The same."""
        return self.inner.last_steps(layers, states)

    def defer(self, layer: int, state: State) -> bool:
        """As the inner one's."""
        return self.inner.defer(layer, state)

    def last_step(self, layer: int, state: State) -> State:
        """As the inner one's."""
        known = self._recall(layer, state)
        self._known.pop(layer, None)
        return self.inner.last_step(layer, state, known)

    def _recall(self, layer: int, state: State) -> State | None:
        return next((after for before, after in self._known.get(layer, ()) if before is state), None)


class CoarseOperator(Protocol):
    """Φ_c: a step over an interval whose length is `ratio` times the step of the layer at its C-point."""

    def __call__(self, fine_step: Callable[[State], State], state: State, ratio: float) -> State: ...


class Rediscretised:
    """Φ_c(x) = x + ω·ratio·(Φ(x) − x) = x + ω·c_f·h·F(x); ω = 1 is the paper's (arXiv:2601.09026, section 3.2).

    Written with the fine step Φ alone, so the same formula is the coarse adjoint when Φ is a vector-Jacobian product.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, fine_step: Callable[[State], State], state: State, ratio: float) -> State:
        return interpolate(state, fine_step(state), self.weight * ratio)


class Identity:
    """Φ_c(x) = x (ω = 0): the coarse solve becomes a prefix sum of the fine increments and evaluates no layer."""

    def __call__(self, fine_step: Callable[[State], State], state: State, ratio: float) -> State:
        return state


def coarse_operator(weight: float) -> CoarseOperator:
    """The coarse operator with step weight ω."""
    return Identity() if weight == 0 else Rediscretised(weight)
