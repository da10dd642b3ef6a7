"""The FAS right-hand side τ, by which a coarse level knows of the finer one (full approximation scheme; Brandt 1977).

A coarse level solves v_{k+1} = Φ_c(v_k) + τ_{k+1} for k = 0, 1, …, with v_0 given. Restriction makes τ from the fine level's values u:

    τ_{k+1} = w_{k+1} − Φ_c(u_k),

where u_k is the value at the fine level's k-th C-point, and w_{k+1} what the fine level's own steps, its own τ included, make of the
F-point before C-point k + 1. The fine residual there is w_{k+1} − u_{k+1}; where it vanishes, v = u solves the coarse level. On the
finest level, and before the first restriction, τ = 0. The source of the algorithm is arXiv:2601.09026, section 3.2.

Each half of τ is known to another worker where a step crosses workers: Φ_c(u_k) to the owner of step k, w_{k+1} to the owner of point
k + 1. So the two are kept apart. The first is subtracted before a step's result is handed over, the second added where it arrives,
and τ costs no message of its own.
"""

from dataclasses import dataclass, field

from rayllp.state import State, add, subtract


@dataclass
class FASRightHandSide:
    """τ of one level, as far as this worker knows it.

    Attributes:
        coarse_steps: Φ_c(u_k) by k, for the steps that this worker takes.
        fine_arrivals: w_k by k, for the points that this worker owns.
    """

    coarse_steps: dict[int, State] = field(default_factory=dict)
    fine_arrivals: dict[int, State] = field(default_factory=dict)

    def leave(self, k: int, state: State) -> State:
        """Subtract Φ_c(u_k) from the result of step k, before it is handed to point k + 1."""
        return subtract(state, self.coarse_steps[k]) if k in self.coarse_steps else state

    def arrive(self, k: int, state: State) -> State:
        """Add w_k to what step k − 1 has handed over: the new value of point k."""
        return add(state, self.fine_arrivals[k]) if k in self.fine_arrivals else state
