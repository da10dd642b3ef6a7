"""Solves by a rolling window on small systems: accuracy, exactness, adjoints, and the same bits for any number of workers."""

import itertools

import pytest
import torch

from rayllp.channel import LocalChannel, run_workers
from rayllp.channel.base import StateSpec
from rayllp.errors import SettingsError
from rayllp.mgrit import Communicator, Status
from rayllp.mgrit.placement import Placement
from rayllp.mgrit.rolling import RollingOptions, RollingProblem, RollingSolver
from rayllp.mgrit.shares import Pieces, in_pieces, shares_of
from rayllp.state import combine, squared_norm, squared_norms, tensors
from tests.conftest import how_it_went
from tests.test_windows import TAG, Layers, N, serial, start, weights


class Watched(Layers):
    """Layers that know which of their steps was the last one, and which layers have been settled."""

    def __init__(self, matrices, states=None):
        super().__init__(matrices, states)
        self.settled = []

    def settle(self, layer):
        self.settled.append(layer)


def solve(workers, length, tolerance, *, scale=1.0, states=None, begin=None, source=0):
    """Return the output, the inputs of the last sweeps, the settled layers and the result, of all workers together."""
    matrices, placement = weights(scale), Placement.cyclic(N, workers)

    def work(channel):
        propagator = Watched(matrices, states)
        initial = (start() if begin is None else begin) if channel.rank == source else None
        problem = RollingProblem(placement, length, propagator, StateSpec.of(start()), adjoint=states is not None)
        solver = RollingSolver(problem, RollingOptions(tolerance=tolerance), Communicator(channel, TAG))
        solution = solver.solve(initial, source)
        return solution, propagator, how_it_went(solution, channel)

    found = run_workers(workers, work)
    outputs = [solution.output for solution, *_ in found]
    assert all(torch.allclose(output, outputs[0], rtol=0, atol=0, equal_nan=True) for output in outputs)
    last = {layer: state for _, propagator, _ in found for layer, state in propagator.last.items()}
    calls = sorted(layer for _, propagator, _ in found for layer in propagator.calls)
    settled = sorted(layer for _, propagator, _ in found for layer in propagator.settled)
    return outputs[0], last, settled, calls, found[0][2]


def error(output, exact):
    return float((output - exact).norm() / exact.norm())


@pytest.mark.parametrize("length", [1, 3, 8, N, 2 * N])
def test_without_a_tolerance_the_solve_is_exact(length):
    output, last, settled, calls, went = solve(2, length, 0.0)
    exact = serial(weights())
    assert torch.allclose(output, exact[-1], rtol=1e-14, atol=1e-14)
    assert all(torch.allclose(last[layer], exact[layer], rtol=1e-14, atol=1e-14) for layer in range(N))
    assert settled == list(range(N))
    assert went.status is Status.EXACT
    assert N // 2 < went.sweeps <= N  # one layer a sweep, unless all that a sweep would change is lost in rounding
    assert length > 1 or calls == list(range(N))


