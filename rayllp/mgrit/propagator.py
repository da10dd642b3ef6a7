"""What the solver knows of a model: a step of one layer, and how a coarse step is made from it."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from rayllp.state import State, interpolate


class Propagator(Protocol):
    """The steps of the layers that this worker owns: forward, x_n -> x_{n+1}, or adjoint, λ_{n+1} -> λ_n.

    A state is never changed in place, neither the one that is given nor the one that is returned.
    """

    def step(self, layer: int, state: State) -> State:
        """Take one fine step inside an iteration. No parameter gradient is formed."""
        ...

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        """Take one fine step of the last sweep: forward records the layer's graph, adjoint adds its parameter gradients.

        Args:
            known: what `step` has returned for this very state; None if it was not asked, or its answer is no longer held.
        """
        ...

    def defer(self, layer: int, state: State) -> bool:
        """Be told that a run's last sweep, from this layer and state on, is deferred. Returns False if it is never needed."""
        return True

    def steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Take `step` of several layers, each from a state of its own. A propagator that can evaluates them in one call."""
        return [self.step(layer, state) for layer, state in zip(layers, states, strict=True)]

    def last_steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Take `last_step` of several layers, with `known` None for each."""
        return [self.last_step(layer, state, None) for layer, state in zip(layers, states, strict=True)]


class EvaluationCache:
    """A propagator's evaluations, kept so that no layer is evaluated twice from one state.

    The coarse step from a C-point and the fine step from it need the same Φ(x), and so do the FAS right-hand side and the sweep before it.
    Two states are the same if they are the same object: none is changed in place.

    Args:
        inner: what evaluates.
        layers: those that coarse levels evaluate. Only their evaluations are kept.
    """

    def __init__(self, inner: Propagator, layers: frozenset[int]) -> None:
        self.inner, self.layers = inner, layers
        # Two of each layer: a FAS right-hand side needs what was evaluated before the relaxation that came between.
        self._known: dict[int, deque[tuple[State, State]]] = {}

    def step(self, layer: int, state: State) -> State:
        """Take one step. Bypasses the cache."""
        return self.inner.step(layer, state)

    def cached_step(self, layer: int, state: State) -> State:
        """Take one step, or return what is held for this layer and state."""
        if layer not in self.layers:
            return self.inner.step(layer, state)
        known = self._look_up(layer, state)
        if known is None:
            known = self.inner.step(layer, state)
            self._known.setdefault(layer, deque(maxlen=2)).append((state, known))
        return known

    def may_hold(self, layers: Iterable[int]) -> bool:
        """True if any of these layers' evaluations may be cached."""
        return not self.layers.isdisjoint(layers)

    def steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Take one step of each layer. Bypasses the cache: coarse levels never evaluate these layers."""
        return self.inner.steps(layers, states)

    def last_step(self, layer: int, state: State) -> State:
        """Take one step of the last sweep. The propagator is told what is held for this state, and the layer's entries are dropped."""
        known = self._look_up(layer, state)
        self._known.pop(layer, None)
        return self.inner.last_step(layer, state, known)

    def last_steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Take one step of the last sweep of each layer. Bypasses the cache: coarse levels never evaluate these layers."""
        return self.inner.last_steps(layers, states)

    def defer(self, layer: int, state: State) -> bool:
        """Tell the propagator of a deferred run; False if it is never needed."""
        return self.inner.defer(layer, state)

    def _look_up(self, layer: int, state: State) -> State | None:
        return next((after for before, after in self._known.get(layer, ()) if before is state), None)


class CoarseOperator(Protocol):
    """Φ_c: a step over a whole interval, made of the fine step Φ of the layer at its C-point.

    `ratio` is the length of the coarse step over that of the fine one. The state that is returned has the shapes of the one given.
    """

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
