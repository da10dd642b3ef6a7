"""The FAS right-hand side τ, which makes a coarse level consistent with the finer one (full approximation scheme; Brandt 1977).

A coarse level solves v_{k+1} = Φ_c(v_k) + τ_{k+1} for k = 0, 1, …, with v_0 given. Restriction computes τ from the fine level's values u:

    τ_{k+1} = w_{k+1} − Φ_c(u_k).

Here u_k is the value at the fine level's k-th C-point, and w_{k+1} is the value that the fine level's own steps (with its own τ) carry from
there to C-point k + 1. The fine residual at C-point k + 1 is w_{k+1} − u_{k+1}; where it vanishes, v = u solves the coarse level. On the
finest level, and before the first restriction, τ = 0. The algorithm is that of arXiv:2601.09026, section 3.2.

The two terms of τ are known to different workers where a coarse step crosses from one to the next: the owner of step k knows Φ_c(u_k), and
the owner of point k + 1 knows w_{k+1}. So they are stored separately: the first is subtracted before a step's result is sent, the second
is added where the result arrives, and τ needs no message of its own.
"""

from dataclasses import dataclass, field

from rayllp.state import State, add, subtract


@dataclass
class FASRightHandSide:
    """The terms of one level's τ that this worker knows. Both are empty on the finest level, and before the first restriction.

    Attributes:
        coarse_steps: Φ_c(u_k) by k, for the steps that this worker takes.
        fine_arrivals: w_k by k, for the points that this worker owns.
    """

    coarse_steps: dict[int, State] = field(default_factory=dict)
    fine_arrivals: dict[int, State] = field(default_factory=dict)

    def subtract_coarse(self, k: int, state: State) -> State:
        """Return `state`, the result of step k, minus Φ_c(u_k), as it is sent to point k + 1. Without τ, return `state` unchanged."""
        return subtract(state, self.coarse_steps[k]) if k in self.coarse_steps else state

    def add_fine(self, k: int, state: State) -> State:
        """Return the new value of point k: `state`, as received from step k − 1, plus w_k. Without τ, return `state` unchanged."""
        return add(state, self.fine_arrivals[k]) if k in self.fine_arrivals else state
