"""Compares the consistency penalty with its definition, written out with autograd, on every path that forms it."""

from dataclasses import replace

import pytest
import torch

from rayllp.channel import LocalChannel, run_workers
from rayllp.config import make_config
from rayllp.control import Controller
from rayllp.engine.consistency import Consistency, Interval
from rayllp.engine.pipeline import Pipeline
from rayllp.engine.reduce_gradients import add_shared_gradients
from rayllp.errors import SettingsError
from rayllp.state import tensors
from tests.conftest import merge, run_processes, tiny
from tests.test_engine import ENOUGH, SERIAL
from tests.test_families import config_of, make

MU, C = 3.0, 3


def settings(**changes):
    base = {"step": {"middle": 0.3}, "mgrit": {"coarsening": C}, "buffers": {"open": 1, "close": 1}, "model": {"layers": 11}}
    return config_of(changes.pop("family", "gpt2"), **merge(base, changes))  # 1 + 9 + 1 layers, three intervals


def computed(config, accuracy):
    """Return the gradients merged over the workers, and R."""

    def work(channel):
        engine = make(config, channel)
        batch = engine.step_batch(5, accuracy)
        formed = engine.gradients(batch)
        add_shared_gradients(engine.block, engine.layer_channel, 5)
        gap = engine.reduce_statistics(batch, formed).consistency
        return {name: p.grad for name, p in engine.block.parameters.items()}, gap

    outcomes = run_workers(config.layer_workers, work)
    return {name: grad for mine, _ in outcomes for name, grad in mine.items()}, outcomes[0][1]


def defined(config, *, constant):
    """Return the same by the definition, loss + μ·R, with C_k constant in R or variable in the numerator."""
    engine = make(config, LocalChannel.alone())
    block = engine.block
    batch = engine.step_batch(5)
    bound = block.bind(batch)
    state, penalty = bound.enter(batch.inputs), 0.0
    for start in range(1, 10, C):
        c = tuple(part.detach() if constant else part for part in tensors(state))
        end = first = c if len(c) > 1 else c[0]
        for n in range(start, start + C):
            end = bound.layer(n, end)
            first = end if n == start else first
        gaps = [e - (x + C * (f - x)) for e, f, x in zip(tensors(end), tensors(first), c, strict=True)]
        norm = sum(x.detach().flatten(1).square().sum(1) for x in c)
        penalty = penalty + (sum(gap.flatten(1).square().sum(1) for gap in gaps) / norm).mean()
        for n in range(start, start + C):
            state = bound.layer(n, state)
    loss = block.architecture.training_loss(bound.leave(state), batch.targets) * batch.scale
    (loss + MU * penalty).backward()
    return {name: p.grad for name, p in block.parameters.items()}, penalty.item()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "mt"])
def test_a_parallel_step_adds_the_gradient_with_c_points_constant(family, recompute):
    options = {"family": family, "model": {"dropout": 0.1}, "recompute": recompute}
    wanted, value = defined(settings(**options), constant=True)
    assert value > 1e-6
    without, _ = computed(settings(**options), ENOUGH)
    for workers in (1, 2, 3):
        got, gap = computed(settings(workers=workers, mesh={"blocks": {1: (9,), 2: (3, 6), 3: (3, 3, 3)}[workers]}, **options),
                            replace(ENOUGH, consistency=MU))  # fmt: skip
        assert gap == pytest.approx(value, rel=1e-10)
        middle = [name for name in wanted if any(f".{n}." in name for n in range(1, 10)) and "embed" not in name]
        assert len(middle) > 50
        for name in middle:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-12)
        name = middle[len(middle) // 2]
        assert not torch.allclose(got[name], without[name], rtol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "mt"])
def test_a_serial_step_adds_the_gradient_with_c_points_variable(family, recompute):
    options = {"family": family, "recompute": recompute}
    wanted, value = defined(settings(**options), constant=False)
    exact = replace(ENOUGH, levels_forward=1, levels_backward=1, consistency=MU)
    for workers, accuracy in ((1, replace(SERIAL, consistency=MU)), (1, exact), (3, exact)):
        got, gap = computed(settings(workers=workers, **options), accuracy)
        assert gap == pytest.approx(value, rel=1e-10)
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def over_gloo(rank, size, config, accuracy):
    from rayllp.channel.torch_dist import TorchChannel

    engine = make(config, TorchChannel(timeout_s=60))
    stats = [engine.train_step(step, accuracy) for step in range(3)]
    return [s.loss for s in stats], [s.consistency for s in stats], isinstance(engine.gradients.exact, Pipeline)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_pipeline_adds_it_too_whatever_the_microbatches(recompute):
    accuracy = replace(SERIAL, consistency=MU)
    options = {"mode": "serial", "recompute": recompute}
    ((losses, gaps, _),) = run_processes(1, over_gloo, settings(**options), accuracy)
    for rank_losses, rank_gaps, piped in run_processes(3, over_gloo, settings(workers=3, **options), accuracy):
        assert piped
        assert rank_losses == pytest.approx(losses, rel=1e-10)
        assert rank_gaps == pytest.approx(gaps, rel=1e-10)


