"""Linear maps of low rank for how layers respond to changes: their fit, what a rolling window makes of them, and how workers share them."""

import pytest
import torch

from rayllp.channel import run_workers
from rayllp.channel.base import StateSpec
from rayllp.control import ProbePlan
from rayllp.engine.layer_responses import LayerResponses
from rayllp.errors import ChannelError
from rayllp.mgrit import Communicator
from rayllp.mgrit.placement import Placement
from rayllp.mgrit.responses import RANK, Response, ResponseFit, factor_shapes
from rayllp.mgrit.rolling import RollingOptions, RollingProblem, RollingSolver
from rayllp.state import tensors
from tests.conftest import make_engine
from tests.test_rolling import Watched, error
from tests.test_window_engine import SERIAL, cyclic, rolling
from tests.test_windows import TAG

N, WIDTH, TOKENS = 16, 12, 40


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(matrix, pairs=3, **kind):
    """The response of a layer with increment x → x·matrix, after so many pairs."""
    fit = ResponseFit()
    for number in range(pairs + 1):
        x = random(TOKENS, len(matrix), seed=number).to(**kind)
        fit.observe(x, x @ matrix.to(**kind))
    down, up = fit.factors()
    return Response(((down.to(**kind), up.to(**kind)),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, RANK, WIDTH])
def test_a_linear_layer_is_found_out(width, dtype):
    matrix = random(width, min(width, RANK), seed=7) @ random(min(width, RANK), width, seed=8)
    e = random(5, width, seed=9).to(dtype)
    found = fitted(matrix, dtype=dtype).follow(torch.zeros_like(e), e)
    right = e.double() @ matrix
    assert float((found.double() - right).norm() / right.norm()) < 0.15  # the ridge shortens it by a tenth


def test_each_token_is_scaled_by_what_it_has_shown():
    matrix, e = random(WIDTH, RANK, seed=7) @ random(RANK, WIDTH, seed=8), random(4, WIDTH, seed=9)
    response, step = fitted(matrix, dtype=torch.float64), random(4, WIDTH, seed=10)
    plain = response.follow(torch.zeros_like(e), e)
    factors = torch.tensor([[1.0], [0.5], [-1.0], [9.0]], dtype=torch.float64)
    found = response.follow(torch.zeros_like(e), e, (step, factors * response.follow(torch.zeros_like(e), step)))
    torch.testing.assert_close(found, plain * torch.tensor([[1.0], [0.5], [0.0], [1.5]], dtype=torch.float64))
    still = response.follow(e, e, (step * 0, step * 0))  # nothing has been shown
    assert torch.equal(still, e)


def test_of_a_wide_state_the_strongest_directions_are_kept():
    """A map of rank 2 whose inputs change in four directions, out of 100."""
    inputs, matrix = random(4, 100, seed=1), random(100, 2, seed=2) @ random(2, 100, seed=3)
    fit = ResponseFit()
    for number in range(4):
        x = random(TOKENS, 4, seed=10 + number) @ inputs
        fit.observe(x, x @ matrix)
    down, up = fit.factors()
    assert [down.shape, up.shape] == factor_shapes([torch.Size([TOKENS, 100])]) == [(100, RANK), (RANK, 100)]
    e = random(5, 4, seed=30) @ inputs
    right = e @ matrix
    assert float((e @ down.double() @ up.double() - right).norm() / right.norm()) < 0.15


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3, 4)])
def test_a_state_of_any_shape_can_be_followed(shape):
    fit, x = ResponseFit(), torch.ones(shape)
    fit.observe(x, x)
    fit.observe(2 * x, 3 * x)
    factors = fit.factors()
    assert [factor.shape for factor in factors] == factor_shapes([torch.Size(shape)])
    followed = Response((tuple(factors),)).follow(x, x, (x, 2 * x))
    torch.testing.assert_close(followed, 3 * x)  # the scale makes up for the ridge


def test_what_shows_nothing_gives_no_response():
    fit, x = ResponseFit(), random(TOKENS, WIDTH)
    fit.observe(x, x)
    assert fit.factors() == []
    fit.begin_solve()
    fit.observe(2 * x, x)  # of another solve
    assert fit.factors() == []
    for nothing in (x * 0, x * torch.nan):
        fit = ResponseFit()
        fit.observe(x, x)
        fit.observe(x + nothing, x)
        assert all(not factor.any() for factor in fit.factors())


