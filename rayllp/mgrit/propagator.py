"""What the solver knows of a model: the step of one layer, and how a coarse step is made from it."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from rayllp.state import State, interpolate


class Propagator(Protocol):
    """The steps of the layers that this worker owns: forward, x_n -> x_{n+1}, or adjoint, λ_{n+1} -> λ_n.

    States are never changed in place, neither those that are passed in nor those that are returned.
    """

    def step(self, layer: int, state: State) -> State:
        """Take the fine step of one layer within an iteration. Forms no parameter gradient."""
        ...

    def last_step(self, layer: int, state: State, known: State | None) -> State:
        """Take the fine step of one layer in the last sweep: forward records the layer's graph, adjoint adds its parameter gradients.

        Args:
            known: the result of `step` for this very state, if it is still cached; otherwise None.
        """
        ...

    def tentative_step(self, layer: int, state: State) -> State:
        """Take the fine step of one layer in a sweep that may turn out to be its last. `settle` tells that it was.

        Forward this records the layer's graph, in place of an earlier one.
        """
        return self.last_step(layer, state, None)

    def settle(self, layer: int) -> None:
        """Note that the latest tentative step of this layer was its last. The adjoint adds the layer's parameter gradients."""
        return

    def defer(self, layer: int, state: State) -> bool:
        """Note that the last sweep of the run which begins at this layer, with this state, is deferred.

        Returns: False if the propagator will never need that sweep.
        """
        return True

    def steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Take the steps of several layers, each from its own state. Subclasses that evaluate several layers in one call override this."""
        return [self.step(layer, state) for layer, state in zip(layers, states, strict=True)]

    def last_steps(self, layers: Sequence[int], states: Sequence[State]) -> list[State]:
        """Take the last steps of several layers, each from its own state and without a cached result."""
        return [self.last_step(layer, state, None) for layer, state in zip(layers, states, strict=True)]


class EvaluationCache:
    """Steps of a propagator, cached so that no layer is evaluated twice from the same state.

    The coarse step and the fine step from a C-point need the same Φ(x), and so do the FAS right-hand side and the sweep before it.
    Two states count as the same if they are the same object, which is safe because states are never changed in place.

    Args:
        propagator: evaluates layers.
        layers: the layers that coarse levels evaluate. Only their evaluations are cached.
    """

    def __init__(self, propagator: Propagator, layers: frozenset[int]) -> None:
        self.propagator, self.layers = propagator, layers
        # Two entries per layer: the FAS right-hand side needs an evaluation that was made before the latest relaxation.
        self._known: dict[int, deque[tuple[State, State]]] = {}

    def step(self, layer: int, state: State) -> State:
        """Take one layer's step, or return its cached result for this state."""
        known = self._look_up(layer, state)
        if known is None:
            known = self.propagator.step(layer, state)
            if layer in self.layers:
                self._known.setdefault(layer, deque(maxlen=2)).append((state, known))
        return known

    def last_step(self, layer: int, state: State) -> State:
        """Take one layer's step in the last sweep. Passes the cached result on to the propagator, and drops the layer's entries."""
        known = self._look_up(layer, state)
        self._known.pop(layer, None)
        return self.propagator.last_step(layer, state, known)

    def may_hold(self, layers: Iterable[int]) -> bool:
        """True if any of these layers' evaluations may be cached."""
        return not self.layers.isdisjoint(layers)

    def _look_up(self, layer: int, state: State) -> State | None:
        return next((after for before, after in self._known.get(layer, ()) if before is state), None)


class CoarseOperator(Protocol):
    """Φ_c: a step over a whole coarse interval, made from the fine step Φ of the layer at its C-point.

    `ratio` is the length of the coarse step over that of the fine one. The returned state has the same shapes as the given one.
    """

    def __call__(self, fine_step: Callable[[State], State], state: State, ratio: float) -> State: ...


class Rediscretised:
    """Φ_c(x) = x + ω·ratio·(Φ(x) − x) = x + ω·c_f·h·F(x); arXiv:2601.09026, section 3.2 has ω = 1.

    It is written with the fine step Φ alone, so the same formula is the coarse adjoint step when Φ is a vector-Jacobian product.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, fine_step: Callable[[State], State], state: State, ratio: float) -> State:
        return interpolate(state, fine_step(state), self.weight * ratio)


class Identity:
    """Φ_c(x) = x (ω = 0): the coarse solve becomes a prefix sum of the fine increments, and evaluates no layer."""

    def __call__(self, fine_step: Callable[[State], State], state: State, ratio: float) -> State:
        return state


def coarse_operator(weight: float) -> CoarseOperator:
    """Return the coarse operator with step weight ω."""
    return Identity() if weight == 0 else Rediscretised(weight)