def test_accumulation_and_few_iterations_do_not_change_it():
    few = replace(ENOUGH, iterations_forward=1, iterations_backward=1, consistency=MU)
    wanted, value = computed(settings(), few)
    for options in ({"accumulate": 2}, {"workers": 3}, {"workers": 3, "accumulate": 2, "recompute": True}):
        got, gap = computed(settings(**options), few)
        assert gap == pytest.approx(value, rel=1e-9)
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-8, atol=1e-12)


def test_it_costs_no_layer_evaluation():
    calls = []

    def count(accuracy):
        engine = make(settings(), LocalChannel.alone())
        batch, architecture = engine.step_batch(5, accuracy), engine.block.architecture
        advance = architecture.advance
        architecture.advance = lambda *arguments: calls.append(1) or advance(*arguments)
        calls.clear()
        engine.gradients(batch)
        return len(calls)

    assert count(replace(ENOUGH, consistency=MU)) == count(ENOUGH) > 9


def test_training_with_it_lowers_the_gap():
    config = settings(optimizer={"lr": 0.01, "warmup": 1})

    def gaps(mu):
        engine = make(config, LocalChannel.alone())
        few = replace(ENOUGH, iterations_forward=2, iterations_backward=1, consistency=mu)
        return [engine.train_step(step, few).consistency for step in range(25)]

    assert gaps(30.0)[-1] < 0.5 * gaps(1e-9)[-1]


def test_intervals_that_workers_share_are_refused():
    with pytest.raises(SettingsError, match=r"blocks \(8, 8\) cut intervals of 5: set mesh.blocks to multiples of 5"):
        make_config({"solver": "mgrit", "mgrit": {"coarsening": 5}, "mesh": {"blocks": [8, 8]}, "adaptive": {"consistency": 1.0}})
    assert make_config({"solver": "mgrit", "mgrit": {"coarsening": 5}, "adaptive": {"consistency": 1.0}}).blocks == (10, 6)
    assert make_config({"solver": "mgrit", "mgrit": {"coarsening": 5}, "mode": "parallel"}).blocks == (8, 8)


@pytest.mark.parametrize("begin", [0.0, 1e-30])
def test_a_state_that_is_zero_has_a_finite_penalty(begin):
    """C of the first sample is zero or nearly zero, and so is the end of the third."""
    penalty = Consistency(1.0, {0: Interval(0, 2, 1.0)}, torch.zeros((), dtype=torch.float64))
    states = {name: torch.ones(3, 4, 2) for name in ("begin", "first", "end")}
    states["begin"][0] = begin
    for state in states.values():
        state[2] = 0
    states["end"][:2] = 3.0
    seed = penalty.seed(penalty.intervals[0], states["begin"], states["first"], states["end"])
    assert torch.isfinite(seed).all()
    assert torch.isfinite(penalty.value)
    assert (seed[2] == 0).all()
    # As a share of the end, (3 − 2)² / 3²; and of C, (3 − 1)² / 1².
    assert float(penalty.value) == pytest.approx(1 / 9 + 4)


def test_a_switched_run_lets_go_of_it_and_a_serial_one_keeps_it():
    parallel = Controller(tiny(mode="adaptive", adaptive={"consistency": 2.0, "switch_at": 3}))
    assert parallel.accuracy.consistency == 2
    parallel.begin(3)
    assert parallel.accuracy.serial
    assert parallel.accuracy.consistency == 0
    assert Controller(tiny(mode="serial", adaptive={"consistency": 2.0})).accuracy.consistency == 2


def test_the_weight_of_coarse_steps_is_that_of_the_penalty():
    few = replace(ENOUGH, iterations_forward=1, iterations_backward=1, consistency=MU)
    _, gap = computed(settings(), few)
    _, other = computed(settings(mgrit={"coarsening": C, "coarse_step_weight": 0.4}), few)
    assert abs(gap - other) > 1e-3 * gap
