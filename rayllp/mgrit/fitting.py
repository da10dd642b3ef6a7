"""Fitting windows to a network: the lengths and sweeps of least time whose gradient is accurate enough.

Where layers depend strongly on each other, windows have to be short or take several sweeps; elsewhere one sweep of a long window does. The
couplings κ and gains g of the layers (`couplings.py`) tell which is which. In a window with first layer a, sweep k leaves layer n an
increment that is wrong by about

    ε_n^1 = κ_n / ‖d_{n−1}‖ · Σ_{a ≤ m < n} ‖d_m‖,   ε_n^k = g_n · Σ_{a ≤ m < n} ε_m^{k−1}

and the window's end by the sum of these, Σ_n ε_n^k: to first order, and as if all errors pointed the same way, so rather more than less. On
trained networks the estimate was between the true error and its double for half of all windows with one to three sweeps, over five orders
of magnitude, and too large by about the same factor where errors average out more (docs/method.md).

The gradient's error is taken as a weighted sum over windows and directions. What it is for a given solve is measured by probes, so only the
proportions matter here (`WindowErrors.fit` takes a limit on this sum). Lengths and sweeps are then found by dynamic programming: the least
time + μ · error, for the least μ whose error is below the limit.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rayllp.mgrit.couplings import Coupling, Couplings
from rayllp.mgrit.windows import Windows

MOST_SWEEPS = 4
"""Windows take at most so many sweeps each way. One that wants more is better cut in two."""
FORWARD_WEIGHT, ADJOINT_WEIGHT = 3.0, 0.7
"""Error of the gradient for a relative error of a window's last state and adjoint state, as measured on an encoder–decoder network of 24
layers. The forward error counts more, since the adjoint solve builds on it.
"""
HALVINGS = 24
"""Steps of the bisection for μ; each costs one pass over all possible windows."""
HUGE = 1e30


def step_cost(windows: Windows, workers: int) -> float:
    """Return the time of a training step by windows in forward evaluations of a layer, if messages cost nothing.

    Args:
        windows: none may be longer than there are workers.
        workers: number of workers.
    """
    chained = sum(length == 1 for length in windows.lengths)
    sweeps = sum(min(forward, length) + min(backward, length) + 1 for length, forward, backward in windows if length > 1)
    return sweeps + chained * _chained_cost(workers)


def exact_step_cost(layers: int, workers: int) -> float:
    """Return the time of an exact step on a cyclic placement, with the batch not split, in forward evaluations of a layer."""
    return layers * _chained_cost(workers)


def _chained_cost(workers: int) -> float:
    """Return the time of one layer in a chain: forward and input gradient in turn, recomputation and parameter gradient side by side."""
    return 2 + 2 / workers


class WindowErrors:
    """Estimated errors of all possible windows of a network.

    Args:
        couplings: of its layers.
        longest: the largest number of layers in a window.
        apart: numbers of layers at the beginning and at the end that are always windows of their own.
    """

    def __init__(self, couplings: Couplings, longest: int, apart: tuple[int, int] = (0, 0)) -> None:
        self.layers = len(couplings.forward.couplings)
        self._first, self._stop = apart[0], self.layers - apart[1]
        self.longest = min(longest, self.layers)
        forward = _errors(couplings.forward, self.longest, 1)
        adjoint = _errors(couplings.adjoint, self.longest, -1)
        # By first layer, length − 1 and sweeps − 1; the adjoint's windows begin at their last layer.
        self._forward = (FORWARD_WEIGHT * forward).tolist()
        self._adjoint = (ADJOINT_WEIGHT * adjoint).tolist()

    def of(self, solve: Windows) -> float:
        """Return the estimated error of a solve, none of whose windows may be longer than `longest`."""
        total, begin = 0.0, 0
        for length, forward, backward in solve:
            end = begin + length
            for errors, sweeps in ((self._forward[begin], forward), (self._adjoint[self.layers - end], backward)):
                total += 0.0 if sweeps >= length else errors[length - 1][min(sweeps, MOST_SWEEPS) - 1]
            begin = end
        return total

    def fit(self, limit: float) -> Windows:
        """Return the fastest solve found whose estimated error is at most `limit`; windows of one layer, which are exact, if none is."""
        lax = self._best(0.0)
        if self.of(lax) <= limit:
            return lax
        low, high, found = -30.0, 60.0, Windows.alike((1,) * self.layers)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            solve = self._best(math.exp(middle))
            if self.of(solve) <= limit:
                high, found = middle, solve
            else:
                low = middle
        return found

    def _best(self, price: float) -> Windows:
        """Return the solve of the least time + price · error."""
        best: list[tuple[float, int, tuple[int, int]]] = [(0.0, 0, (0, 0))]  # of the layers before each: value, last window, its sweeps
        forward_choices, adjoint_choices = (
            [[_cheapest(errors, length, price) for length, errors in enumerate(row, 1)] for row in table]
            for table in (self._forward, self._adjoint)
        )
        for end in range(1, self.layers + 1):
            candidates = [(best[end - 1][0] + _chained_cost(self.longest), 1, (1, 1))]
            for length in range(2, min(self.longest, end - self._first) + 1) if end <= self._stop else ():
                ahead, forward = forward_choices[end - length][length - 1]
                back, backward = adjoint_choices[self.layers - end][length - 1]
                candidates.append((best[end - length][0] + ahead + back + 1, length, (forward, backward)))
            best.append(min(candidates))
        found, end = [], self.layers
        while end:
            _, length, (forward, backward) = best[end]
            found.append((length, forward, backward))
            end -= length
        return Windows.of(reversed(found))


def _cheapest(errors: Sequence[float], length: int, price: float) -> tuple[float, int]:
    """Return the least sweeps + price · error of one direction of a window, and its number of sweeps."""
    return min((count + price * error, count) for count, error in enumerate(errors[:length], 1))


def _errors(coupling: Coupling, longest: int, direction: int) -> Tensor:
    """Return the error of each window's end after each number of sweeps; shape (layers, longest, MOST_SWEEPS).

    It is 0 after as many sweeps as the window has layers.

    Args:
        coupling: of all layers.
        longest: the largest number of layers in a window.
        direction: 1 or, for the adjoint, −1: the order in which the solve takes the layers. The result is in that order.
    """
    couplings, increments, gains = (
        torch.tensor(row[::direction], dtype=torch.float64).nan_to_num(HUGE, HUGE).clamp_max(HUGE)
        for row in (coupling.couplings, coupling.increments, coupling.gains)
    )
    before = torch.cat([torch.ones(1, dtype=torch.float64), increments[:-1]]).clamp_min(1 / HUGE)
    first, later, error = (
        torch.nn.functional.pad(row, (0, longest - 1)).unfold(0, longest, 1) for row in (couplings / before, gains, increments)
    )
    found = []
    for sweep in range(MOST_SWEEPS):
        of_input = error.cumsum(1).sub(error).clamp_max(HUGE)
        error = ((later if sweep else first) * of_input).clamp_max(HUGE)
        found.append(error.cumsum(1).clamp_max(HUGE))
    return torch.stack(found, dim=2)
