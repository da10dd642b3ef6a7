"""Couplings between layers, and the windows that are fitted to them."""

import pytest
import torch

from rayllp.channel import run_workers
from rayllp.channel.base import StateSpec
from rayllp.mgrit import Communicator
from rayllp.mgrit.couplings import Coupling, Couplings, CouplingTable, Visit, solve_a_layer_early
from rayllp.mgrit.fitting import WindowErrors, exact_step_cost, step_cost
from rayllp.mgrit.windows import Placement, Windows, lengths_in_words
from tests.test_windows import TAG, Layers, N, solve, start, weights


class Steep(Layers):
    """Layers of which the first three have a step size ten times as large."""

    def __init__(self, states=None):
        super().__init__(weights(), states)

    def step(self, layer, state):
        return state + (10 if layer < 3 else 1) * (super().step(layer, state) - state)


SEED = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def serial():
    states = [start()]
    for layer in range(N):
        states.append(Steep().step(layer, states[-1]))
    return states


def serial_adjoint():
    states, lam = serial(), [SEED]
    for layer in reversed(range(N)):
        lam.insert(0, Steep(states).step(layer, lam[0]))
    return lam


def measured(workers):
    """The last state, the first adjoint state, and the couplings, as so many workers measure them together."""
    states, owners, spec = serial(), Placement.cyclic(N, workers).owners, StateSpec.of(start())

    def work(channel):
        table, last = CouplingTable(N, torch.device("cpu")), workers - 1
        u0, seed = (value if channel.rank == rank else None for value, rank in ((start(), 0), (SEED, last)))
        communicator = Communicator(channel, TAG)
        end = solve_a_layer_early(owners, Steep(), communicator, u0, spec, table.visit_forward, source=0, destination=last)
        back = solve_a_layer_early(
            owners, Steep(states), communicator, seed, spec, table.visit_adjoint, source=last, destination=0, adjoint=True
        )
        return end, back, table.squared

    found = run_workers(workers, work)
    (end,), (back,) = ([state for state in column if state is not None] for column in list(zip(*found, strict=True))[:2])
    return end, back, Couplings.read(sum(squared for _, _, squared in found))


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_coupling_is_what_a_layer_loses_if_it_is_evaluated_a_layer_too_early(workers):
    states, lam = serial(), serial_adjoint()
    end, back, couplings = measured(workers)
    assert torch.equal(end, states[-1])
    torch.testing.assert_close(back, lam[0])
    layer, pull = Steep(), Steep(states)
    norm = torch.linalg.norm

    def increment(step, n, state):
        return step(n, state) - state

    for found, step, inputs, weights_ in (
        (couplings.forward, layer.step, states, lam),  # forward norms are weighted by the adjoint
        (couplings.adjoint, pull.step, lam[::-1], [torch.ones(1)] * (N + 1)),
    ):
        order, error = range(N) if found is couplings.forward else range(N)[::-1], None
        for k, n in enumerate(order):
            own, reached = increment(step, n, inputs[k]), norm(inputs[k + 1] * weights_[k + 1])
            assert found.increments[n] == pytest.approx(float(norm(own * weights_[k + 1]) / reached))
            change = own - increment(step, n, inputs[k - 1]) if k else torch.zeros(3, 5)
            assert found.couplings[n] == pytest.approx(float(norm(change * weights_[k + 1]) / reached))
            if k > 1:
                response = own - increment(step, n, inputs[k] - error)
                relative = norm(error * weights_[k]) / norm(inputs[k] * weights_[k])
                assert found.gains[n] == pytest.approx(float(norm(response * weights_[k + 1]) / reached / relative))
            else:
                assert found.gains[n] == 0
            error = change


def test_a_part_of_the_state_that_the_loss_does_not_see_does_not_count():
    table, ones = CouplingTable(1, torch.device("cpu")), torch.ones(2)
    table.visit_forward(Visit(0, (ones, ones), (2 * ones, 9 * ones), change=(ones, ones)))
    table.visit_adjoint(Visit(0, before=(ones, 0 * ones), after=(ones, ones)))
    found = Couplings.read(table.squared)
    assert found.forward == Coupling((0.5,), (0.5,), (0.0,))
    assert found.adjoint == Coupling((0.0,), (pytest.approx(0.5**0.5),), (0.0,))


def true_error(solve_, states):
    """Relative error of the last state."""
    return float(
        (solve(2, solve_.lengths, tuple(forward for forward, _ in solve_.sweeps), Steep)[0] - states[-1]).norm() / states[-1].norm()
    )


