"""Window solves on small systems: order of accuracy, exactness, adjoints, and the same bits for any number of workers."""

import pytest
import torch

from rayllp.channel import LocalChannel, run_workers
from rayllp.channel.base import MessageTag, StateSpec
from rayllp.errors import SettingsError
from rayllp.mgrit import Communicator, Propagator, Status
from rayllp.mgrit.placement import Placement
from rayllp.mgrit.relay import solve_in_order
from rayllp.mgrit.windows import WindowOptions, WindowProblem, WindowSolver, equal_windows
from tests.conftest import how_it_went

N, WIDTH = 16, 5
TAG = MessageTag(0, "forward")


def weights(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(N, WIDTH, WIDTH, generator=generator, dtype=torch.float64)


class Layers(Propagator):
    """Layers x + h·tanh(W x) with h = 1/N; or their adjoints at given states."""

    def __init__(self, matrices, states=None):
        self.matrices, self.states = matrices, states
        self.calls, self.last = [], {}

    def step(self, layer, state):
        self.calls.append(layer)
        if self.states is None:
            return state + torch.tanh(state @ self.matrices[layer]) / N
        x = self.states[layer].clone().requires_grad_()
        after = x + torch.tanh(x @ self.matrices[layer]) / N
        return torch.autograd.grad(after, x, state)[0]

    def last_step(self, layer, state, known):
        self.last[layer] = state
        return self.step(layer, state)


def start():
    return torch.linspace(-1, 1, 3 * WIDTH, dtype=torch.float64).view(3, WIDTH)


def serial(matrices):
    states = [start()]
    for layer in range(N):
        states.append(Layers(matrices).step(layer, states[-1]))
    return states


def solve(workers, window, sweeps, make=None, *, adjoint=False, source=0, begin=None):
    """Return the output, the inputs of the last sweep, and the result, of all workers together."""
    matrices, placement = weights(), Placement.cyclic(N, workers)

    def work(channel):
        propagator = make() if make else Layers(matrices)
        initial = (start() if begin is None else begin) if channel.rank == source else None
        windows = equal_windows(N, window) if isinstance(window, int) else window
        problem = WindowProblem(placement, windows, propagator, StateSpec.of(start()), adjoint)
        return WindowSolver(problem, WindowOptions(sweeps=sweeps), Communicator(channel, TAG)).solve(initial, source), propagator

    found = run_workers(workers, work)
    inputs = {layer: state for _, propagator in found for layer, state in propagator.last.items()}
    assert all(torch.equal(result.output, found[0][0].output) for result, _ in found)
    return found[0][0].output, inputs, found


@pytest.mark.parametrize("window", [2, 4, 5])
def test_as_many_sweeps_as_layers_are_exact(window):
    states = serial(weights())
    output, inputs, found = solve(4, window, window)
    torch.testing.assert_close(output, states[-1], rtol=1e-13, atol=1e-13)
    for layer, state in inputs.items():
        torch.testing.assert_close(state, states[layer], rtol=1e-13, atol=1e-13)
    assert found[0][0].residuals.exact


def test_the_bits_do_not_depend_on_the_number_of_workers():
    first, inputs, _ = solve(1, 4, 2)
    for workers in (2, 3, 4, 8):
        output, others, _ = solve(workers, 4, 2)
        assert torch.equal(output, first)
        assert all(torch.equal(state, inputs[layer]) for layer, state in others.items())


@pytest.mark.parametrize("workers", [2, 3, 4, 7])
def test_large_states_are_added_up_in_pieces_to_the_same_bits(workers, monkeypatch):
    wanted = solve(workers, 5, 2)[0]
    monkeypatch.setattr("rayllp.mgrit.shares.IN_PIECES_BYTES", -1)  # with two workers, too, where it may save nothing
    assert torch.equal(solve(workers, 5, 2)[0], wanted)


def test_an_error_of_second_order_and_each_sweep_gains_one_more():
    exact = serial(weights())[-1]
    errors = {(c, k): float((solve(2, c, k)[0] - exact).norm()) for c in (2, 4, 8) for k in (1, 2, 3)}
    assert 1.5 < errors[4, 1] / errors[2, 1] < 4  # of a window c²h², of N / c windows ch
    for c in (4, 8):
        assert errors[c, 2] < 0.3 * errors[c, 1]
        assert errors[c, 3] < 0.3 * errors[c, 2]
    # A coarse step by the window's first layer does not see the others' weights.
    first_layer = start()
    for layer in range(0, N, 4):
        first_layer = first_layer + 4 / N * torch.tanh(first_layer @ weights()[layer])
    assert errors[4, 1] < 0.2 * float((first_layer - exact).norm())


def test_each_window_takes_its_own_number_of_sweeps():
    exact, uneven = serial(weights())[-1], (4, 1, 7, 4)
    for sweeps in (1, 2, 3):
        alike, inputs, _ = solve(3, uneven, sweeps)
        output, others, _ = solve(3, uneven, (sweeps,) * 4)
        assert torch.equal(output, alike)
        assert all(torch.equal(state, inputs[layer]) for layer, state in others.items())
    first, inputs, found = solve(1, uneven, (2, 1, 7, 4))
    assert len(found[0][0].residuals.squared) == 6
    assert not found[0][0].residuals.exact
    for workers in (2, 3, 4):
        output, others, found = solve(workers, uneven, (2, 1, 7, 4))
        assert torch.equal(output, first)
        assert all(torch.equal(state, inputs[layer]) for layer, state in others.items())
    calls = [layer for _, propagator in found for layer in propagator.calls]
    assert [calls.count(layer) for layer in range(N)] == 4 * [2] + [1] + 7 * [7] + 4 * [4]
    output, _, found = solve(2, uneven, (4, 1, 9, 5))
    torch.testing.assert_close(output, exact, rtol=1e-13, atol=1e-13)
    assert found[0][0].residuals.exact


def test_sweeps_of_each_window_are_given_in_the_order_of_the_network_in_the_adjoint_too():
    states = serial(weights())
    seed = torch.ones(3, WIDTH, dtype=torch.float64)
    make = lambda: Layers(weights(), states)  # noqa: E731
    _, _, found = solve(2, (4, 12), (1, 3), make, adjoint=True, source=1, begin=seed)
    calls = [layer for _, propagator in found for layer in propagator.calls]
    assert [calls.count(layer) for layer in range(N)] == 4 * [1] + 12 * [3]


@pytest.mark.parametrize("sweeps", [0, (1, 0, 1, 1), (1, 1)])
def test_sweeps_that_are_not_of_these_windows_are_refused(sweeps):
    with pytest.raises(SettingsError, match=r"0 sweeps|sweeps of 2 windows, and there are 4: give one number for each"):
        solve(1, 4, sweeps)


def test_each_worker_evaluates_its_own_layers_once_a_sweep():
    _, _, found = solve(4, 4, 2)
    for rank, (_, propagator) in enumerate(found):
        assert sorted(propagator.calls) == sorted(2 * list(range(rank, N, 4)))


@pytest.mark.parametrize("sweeps", [1, 2, 4])
def test_the_adjoint_is_the_transpose(sweeps):
    """<λ_N, J v> = <Jᵀ λ_N, v> with J of the steps at fixed states: the adjoint solve against the forward solve of linear layers."""
    matrices, states = weights(), serial(weights())
    seed = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lam, _, _ = solve(4, 4, sweeps, lambda: Layers(matrices, states), adjoint=True, source=3, begin=seed)
    if sweeps == 4:
        expected = seed
        for layer in reversed(range(N)):
            expected = Layers(matrices, states).step(layer, expected)
    else:
        x = start().requires_grad_()

        def linear(layer, v):
            after, pull = torch.func.vjp(lambda y: y + torch.tanh(y @ matrices[layer]) / N, states[layer])
            del after
            return torch.func.vjp(pull, torch.zeros_like(v))[1]((v,))[0]

        out = x
        for w in range(0, N, 4):
            inputs = [out] * 4
            # The transpose of Picard sweeps from the end: those from the beginning with the roles of the layers reversed.
            for sweep in range(sweeps):
                increments = [linear(w + i, v) - v for i, v in enumerate(inputs)]
                if sweep < sweeps - 1:
                    inputs = [out + sum(increments[:i], torch.zeros_like(out)) for i in range(4)]
            out = out + sum(increments)
        expected = torch.autograd.grad(out, x, seed)[0]
    torch.testing.assert_close(lam, expected, rtol=1e-12, atol=1e-12)


def test_changes_of_the_size_of_rounding_are_converged():
    """The layers' increments are computed in bfloat16: after a few sweeps the changes no longer shrink."""

    class Rounded(Layers):
        def step(self, layer, state):
            return state + (super().step(layer, state) - state).bfloat16().to(state.dtype)

    matrices, placement = weights(), Placement.cyclic(N, 4)

    def work(channel, rounding):
        problem = WindowProblem(placement, (N,), Rounded(matrices), StateSpec.of(start()))
        solver = WindowSolver(problem, WindowOptions(sweeps=8, rounding=rounding), Communicator(channel, TAG))
        return how_it_went(solver.solve(start() if channel.rank == 0 else None, 0), channel)

    (plain, *_), (found, *others) = (run_workers(4, lambda channel, r=r: work(channel, r)) for r in (0.0, 2.0**-8))
    assert found.convergence_factor == 0
    assert found.status is Status.CONVERGED
    assert plain.status is not Status.CONVERGED
    assert all(other.floor == pytest.approx(found.floor) for other in others)


def test_changes_between_sweeps_shrink_and_give_a_factor():
    _, _, found = solve(4, 8, 4)
    shares = [solution.residuals for solution, _ in found]
    result = shares[0].convergence(sum(share.flat for share in shares))
    assert len(result.residuals) == 3
    assert result.convergence_factor == pytest.approx(result.residuals[2] / result.residuals[1])
    assert 0 < result.convergence_factor < 0.3


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_in_order_is_the_serial_solve(workers):
    matrices, placement, states = weights(), Placement.cyclic(N, workers), serial(weights())

    def work(channel):
        initial = start() if channel.rank == 0 else None
        return solve_in_order(placement.owners, Layers(matrices), Communicator(channel, TAG), initial, StateSpec.of(start()))

    *others, output = run_workers(workers, work)
    assert all(other is None for other in others)
    assert torch.equal(output, states[-1])


def test_what_cannot_be_is_refused_in_words():
    with pytest.raises(SettingsError, match="3 layers on 4 workers"):
        Placement.cyclic(3, 4)
    for windows, sweeps, words in (
        ((4, 0), 1, "windows of 4, 0 layers: each must have at least 1, all together 4"),
        ((3,), 1, "windows of 3 layers: each must"),
        ((), 1, "no window"),
        ((4,), 0, "0 sweeps"),
    ):
        problem = WindowProblem(Placement.cyclic(4, 1), windows, Layers(weights()), StateSpec.of(start()))
        with pytest.raises(SettingsError, match=words):
            WindowSolver(problem, WindowOptions(sweeps=sweeps), Communicator(LocalChannel.alone(), TAG))
    with pytest.raises(SettingsError, match="worker 0 is to begin the solve and has no initial state"):
        solve_in_order((0, 0), Layers(weights()), Communicator(LocalChannel.alone(), TAG), None, StateSpec.of(start()))