def solve(workers, length, tolerance, responses, strength=3.0):
    """Layers x + x·A with strong A. Returns the output, the result, and what each worker has observed."""
    matrices, begin = strength * random(N, WIDTH, WIDTH, seed=5) / WIDTH**0.5 / 4, random(TOKENS, WIDTH, seed=6)

    class Linear(Watched):
        def step(self, layer, state):
            self.calls.append(layer)
            return state + torch.tanh(state @ matrices[layer])

    def work(channel):
        propagator, seen = Linear(None), []
        problem = RollingProblem(Placement.cyclic(N, workers), length, propagator, StateSpec.of(begin))
        options = RollingOptions(tolerance=tolerance, responses=responses, observe=lambda *each: seen.append(each))
        solution = RollingSolver(problem, options, Communicator(channel, TAG)).solve(begin if channel.rank == 0 else None, 0)
        assert [layer for layer, *_ in seen] == propagator.calls
        assert all(torch.allclose(increment, torch.tanh(x @ matrices[layer]), atol=1e-12) for layer, x, increment in seen)
        return solution.output, solution.residuals.sweeps, seen

    exact = begin
    for matrix in matrices:
        exact = exact + torch.tanh(exact @ matrix)
    found = run_workers(workers, work)
    return found[0][0], found[0][1], [each for *_, seen in found for each in seen], exact


def learn(observed):
    fits = {layer: ResponseFit() for layer in range(N)}
    for layer, x, increment in observed:
        fits[layer].observe(x, increment)
    return {layer: Response(((fit.factors()[0].double(), fit.factors()[1].double()),)) for layer, fit in fits.items() if fit.factors()}


def test_known_responses_save_sweeps():
    """Of 16 layers that depend strongly on each other; the solve stays as accurate."""
    output, before, observed, exact = solve(1, 8, 0.01, {})
    assert error(output, exact) < 0.01
    output, after, _, _ = solve(1, 8, 0.01, learn(observed))
    assert error(output, exact) < 0.01
    assert after <= before - 2
    output, sweeps, _, _ = solve(2, 8, 0.0, learn(observed))
    assert torch.allclose(output, exact, rtol=1e-13)
    assert sweeps == N


def test_the_bits_do_not_depend_on_the_number_of_workers():
    responses = learn(solve(1, 6, 0.05, {})[2])
    wanted = solve(1, 6, 0.05, responses)
    for workers in (2, 3, 5):
        found = solve(workers, 6, 0.05, responses)
        assert torch.equal(found[0], wanted[0])
        assert found[1] == wanted[1]


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_large_states_in_pieces(workers, monkeypatch):
    responses = learn(solve(1, 6, 0.05, {})[2])
    wanted = solve(1, 6, 0.05, responses)
    monkeypatch.setattr("rayllp.mgrit.shares.IN_PIECES_BYTES", -1)
    found = solve(workers, 6, 0.05, responses)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
    assert found[1] == wanted[1]


def test_workers_learn_of_their_own_layers_and_share():
    """Seven layers on three workers, two of which have fewer; a state of two tensors; one layer is swept only once."""
    layers, shapes = 7, ((4, 6), (3, 2))
    spec = StateSpec.of(tuple(torch.zeros(shape) for shape in shapes))

    def state(layer, sweep):
        return tuple(random(*shape, seed=100 * layer + sweep).float() for shape in shapes)

    def work(channel):
        responses = LayerResponses(Placement.cyclic(layers, 3), channel, {})
        assert responses.observer("forward") is None
        with responses.learned(spec, 0):
            for solve in ("forward", "adjoint"):
                observe = responses.observer(solve)
                for layer in range(channel.rank, layers, 3):
                    for sweep in range(1 if (solve, layer) == ("adjoint", 4) else 3):
                        x = state(layer, sweep)
                        observe(layer, x, tuple((layer + 1) * part if solve == "forward" else -part for part in x))
        assert responses.observer("forward") is None
        assert responses.known("forward", spec, 0) == {}
        return {solve: responses.known(solve, spec, 1) for solve in ("forward", "adjoint")}

    found = run_workers(3, work)
    for known in found:
        assert {solve: sorted(known[solve]) for solve in known} == {"forward": [*range(7)], "adjoint": [0, 1, 2, 3, 5, 6]}
        for way, layer in ((way, layer) for way, layers in known.items() for layer in layers):
            mine, first = known[way][layer], found[0][way][layer]
            for parts in zip(mine.maps, first.maps, strict=True):
                assert all(torch.equal(*pair) for pair in zip(*parts, strict=True))
            e = state(50, 0)
            followed = mine.follow(tuple(torch.zeros_like(part) for part in e), e)
            factor = layer + 1 if way == "forward" else -1
            assert float((tensors(followed)[1] - factor * e[1]).norm() / (factor * e[1]).norm()) < 0.2


