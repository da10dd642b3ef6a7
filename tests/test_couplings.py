"""Couplings between layers, and the windows that are cut by them."""

import pytest
import torch

from rayllp.channel import run_workers
from rayllp.channel.base import StateSpec
from rayllp.mgrit import Communicator
from rayllp.mgrit.couplings import solve_with_couplings
from rayllp.mgrit.windows import Placement, cut_windows, exact_step_cost, window_step_cost, windows_in_words
from tests.test_windows import TAG, Layers, N, solve, start, weights


class Steep(Layers):
    """Layers of which the first three have a step size ten times as large."""

    def __init__(self, states=None):
        super().__init__(weights(), states)

    def step(self, layer, state):
        return state + (10 if layer < 3 else 1) * (super().step(layer, state) - state)


def serial():
    states = [start()]
    for layer in range(N):
        states.append(Steep().step(layer, states[-1]))
    return states


def measured(workers, adjoint=False):
    states, seed = serial(), torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    placement, first = Placement.cyclic(N, workers), seed if adjoint else start()
    source, destination = (workers - 1, 0) if adjoint else (0, workers - 1)

    def work(channel):
        propagator = Steep(states if adjoint else None)
        initial = first if channel.rank == source else None
        return solve_with_couplings(
            placement.owners,
            propagator,
            Communicator(channel, TAG),
            initial,
            StateSpec.of(first),
            source=source,
            destination=destination,
            adjoint=adjoint,
        )

    found = run_workers(workers, work)
    (output,) = [output for output, _ in found if output is not None]
    return output, sum(squares for _, squares in found).sqrt()


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("adjoint", [False, True])
def test_a_coupling_is_what_a_layer_loses_if_it_is_evaluated_a_layer_too_early(workers, adjoint):
    states = serial()
    output, couplings = measured(workers, adjoint)
    if not adjoint:
        assert torch.equal(output, states[-1])
        layer = Steep()
        early = [layer.step(n, states[n - 1]) - states[n - 1] for n in range(1, N)]
        wanted = [(states[n + 1] - states[n] - early[n - 1]).norm() / states[n].norm() for n in range(1, N)]
        assert couplings[0] == 0
        torch.testing.assert_close(couplings[1:], torch.stack(wanted))
    else:
        layer, lam = Steep(states), [torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]
        for n in reversed(range(N)):
            lam.insert(0, layer.step(n, lam[0]))
        torch.testing.assert_close(output, lam[0])
        early = [layer.step(n, lam[n + 2]) - lam[n + 2] for n in range(N - 1)]
        wanted = [(lam[n] - lam[n + 1] - early[n]).norm() / lam[n + 1].norm() for n in range(N - 1)]
        assert couplings[-1] == 0
        torch.testing.assert_close(couplings[:-1], torch.stack(wanted))


def test_windows_cut_by_couplings_are_more_accurate_than_as_many_of_equal_length():
    couplings = measured(1)[1][1:].tolist()
    exact = serial()[-1]
    windows = cut_windows(couplings, 8, 1)
    assert windows[:2] == (1, 1)
    assert max(windows) == 8
    equal = [N // len(windows) + (n < N % len(windows)) for n in range(len(windows))]
    error, other = (float((solve(2, lengths, 1, Steep)[0] - exact).norm()) for lengths in (windows, equal))
    assert error < 0.2 * other


def test_windows_are_as_long_as_their_error_allows():
    assert cut_windows([0.0] * 15, 8, 1) == (8, 8)
    assert cut_windows([0.0] * 15, 5, 1) == (5, 5, 5, 1)
    assert cut_windows([1.0] * 3, 4, 1) == (1, 1, 1, 1)
    assert cut_windows([0.09, 0.09, 0.001], 4, 1) == (2, 2)  # the third layer of a window would be wrong by two couplings
    assert cut_windows([0.09, 0.09, 0.001], 4, 2) == (4,)  # 0.27² / 2 is less than 0.1
    assert cut_windows([float("nan"), float("inf"), 0.001], 4, 1) == (1, 1, 2)


def test_what_a_step_costs():
    assert window_step_cost((4, 4), 1, 1, 4) == 6  # two evaluations with graphs, two adjoint steps of two evaluations each
    assert window_step_cost((4, 4), 2, 2, 4) == 10
    assert window_step_cost((1, 1, 2, 4), 2, 2, 4) == 2 * 2 + 1 + 2 * 5
    assert exact_step_cost(8, 4) == 20


def test_lengths_in_words():
    assert windows_in_words((8, 8, 8)) == windows_in_words((8, 8, 3)) == "8"
    assert windows_in_words((1, 1, 1, 3, 8, 8)) == "1 (3 times), 3, 8 (2 times)"
