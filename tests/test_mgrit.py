"""The MGRIT solver compared with autograd and with itself: exactness, and independence of the number of workers."""

import itertools

import pytest
import torch
from torch import Tensor

from rayllp.channel import LocalChannel, MessageTag, StateSpec, run_workers
from rayllp.errors import SettingsError
from rayllp.mgrit import Communicator, MGRITSolver, Problem, SolverOptions, Status, build_hierarchy, convergence_factor, judge, split_evenly
from rayllp.state import State, like, tensors
from tests.conftest import how_it_went

torch.set_num_threads(1)


class Layers:
    """Small nonlinear residual layers, with the forward and the adjoint propagator over them."""

    def __init__(self, count: int, width: int = 3, parts: int = 1) -> None:
        generator = torch.Generator().manual_seed(count)
        self.weights = [torch.randn(width, width, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count)]
        self.h = 1 / count
        self.state: State = torch.randn(4, width, generator=generator, dtype=torch.float64)
        if parts == 2:
            self.state = (self.state, torch.randn(4, width, generator=generator, dtype=torch.float64))

    def apply(self, n: int, state: State) -> State:
        if isinstance(state, Tensor):
            return state + self.h * torch.tanh(state @ self.weights[n])
        x, y = state
        return x + self.h * torch.tanh(x @ self.weights[n]), y + self.h * torch.tanh(y @ self.weights[n] + x)

    def serial(self) -> tuple[list[State], list[Tensor]]:
        states = [self.state]
        for n in range(len(self.weights)):
            states.append(self.apply(n, states[-1]))
        loss = sum((part**2).sum() for part in tensors(states[-1]))
        return states, list(torch.autograd.grad(loss, self.weights))


class Forward:
    def __init__(self, layers: Layers) -> None:
        self.layers, self.graphs = layers, {}

    def step(self, n: int, state: State) -> State:
        with torch.no_grad():
            return self.layers.apply(n, state)

    def last_step(self, n: int, state: State, known: State | None) -> State:
        inputs = tuple(part.detach().requires_grad_() for part in tensors(state))
        outputs = tensors(self.layers.apply(n, like(state, inputs)))
        self.graphs[n] = inputs, outputs
        return like(state, tuple(part.detach() for part in outputs))


class Adjoint:
    def __init__(self, forward: Forward) -> None:
        self.forward, self.gradients, self.calls = forward, {}, 0

    def step(self, n: int, state: State) -> State:
        self.calls += 1
        inputs, outputs = self.forward.graphs[n]
        return like(state, torch.autograd.grad(outputs, inputs, tensors(state), retain_graph=True))

    def last_step(self, n: int, state: State, known: State | None) -> State:
        inputs, outputs = self.forward.graphs[n]
        *lam, gradient = torch.autograd.grad(outputs, (*inputs, self.forward.layers.weights[n]), tensors(state))
        assert n not in self.gradients, "a parameter gradient is formed once"
        self.gradients[n] = gradient
        return like(state, tuple(lam))


def both_solves(channel, layers, blocks, method, adjoint_method, levels=2, adjoint_levels=2, coarsening=4):
    spec = StateSpec.of(layers.state)
    forward_hierarchy = build_hierarchy(blocks=blocks, levels=levels, coarsening=coarsening)
    backward_hierarchy = build_hierarchy(blocks=blocks, levels=adjoint_levels, coarsening=coarsening).adjoint()
    first, last = forward_hierarchy.levels[0].owners[0], forward_hierarchy.levels[0].owners[-1]
    forward = Forward(layers)
    solver = MGRITSolver(Problem(forward_hierarchy, forward, spec), method, Communicator(channel, MessageTag(0, "forward")))
    result = solver.solve(layers.state if channel.rank == first else None)
    lam = None
    if channel.rank == last:
        lam = like(layers.state, tuple(2 * part for part in tensors(result.output)))
    adjoint = Adjoint(forward)
    communicator = Communicator(channel, MessageTag(0, "adjoint"))
    back = MGRITSolver(Problem(backward_hierarchy, adjoint, spec), adjoint_method, communicator).solve(lam)
    how = [how_it_went(solution, channel) for solution in (result, back)]
    return result, back, adjoint.gradients, {n: g[0] for n, g in forward.graphs.items()}, how


def solve_alone(hierarchy, options, propagator, layers):
    """Return the result of a forward solve on one worker, and how it converged."""
    problem = Problem(hierarchy, propagator, StateSpec.of(layers.state))
    solution = MGRITSolver(problem, options, Communicator(LocalChannel.alone(), MessageTag(0, "forward"))).solve(layers.state)
    return solution, how_it_went(solution, LocalChannel.alone())