def test_what_was_known_stays_if_a_probe_fails():
    def work(channel):
        responses = LayerResponses(Placement.cyclic(2, 1), channel, {})
        spec, x = StateSpec.of(torch.zeros(3, 2)), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
        with responses.learned(spec, 0):
            observe = responses.observer("forward")
            observe(0, x, x)
            observe(0, 2 * x, 3 * x)
        before = responses.known("forward", spec, 5)
        with pytest.raises(ChannelError), responses.learned(spec, 1):
            raise ChannelError("gone")
        return responses.known("forward", spec, 5) is before and list(before) == [0] and responses.observer("forward") is None

    assert run_workers(1, work) == [True]


def test_a_probe_teaches_all_workers():
    """After a probe the next step takes fewer sweeps for the same tolerance, and the loss is that of one worker."""
    plan = ProbePlan(candidate=rolling(1e-4), bias=True)

    def work(channel):
        engine = make_engine(cyclic(channel.size, step={"middle": 1.0}), channel)
        with_secants = engine.gradients(engine.step_batch(1, rolling(1e-4))).sweeps
        engine.optimizer.zero_grad()
        engine.train_step(0, rolling(1e-4), plan)
        found = engine.train_step(1, rolling(1e-4))
        known = engine.group.responses.known("forward", engine.group.spec(engine.step_batch(1).inputs), 1)
        return with_secants, found.sweeps, found.loss, sorted(known)

    (alone,), both = run_workers(1, work), run_workers(2, work)
    assert both[0][1] == both[1][1] == alone[1]
    assert sum(alone[1]) < sum(alone[0])
    assert all(each[2] == pytest.approx(alone[2], rel=1e-9) for each in both)
    assert both[0][3] == both[1][3] == alone[3]
    assert len(alone[3]) > 6


def test_a_worker_that_joins_gets_what_the_others_know():
    """And a step that is repeated uses what it used before, not what a later probe has found."""
    spec = StateSpec.of(torch.zeros(3, 2))

    def work(channel):
        found = {}
        responses = LayerResponses(Placement.cyclic(2, 2), channel, found)
        for step in (10, 20):
            with responses.learned(spec, step):
                observe = responses.observer("adjoint")
                for sweep in range(3):
                    x = random(3, 2, seed=sweep).float()
                    observe(channel.rank, x, step * x)
        joined = LayerResponses(Placement.cyclic(2, 2), channel, {} if channel.rank == 0 else found)
        assert [joined.is_due(spec, step) for step in (10, 11, 20, 29, 30)] == [True, False, True, False, True]
        e = torch.ones(3, 2)
        known = [joined.known("adjoint", spec, step) for step in (10, 11, 20, 21)]
        return [[float((each[layer].follow(0 * e, e) / e).mean()) for layer in (0, 1) if layer in each] for each in known]

    for first, second, third, fourth in run_workers(2, work):
        assert first == []
        assert second == third == pytest.approx([10, 10], rel=0.2)
        assert fourth == pytest.approx([20, 20], rel=0.2)


def test_findings_of_a_course_that_was_given_up_are_dropped_and_old_ones_too():
    spec, found = StateSpec.of(torch.zeros(3, 2)), {}

    def work(channel):
        responses = LayerResponses(Placement.cyclic(2, 1), channel, found)
        for step in (*range(10, 22), 15):
            with responses.learned(spec, step):
                pass

    run_workers(1, work)
    assert sorted(found) == [14, 15]


def test_every_tenth_step_learns_too():
    """Besides probes; exact steps show nothing. A step that is repeated learns the same again."""
    engine = make_engine(cyclic(1, step={"middle": 1.0}, steps=40))
    for step in range(26):
        engine.train_step(step, SERIAL if step < 3 else rolling(1e-3), ProbePlan(candidate=rolling(1e-3), bias=True) if step == 8 else None)
    found = dict(engine.group.responses.found)
    assert sorted(found) == [3, 8, 18]
    engine.group.responses.found.pop(18)
    engine.train_step(18, rolling(1e-3))
    assert sorted(engine.group.responses.found) == [3, 8, 18]