def test_estimated_errors_are_right_in_proportion():
    """Over five orders of magnitude, to a factor of four: enough to choose by, since probes measure what the sum of all is."""
    states, errors = serial(), WindowErrors(measured(1)[2], 8)
    ratios = []
    for lengths in ((8, 8), (4,) * 4, (1, 1, 6, 8), (2, 6, 8), (3, 5, 5, 3)):
        for sweeps in (1, 2, 3):
            # The adjoint's estimate is that of exact sweeps, so that the sum is the forward estimate alone.
            fitted = Windows.alike(lengths, sweeps, 8)
            true = true_error(fitted, states)
            if true > 1e-5:
                ratios.append(errors.of(fitted) / true)
    assert len(ratios) > 10
    assert max(ratios) < 16 * min(ratios)


def test_fitted_windows_beat_equal_ones_that_take_as_long():
    states, errors = serial(), WindowErrors(measured(1)[2], 8)
    for equal in (Windows.alike((8, 8), 2, 2), Windows.alike((4,) * 4), Windows.alike((8, 8), 3, 3)):
        fitted = min(
            (errors.fit(10**-exponent) for exponent in range(6)),
            key=lambda found: (step_cost(found, 8) > step_cost(equal, 8), errors.of(found)),
        )
        assert step_cost(fitted, 8) <= step_cost(equal, 8)
        assert true_error(fitted, states) < true_error(equal, states)


def coupled(forward, adjoint):
    """Couplings of layers whose increments are all 0.1; each list has those of the second layer to the last."""
    there, back = (0.0, *forward), (*adjoint, 0.0)
    increments = (0.1,) * len(there)
    return Couplings(
        Coupling(there, increments, tuple(10 * each for each in there)), Coupling(back, increments, tuple(10 * each for each in back))
    )


def flat(coupling):
    return coupled([coupling] * 15, [coupling] * 15)


def test_windows_are_as_long_and_take_as_few_sweeps_as_the_limit_allows():
    lax = WindowErrors(flat(1e-6), 8).fit(0.1)
    assert lax == Windows.alike((8, 8))
    assert WindowErrors(flat(1e-6), 5).fit(0.1).lengths == (5, 5, 5, 1)
    assert WindowErrors(flat(1e-6), 8, apart=(1, 3)).fit(0.1).lengths == (1, 8, 4, 1, 1, 1)
    strong = WindowErrors(flat(0.1), 8)
    before = step_cost(lax, 8)
    for limit in (10.0, 1.0, 0.1, 0.01, 1e-4):
        fitted = strong.fit(limit)
        assert strong.of(fitted) <= limit
        assert before <= step_cost(fitted, 8) <= exact_step_cost(16, 8)
        before = step_cost(fitted, 8)
    assert step_cost(strong.fit(0.0), 8) <= exact_step_cost(16, 8)
    assert strong.of(strong.fit(0.0)) == 0.0
    steep = coupled([1.0, 0.5, *[1e-4] * 13], [0.0] * 15)
    fitted = WindowErrors(steep, 8).fit(0.1)
    assert fitted.sweeps[-1] == (1, 1)  # more of them only where layers depend strongly on each other, and only forward
    assert max(backward for _, backward in fitted.sweeps) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_in_a_window_of_its_own_or_solved_exactly(value):
    couplings = coupled([1e-6, value, *[1e-6] * 13], [0.0] * 15)
    errors = WindowErrors(couplings, 8)
    fitted = errors.fit(0.1)
    assert errors.of(fitted) <= 0.1
    assert step_cost(fitted, 8) < exact_step_cost(16, 8)


def test_what_a_step_costs():
    def cost(lengths, forward, backward):
        return step_cost(Windows.alike(lengths, forward, backward), 4)

    assert cost((4, 4), 1, 1) == 6  # two evaluations with graphs, two adjoint steps of two evaluations each
    assert cost((4, 4), 2, 2) == 10
    assert cost((1, 1, 2, 4), 2, 2) == 2 * 2 + 1 + 2 * 5
    assert step_cost(Windows((1, 3, 4), ((1, 1), (3, 2), (1, 1))), 4) == 2.5 + 6 + 3
    assert exact_step_cost(8, 4) == 20


def test_windows_in_words():
    assert lengths_in_words((8, 8, 8)) == lengths_in_words((8, 8, 3)) == "8"
    assert lengths_in_words((1, 1, 1, 3, 8, 8)) == "1 (3 times), 3, 8 (2 times)"
    assert str(Windows((1, 1, 7, 8, 8), ((1, 1), (1, 1), (3, 2), (1, 1), (1, 1)))) == "1 (2 times), 7 by 3+2, 8 by 1+1 (2 times)"