def gather(outcomes):
    states, gradients, output = {}, {}, None
    for result, _, mine, inputs, _ in outcomes:
        gradients |= mine
        states |= inputs
        output = result.output if result.output is not None else output
    return states, gradients, output


CASES = [
    (n, c, levels, kind)
    for n, c, levels, kind in itertools.product((16, 23), (2, 4, 5, (2, 4), (5, 2)), (2, 3), ("F", "FCF"))
    if not (levels == 2 and not isinstance(c, int)) and not (levels == 3 and c in (4, 5) and (n, c) != (23, 4))
]


@pytest.mark.parametrize(("count", "c", "levels", "kind"), CASES)
def test_enough_iterations_equal_autograd(count, c, levels, kind):
    layers = Layers(count)
    states, gradients = layers.serial()
    intervals = -(-count // (c if isinstance(c, int) else c[0]))  # an iteration makes one more of them exact
    method = SolverOptions(iterations=intervals + 1, relaxation=(kind,))
    for workers in (1, 2, 3, 5, 7):
        blocks = split_evenly(count, workers)
        outcomes = run_workers(
            workers, lambda channel, blocks=blocks: both_solves(channel, layers, blocks, method, method, levels, levels, c)
        )
        got, got_gradients, output = gather(outcomes)
        torch.testing.assert_close(output, states[-1], rtol=1e-10, atol=1e-10)
        for n in range(count):
            torch.testing.assert_close(got[n][0].detach(), states[n].detach(), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(got_gradients[n], gradients[n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("count", "c", "levels", "kind"), CASES)
@pytest.mark.parametrize("iterations", [1, 2])
def test_few_iterations_do_not_depend_on_the_workers(count, c, levels, kind, iterations):
    layers = Layers(count)
    for cycle, guess, weight in (("V", "coarse", 1.0), ("F", "coarse", 0.5), ("V", "constant", 0.0)):
        method = SolverOptions(iterations=iterations, relaxation=(kind, "FCF"), cycle=cycle, initial_guess=guess, coarse_step_weight=weight)
        _check_independent(layers, count, method, levels, c)


def _check_independent(layers, count, method, levels, c):
    blocks_of = [split_evenly(count, workers) for workers in (1, 2, 3, 5, 7)] + [(1, count - 2, 1), (count - 1, 1), (0, 7, count - 7)]
    reference = None
    for blocks in blocks_of:
        outcomes = run_workers(
            len(blocks), lambda channel, blocks=blocks: both_solves(channel, layers, blocks, method, method, levels, levels, c)
        )
        _, gradients, output = gather(outcomes)
        measured = [how.residuals for how in outcomes[0][-1]]
        if reference is None:
            reference = gradients, output, measured
        torch.testing.assert_close(output, reference[1], rtol=1e-10, atol=1e-10)
        for n in range(count):
            torch.testing.assert_close(gradients[n], reference[0][n], rtol=1e-10, atol=1e-10)
        for got, wanted in zip(measured, reference[2], strict=True):
            assert got == pytest.approx(wanted, rel=1e-8, abs=1e-12)


def test_a_state_of_two_tensors():
    layers = Layers(12, parts=2)
    states, gradients = layers.serial()
    method = SolverOptions(iterations=3)
    outcomes = run_workers(3, lambda channel: both_solves(channel, layers, (4, 3, 5), method, method))
    _, got, output = gather(outcomes)
    for part, wanted in zip(output, states[-1], strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-10, atol=1e-10)
    for n in range(12):
        torch.testing.assert_close(got[n], gradients[n], rtol=1e-10, atol=1e-10)


def test_forward_and_backward_are_configured_separately():
    layers = Layers(16)
    states, gradients = layers.serial()
    serial, two = SolverOptions(iterations=1), SolverOptions(iterations=4)
    outcomes = run_workers(2, lambda channel: both_solves(channel, layers, (8, 8), serial, two, levels=1))
    _, got, output = gather(outcomes)
    assert outcomes[0][-1][0].status is Status.EXACT
    torch.testing.assert_close(output, states[-1], rtol=1e-12, atol=1e-12)
    for n in range(16):
        torch.testing.assert_close(got[n], gradients[n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("iterations", "evaluations"), [(1, 32), (2, 32 + 27), (3, 32 + 2 * 27)])
def test_no_layer_is_evaluated_twice_from_one_state(iterations, evaluations):
    """XBraid needs 40, 88, 136 layer evaluations at N = 32, c_f = 4 (F-relaxation, skipped down-cycle).

    Here the coarse solve's 7 serve as the first of 7 intervals in the last sweep. A further iteration takes the other 3 layers of 7
    intervals, and the 6 coarse steps whose start it has moved.
    """
    layers = Layers(32)

    class Counting(Forward):
        calls = 0

        def step(self, n, state):
            Counting.calls += 1
            return super().step(n, state)

        def last_step(self, n, state, known):
            Counting.calls += known is None
            after = super().last_step(n, state, known)
            assert known is None or torch.equal(known, after)
            return after

    options = SolverOptions(iterations=iterations, relaxation=("F",))
    solve_alone(build_hierarchy(blocks=(32,), levels=2, coarsening=4), options, Counting(layers), layers)
    assert Counting.calls == evaluations


@pytest.mark.parametrize(("iterations", "evaluations"), [(1, 7), (2, 7 + 34), (3, 7 + 2 * 34)])
def test_nor_is_any_in_the_adjoint(iterations, evaluations):
    """Before the last sweep. A further iteration takes the 4 layers of 7 intervals, and the 6 coarse steps whose start has changed."""
    layers = Layers(32)
    hierarchy, forward = build_hierarchy(blocks=(32,), levels=2, coarsening=4), Forward(layers)
    solve_alone(hierarchy, SolverOptions(), forward, layers)
    adjoint = Adjoint(forward)
    solve_alone(hierarchy.adjoint(), SolverOptions(iterations=iterations, relaxation=("F",)), adjoint, layers)
    assert adjoint.calls == evaluations


def test_the_identity_evaluates_no_layer_on_the_coarse_grid():
    layers = Layers(16)

    class Counting(Forward):
        calls = 0

        def step(self, n, state):
            Counting.calls += 1
            return super().step(n, state)

    hierarchy = build_hierarchy(blocks=(16,), levels=2, coarsening=4)
    method = SolverOptions(iterations=2, relaxation=("F",), coarse_step_weight=0)
    _, how = solve_alone(hierarchy, method, Counting(layers), layers)
    # F-relaxation of four intervals, and the steps into the three C-points: all fine.
    assert Counting.calls == 4 * 3
    assert len(how.residuals) == 1  # a coarse initial guess counts as an iteration, and measures none


def test_a_tolerance_stops_early_and_a_cap_holds():
    layers = Layers(32)
    hierarchy = build_hierarchy(blocks=(32,), levels=2, coarsening=4)
    _, how = solve_alone(hierarchy, SolverOptions(iterations=7, tolerance=1e-3), Forward(layers), layers)
    assert len(how.residuals) < 6
    assert how.status is Status.CONVERGED
    _, how = solve_alone(hierarchy, SolverOptions(iterations=3, tolerance=1e-30), Forward(layers), layers)
    assert len(how.residuals) == 2
    assert how.status is Status.CONVERGING
    assert 0 < how.convergence_factor < 0.5


def test_statuses_advise():
    assert judge((), None) is Status.UNMEASURED
    assert judge((1.0, 2.0), 2.0) is Status.DIVERGING
    assert "mode=serial" in Status.DIVERGING.value
    assert judge((1.0, 0.95), 0.95) is Status.STALLED
    assert judge((1.0, float("nan")), None) is Status.NOT_FINITE


class Rounded(Forward):
    """Layers whose increment is computed in bfloat16, as under autocast; the state is in float32."""

    def step(self, n, state):
        return state + (super().step(n, state) - state).bfloat16().float()


@pytest.mark.parametrize(("kind", "rounding", "iterations"), [(Forward, 0.0, 12), (Rounded, 2.0**-8, 8)])
def test_what_is_left_of_rounding_counts_as_converged_not_as_a_factor(kind, rounding, iterations):
    """Ratios of residuals that are mere rounding errors are near 1, whatever the method does."""
    layers, single, hierarchy = Layers(64), Layers(64), build_hierarchy(blocks=(64,), levels=2, coarsening=4)
    single.weights, single.state = [weight.detach().float() for weight in single.weights], single.state.float()
    _, found = solve_alone(hierarchy, SolverOptions(iterations=iterations, relaxation=("F",), rounding=rounding), kind(single), single)
    # What was taken for the convergence factor. The last residuals may be zero, which depends on the processor.
    assert max(after / before for before, after in itertools.pairwise(found.residuals) if before and after <= found.floor) > 0.3
    assert found.convergence_factor < 0.1
    assert found.status is Status.CONVERGED
    assert min(found.residuals) <= found.floor < found.residuals[0] / 10
    assert all(factor is None or factor < 0.3 for factor in found.factors[0])
    _, exact = solve_alone(hierarchy, SolverOptions(iterations=4), Forward(layers), layers)
    assert exact.floor < 1e-3 * min(exact.residuals)  # in double precision nothing changes
    assert exact.convergence_factor == exact.residuals[-1] / exact.residuals[-2]


def test_a_factor_of_a_residual_far_above_rounding_is_told():
    assert convergence_factor((1.0, 0.5), 0.2) == 0.5
    assert convergence_factor((1.0, 0.01), 0.02) == 0.01  # at least so small
    assert convergence_factor((0.1, 0.019), 0.02) == 0
    assert convergence_factor((0.01,), 0.02) == 0
    assert convergence_factor((1.0,), 0.02) is None
    assert convergence_factor(()) is None
    assert judge((0.1, 0.019, 0.018), 0.0, floor=0.02) is Status.CONVERGED


@pytest.mark.parametrize("kind", ["F", "FCF"])
def test_factors_of_points_are_those_of_each_points_residuals(kind):
    layers, method = Layers(40), SolverOptions(iterations=3, relaxation=(kind,))
    found = {}
    for workers in (1, 3):
        outcomes = run_workers(
            workers,
            lambda channel, workers=workers: both_solves(channel, layers, split_evenly(40, workers), method, method, 3, 3, (4, 2)),
        )
        assert len({(forward.factors, back.factors) for *_, (forward, back) in outcomes}) == 1  # all workers know all
        found[workers] = outcomes[0][-1]
        for each in (0, 1):
            # What belongs to the points adds up to the whole, and is where its worker says.
            whole = sum(outcome[each].residuals.squared for outcome in outcomes)
            points = [sum(outcome[each].residuals.points[level] for outcome in outcomes) for level in (0, 1)]
            assert [tuple(table.shape) for table in points] == [(2, 9), (2, 4)]
            torch.testing.assert_close(points[0].sum(1), whole)
            for level, table in enumerate(points):
                factors = [None if factor is None else pytest.approx(factor, rel=1e-9) for factor in found[workers][each].factors[level]]
                ratios = (table[1] / table[0]).sqrt().tolist()
                assert [None if factor is None else ratio for factor, ratio in zip(factors, ratios, strict=True)] == factors
    for alone, together in zip(found[1], found[3], strict=True):
        exact = {"F": 1, "FCF": 3}[kind]  # points, by the second residual
        for result in (alone, together):
            assert [factor is None for factor in result.factors[0]] == [True] * exact + [False] * (9 - exact)
        for one, other in zip(alone.factors, together.factors, strict=True):
            assert [factor for factor in one if factor] == pytest.approx([factor for factor in other if factor], rel=1e-9)
        # They are what ρ is made of: it lies between the least and the largest.
        assert min(filter(None, alone.factors[0])) < alone.convergence_factor < max(filter(None, alone.factors[0]))
    few, how = solve_alone(build_hierarchy(blocks=(40,), levels=2, coarsening=4), SolverOptions(iterations=2), Forward(layers), layers)
    assert (len(how.residuals), few.residuals.points, how.factors) == (1, (), ())


@pytest.mark.parametrize(("kind", "measured", "informative"), [("F", 6, 5), ("FCF", 6, 2)])
def test_residuals_that_are_zero_by_construction_do_not_count(kind, measured, informative):
    layers = Layers(24)
    hierarchy = build_hierarchy(blocks=(24,), levels=2, coarsening=4)
    method = SolverOptions(iterations=7, relaxation=(kind,))
    _, result = solve_alone(hierarchy, method, Forward(layers), layers)
    assert len(result.residuals) == measured
    assert all(r > 1e-12 for r in result.residuals[:informative])
    assert all(r < 1e-14 for r in result.residuals[informative:])
    assert result.convergence_factor == result.residuals[informative - 1] / result.residuals[informative - 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": (16,), "levels": 2, "coarsening": 16}, "leaves one coarse step"),
        ({"blocks": (16,), "levels": 4, "coarsening": 4}, "leaves one coarse step on level 2"),
        ({"blocks": (16,), "levels": 2, "coarsening": 1}, "at least 2"),
        ({"blocks": (16,), "levels": 0, "coarsening": 2}, "at least 1"),
        ({"blocks": (), "levels": 1, "coarsening": 2}, "at least one layer"),
        ({"blocks": (16,), "levels": 3, "coarsening": (4,)}, "3 levels need 2"),
    ],
)
def test_impossible_hierarchies_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        build_hierarchy(**arguments)