def test_the_error_follows_the_tolerance_and_so_do_the_sweeps():
    exact = serial(weights(4.0))[-1]
    found = []
    for tolerance in (1.0, 0.1, 0.01, 0.001):
        output, _, settled, _, went = solve(4, 8, tolerance, scale=4.0)
        assert settled == list(range(N))
        assert went.status is Status.CONVERGED
        found.append((error(output, exact), went.sweeps))
    errors, sweeps = zip(*found, strict=True)
    assert all(after < before / 2 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-3
    assert sweeps[0] == 2
    assert list(sweeps) == sorted(sweeps)
    assert sweeps[-1] < N


def test_a_large_tolerance_is_one_sweep_of_each_window():
    """Every increment is taken at the window's first state, as by windows of equal length with one sweep."""
    output, last, _, calls, went = solve(4, 8, 10.0)
    state, matrices = start(), weights()
    for first in (0, 8):
        state = state + sum(torch.tanh(state @ matrices[layer]) / N for layer in range(first, first + 8))
    assert torch.allclose(output, state, rtol=1e-14, atol=1e-14)
    assert calls == list(range(N))
    assert went.sweeps == 2
    assert went.convergence_factor is None
    assert all(torch.equal(last[layer], start()) for layer in range(8))


def test_no_input_of_a_last_sweep_changes_by_more_than_the_tolerance():
    """The states that follow from the last sweeps' inputs are those at which the last sweeps were taken, up to the tolerance."""
    for tolerance in (0.3, 0.03, 0.003):
        _, last, *_ = solve(2, 8, tolerance, scale=4.0)
        state, matrices, worst = start(), weights(4.0), 0.0
        for layer in range(N):
            worst = max(worst, error(last[layer], state))
            state = state + torch.tanh(last[layer] @ matrices[layer]) / N
        assert worst < 2 * tolerance  # twice, since the secants move the states a little, too


def test_layers_that_respond_to_changes_in_one_direction_are_extrapolated_exactly():
    """All layers are x + a·x, so the secant gives each its increment at any state, from the third sweep on."""

    class Linear(Watched):
        def step(self, layer, state):
            self.calls.append(layer)
            return state * (1 + 0.5 * (layer + 1) / N)

    def sweeps(length, tolerance):
        propagator, spec = Linear(None), StateSpec.of(start())

        def work(channel):
            problem = RollingProblem(Placement.cyclic(N, 1), length, propagator, spec)
            return RollingSolver(problem, RollingOptions(tolerance=tolerance), Communicator(channel, TAG)).solve(start(), 0)

        (solution,) = run_workers(1, work)
        exact = start()
        for layer in range(N):
            exact = exact * (1 + 0.5 * (layer + 1) / N)
        return error(solution.output, exact), solution.residuals.sweeps

    found, count = sweeps(N, 1e-2)
    assert found < 1e-4
    assert count <= 5


@pytest.mark.parametrize("tolerance", [0.3, 0.01])
def test_the_bits_do_not_depend_on_the_number_of_workers(tolerance):
    found = [solve(workers, 6, tolerance, scale=4.0) for workers in (1, 2, 3, 5)]
    assert all(torch.equal(output, found[0][0]) for output, *_ in found)
    assert {went.sweeps for *_, went in found} == {found[0][4].sweeps}
    assert len({went.convergence_factor for *_, went in found if went.convergence_factor}) <= 2  # sums in another order


@pytest.mark.parametrize("workers", [2, 3, 5, 7])
@pytest.mark.parametrize("length", [3, 6, 16])
def test_large_states_are_added_up_in_pieces_to_the_same_bits(workers, length, monkeypatch):
    wanted = solve(1, length, 0.03, scale=4.0)
    monkeypatch.setattr("rayllp.mgrit.shares.IN_PIECES_BYTES", -1)  # with two workers, too, where it may save nothing
    output, last, settled, _, went = solve(workers, length, 0.03, scale=4.0)
    assert torch.equal(output, wanted[0])
    assert all(torch.equal(state, wanted[1][layer]) for layer, state in last.items())
    assert settled == wanted[2]
    assert went.sweeps == wanted[4].sweeps
    assert went.convergence_factor == pytest.approx(wanted[4].convergence_factor, rel=1e-9)


def test_a_sweep_moves_two_states(monkeypatch):
    """Each worker sends its layer's increment, and others' inputs as far as it has their rows."""
    sent, begin_all_to_all = [], LocalChannel.begin_all_to_all

    def counting(channel, parts, tag):
        sent.append(sum(part.nbytes for worker, part in enumerate(parts) if worker != channel.rank))
        return begin_all_to_all(channel, parts, tag)

    monkeypatch.setattr("rayllp.mgrit.shares.IN_PIECES_BYTES", 0)
    monkeypatch.setattr(LocalChannel, "begin_all_to_all", counting)
    went = solve(3, 3, 0.03, scale=4.0)[4]
    assert went.sweeps < N
    exchanges = 3 * (2 * went.sweeps - 1)  # there is no layer left after the last sweep
    assert len(sent) == exchanges
    assert sum(sent) <= exchanges * start().nbytes * 2 / 3 + len(sent) * 8


def test_states_are_cut_where_that_saves_bytes():
    """On four workers three states or one and a half; on two, one or one, but of windows of eight layers four or two and a half."""
    assert not in_pieces(1e9, 1, 8, rolling=True)
    assert not in_pieces(1e9, 2, 2, rolling=True)
    assert not in_pieces(1e9, 2, 2, rolling=False)
    assert [in_pieces(size * 2**20, 2, 8, rolling=False) for size in (1.9, 2.1)] == [False, True]
    assert [in_pieces(size * 2**20, 4, 4, rolling=True) for size in (1.9, 2.1)] == [False, True]
    assert [in_pieces(size * 2**20, 8, 8, rolling=True) for size in (0.5, 0.6)] == [False, True]


@pytest.mark.parametrize("shapes", [[(3, 2, 5)], [(7,), (2, 4)], [()], [(1, 3), (0, 4)]])
def test_any_state_can_be_cut_into_pieces(shapes, monkeypatch):
    """Of several tensors of several types, without dimensions, or with fewer rows than there are workers."""
    monkeypatch.setattr("rayllp.mgrit.shares.IN_PIECES_BYTES", 0)
    dtypes = [torch.float32, torch.bfloat16]
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    state = parts[0] if len(parts) == 1 else tuple(parts)

    def work(channel):
        shares = shares_of(Communicator(channel, TAG), Placement.cyclic(4, 3), StateSpec.of(state), 4)
        mine = {layer: combine(lambda part, layer=layer: part * (layer + 1), state) for layer in range(4) if layer % 3 == channel.rank}
        increments = shares.of_increments(range(4), mine, "one")
        states = [shares.rows(state), *increments]
        norms = squared_norms(states[:-1]).unsqueeze(1)
        sums = shares.summed(norms, "two")
        return isinstance(shares, Pieces), shares.of_states(range(4), states[:-1], "three"), shares.joined(states[-1], "four"), sums

    for rank, (is_cut, inputs, last, sums) in enumerate(run_workers(3, work)):
        assert is_cut
        assert all(torch.equal(*pair) for pair in zip(tensors(last), [part * 4 for part in parts], strict=True))
        assert [each is not None for each in inputs] == [layer % 3 == rank for layer in range(4)]
        if rank == 0:  # the states before layers 0 and 3
            assert all(torch.equal(*pair) for pair in zip(tensors(inputs[0]), parts, strict=True))
            assert all(torch.equal(*pair) for pair in zip(tensors(inputs[3]), [part * 3 for part in parts], strict=True))
        assert sums[0][0] == pytest.approx(float(squared_norm(state)), rel=1e-6)


def test_the_adjoint_goes_from_the_last_layer_to_the_first():
    states, begin = serial(weights()), torch.ones(3, 5, dtype=torch.float64)
    x = start().requires_grad_()
    after = x
    for matrix in weights():
        after = after + torch.tanh(after @ matrix) / N
    exact = torch.autograd.grad(after, x, begin)[0]
    output, last, settled, _, went = solve(4, 8, 0.0, states=states, begin=begin, source=3)
    assert torch.allclose(output, exact, rtol=1e-12)
    assert torch.equal(last[N - 1], begin)
    assert settled == list(range(N))
    near, *_, fast = solve(4, 8, 0.05, states=states, begin=begin, source=3)
    assert error(near, exact) < 0.05
    assert fast.sweeps < went.sweeps


def test_states_that_are_not_finite_are_taken_layer_by_layer():
    begin = start()
    begin[0, 0] = torch.nan
    _, _, _, _, went = solve(2, 4, 0.1, begin=begin)
    assert went.sweeps == N


def test_the_convergence_factor_compares_the_first_two_changes_of_each_layer():
    mild, strong = (solve(2, 8, 1e-4, scale=scale)[4].convergence_factor for scale in (0.5, 4.0))
    assert 0 < mild < strong


def test_what_makes_no_sense_is_refused():
    with pytest.raises(SettingsError, match="tolerance -1"):
        RollingOptions(tolerance=-1)
    with pytest.raises(SettingsError, match="window of 0 layers"):
        RollingProblem(Placement.cyclic(4, 2), 0, Layers(weights()), StateSpec.of(start()))
