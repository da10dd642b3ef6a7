"""Steps by windows, and exact ones with layers in turn, compared with autograd and with themselves on other numbers of workers."""

from dataclasses import replace

import pytest
import torch

from rayllp.channel import LocalChannel, run_workers
from rayllp.channel.torch_dist import TorchChannel
from rayllp.control import Accuracy, Controller, ProbePlan
from rayllp.engine.propagators import AdjointPropagator
from rayllp.errors import SettingsError
from rayllp.mgrit.windows import Windows, equal_windows
from rayllp.plan import Costs, predict
from rayllp.timeline import Timeline
from tests.conftest import make_engine, run_processes, tiny
from tests.test_control import relative_error
from tests.test_families import CASES, config_of, ours

SERIAL = Accuracy(serial=True, levels_forward=1, levels_backward=1, iterations_forward=1, iterations_backward=1)


def sweeps(forward, backward, windows=(1, 1, 4, 4, 1, 1)):
    """Every window takes so many sweeps. The network has 2 + 8 + 2 layers."""
    iterations = {"iterations_forward": forward, "iterations_backward": backward}
    return Accuracy(serial=False, levels_forward=2, levels_backward=2, **iterations, windows=Windows.alike(windows, forward, backward))


def of_each(*windows):
    """Windows (length, forward sweeps, backward sweeps), of different lengths and sweeps."""
    lengths, forward, backward = zip(*windows, strict=True)
    pairs = tuple(zip(forward, backward, strict=True))
    return replace(sweeps(max(forward), max(backward)), windows=Windows(lengths, pairs))


MIXED = of_each((1, 1, 1), (4, 3, 2), (2, 1, 1), (2, 2, 1), (3, 1, 1))


def rolling(tolerance):
    """A rolling window of as many layers as `cyclic` has set."""
    return replace(SERIAL, serial=False, tolerance=tolerance)


def cyclic(workers, **changes):
    changes.setdefault("solver", "windows")
    changes.setdefault("windows", {"length": 4})
    return tiny(workers=workers, **changes)


def gradients(config, accuracy, channel=None, step=3):
    engine = make_engine(config, channel)
    formed = engine.gradients(engine.step_batch(step, accuracy))
    return formed, {name: p.grad.clone() for name, p in engine.block.parameters.items() if p.grad is not None}


def on_workers(workers, accuracy, **changes):
    """Return the loss and the gradients of all workers' layers, with those of tied copies added up."""
    config = cyclic(workers, **changes)
    found = run_workers(workers, lambda channel: gradients(config, accuracy, channel))
    total = {}
    for _, mine in found:
        for name, gradient in mine.items():
            name = name.replace("lm_head.weight", "transformer.wte.weight")
            total[name] = total[name] + gradient if name in total else gradient
    return float(sum(formed.loss for formed, _ in found)), total


def assert_same(found, wanted, tolerance=0.0):
    assert found[0] == pytest.approx(wanted[0], rel=max(tolerance, 1e-15))
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("changes", [{}, {"model": {"dropout": 0.1}}, {"recompute": True}, {"accumulate": 2}])
@pytest.mark.parametrize("workers", [2, 4])
def test_as_many_sweeps_as_layers_are_exact(workers, changes):
    wanted = on_workers(1, SERIAL, **changes)
    assert_same(on_workers(workers, sweeps(4, 4), **changes), wanted, 1e-9)


@pytest.mark.parametrize("changes", [{}, {"microbatches": 1}, {"microbatches": 2}, {"model": {"dropout": 0.1}}, {"recompute": True}])
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_exact_steps_with_layers_in_turn(workers, changes):
    assert_same(on_workers(workers, SERIAL, **changes), on_workers(1, SERIAL, **changes), 1e-9)


@pytest.mark.parametrize(
    ("iterations", "windows"),
    [((1, 1), (4, 4, 4)), ((2, 1), (4, 4, 4)), ((3, 2), (1, 1, 4, 4, 1, 1)), ((2, 1), (1, 1, 2, 4, 4)), ((1, 1), (3, 1, 1, 1, 1, 1, 4))],
)
def test_the_bits_do_not_depend_on_the_number_of_workers(iterations, windows):
    wanted = on_workers(1, sweeps(*iterations, windows))
    for workers in (2, 4):
        found = on_workers(workers, sweeps(*iterations, windows))
        tied = "transformer.wte.weight"  # a sum over the two ends of the network
        torch.testing.assert_close(found[1].pop(tied), wanted[1][tied], rtol=1e-12, atol=1e-14)
        assert_same(found, (wanted[0], {name: g for name, g in wanted[1].items() if name != tied}))


def test_windows_that_are_given_one_by_one():
    assert_same(on_workers(2, of_each((1, 2, 1), (3, 2, 1), (4, 2, 1), (4, 2, 1))), on_workers(2, sweeps(2, 1, (1, 3, 4, 4))))
    wanted = on_workers(1, MIXED)
    for workers in (2, 3, 4):
        assert_same(on_workers(workers, MIXED), wanted)
    assert_same(on_workers(3, of_each((3, 3, 3), (5, 5, 5), (4, 4, 4))), on_workers(1, SERIAL), 1e-9)


@pytest.mark.parametrize("windows", [(1, 1, 4, 4, 1, 1), (4, 4, 4), (1, 1, 2, 4, 4)])
def test_one_sweep_each_way_is_the_exact_gradient_of_the_network_of_windows(windows):
    config = cyclic(1)
    engine = make_engine(config)
    batch, block = engine.step_batch(3, SERIAL), engine.block
    bound = block.bind(batch)
    state, layers = bound.enter(batch.inputs), list(block.indices)
    for length in windows:
        state = state + sum(bound.layer(n, state) - state for n in layers[:length])
        layers = layers[length:]
    (block.architecture.training_loss(bound.leave(state), batch.targets) * batch.scale).backward()
    wanted = {name: p.grad for name, p in block.parameters.items()}
    _, found = gradients(config, sweeps(1, 1, windows))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_sweep_more_makes_the_gradient_more_accurate():
    exact = torch.cat([g.flatten() for g in on_workers(1, SERIAL)[1].values()])
    errors = []
    for iterations in ((1, 1), (2, 1), (2, 2), (3, 3)):
        found = torch.cat([g.flatten() for g in on_workers(1, sweeps(*iterations))[1].values()])
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.1 * errors[0]


def test_windows_of_one_layer_are_exact():
    assert_same(on_workers(2, sweeps(1, 1, (1,) * 12)), on_workers(1, SERIAL), 1e-9)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_exact_steps_of_layers_whose_backward_pass_cannot_be_cut_in_two(microbatches):
    """An activation that changes a module's output in place; what the first microbatch shows holds for the others, recorded before."""

    def work(channel):
        engine = make_engine(cyclic(channel.size, microbatches=microbatches if channel.size > 1 else None), channel)
        for layer in engine.block.layers.values():
            layer.mlp.act = torch.nn.ReLU(inplace=True)
        engine.gradients(engine.step_batch(3, SERIAL))
        return {name: p.grad for name, p in engine.block.parameters.items() if "transformer.h." in name}

    (wanted,) = run_workers(1, work)
    for found in run_workers(4, work):
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


# A rolling window -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"model": {"dropout": 0.1}}, {"recompute": True}, {"accumulate": 2}])
@pytest.mark.parametrize("workers", [2, 4])
def test_without_a_tolerance_a_rolling_window_is_exact(workers, changes):
    assert_same(on_workers(workers, rolling(0.0), **changes), on_workers(1, SERIAL, **changes), 1e-9)


@pytest.mark.parametrize("tolerance", [1.0, 0.03])
def test_a_rolling_window_gives_the_same_bits_on_any_number_of_workers(tolerance):
    wanted, tied = on_workers(1, rolling(tolerance)), "transformer.wte.weight"
    for workers in (2, 4):
        found = on_workers(workers, rolling(tolerance))
        torch.testing.assert_close(found[1].pop(tied), wanted[1][tied], rtol=1e-12, atol=1e-14)
        assert_same(found, (wanted[0], {name: g for name, g in wanted[1].items() if name != tied}))


def test_less_tolerance_is_a_more_accurate_gradient():
    exact = torch.cat([g.flatten() for g in on_workers(1, SERIAL)[1].values()])
    errors = []
    for tolerance in (1.0, 0.05, 0.01, 0.002):
        found = torch.cat([g.flatten() for g in on_workers(1, rolling(tolerance))[1].values()])
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_rolling_window_keeps_few_graphs_once_the_adjoint_is_under_way(recompute, monkeypatch):
    """Parameter gradients are formed every P layers, on all workers at once. With recomputation that bounds the graphs, too."""
    most, left = [], []
    tentative = AdjointPropagator.tentative_step

    def watched(self, layer, state):
        found = tentative(self, layer, state)
        most.append(len(self.forward.graphs))
        left.append(len(self._left))
        return found

    monkeypatch.setattr(AdjointPropagator, "tentative_step", watched)
    on_workers(4, rolling(1.0), recompute=recompute, model={"layers": 24})
    assert max(left) <= 3
    assert max(most) <= (3 if recompute else 6)


def test_a_probe_of_a_rolling_window_tells_its_sweeps_and_compares_it_with_less_tolerance():
    plan = ProbePlan(candidate=rolling(0.05), bias=True)

    def work(channel):
        used = make_engine(cyclic(channel.size), channel).train_step(3, rolling(0.05), plan)
        exact = make_engine(cyclic(channel.size), channel).train_step(3, SERIAL, plan)
        return used, exact

    for used, exact in run_workers(2, work):
        assert used.findings.sweeps == exact.findings.sweeps
        assert all(3 <= count < 12 for count in used.findings.sweeps)
        assert used.forward.sweeps > used.findings.sweeps[0]
        assert used.comparison.bias == pytest.approx(exact.comparison.bias, rel=0.3)
        assert used.comparison.noise == pytest.approx(exact.comparison.noise, rel=0.1)
        assert exact.forward is None


def step_over_gloo(rank, size, config, accuracy):
    engine = make_engine(config, TorchChannel(timeout_s=60))
    return [engine.train_step(step, accuracy).loss for step in range(3)], engine.evaluate(2)["loss"]


@pytest.mark.parametrize("accuracy", [sweeps(2, 1), MIXED, rolling(0.03), SERIAL])
def test_training_over_gloo_and_the_evaluation_are_those_of_one_worker(accuracy):
    engine = make_engine(cyclic(1))
    wanted = [engine.train_step(step, accuracy).loss for step in range(3)], engine.evaluate(2)["loss"]
    for losses, evaluation in run_processes(3, step_over_gloo, cyclic(3), accuracy):
        assert losses == pytest.approx(wanted[0], rel=1e-10)
        assert evaluation == pytest.approx(wanted[1], rel=1e-10)


def test_a_probe_tells_rho_bias_and_noise_and_trains_by_the_better_gradient():
    plan = ProbePlan(candidate=sweeps(1, 1), bias=True)

    def work(channel):
        used = make_engine(cyclic(channel.size), channel).train_step(3, sweeps(1, 1), plan)
        engine = make_engine(cyclic(channel.size), channel)
        exact = engine.train_step(3, SERIAL, plan)
        plain = make_engine(cyclic(channel.size, microbatches=1), channel)
        plain.train_step(3, SERIAL)
        same = [torch.allclose(p, plain.block.parameters[name], rtol=1e-9) for name, p in engine.block.parameters.items()]
        return used, exact, all(same)

    (_, noise) = work(LocalChannel.alone())[0].comparison.bias, work(LocalChannel.alone())[0].comparison.noise
    for used, exact, same in run_workers(2, work):
        assert 0 < used.comparison.bias < 0.1
        assert used.comparison.noise == pytest.approx(noise, rel=1e-9)
        assert used.comparison.bias == pytest.approx(exact.comparison.bias, rel=1e-3)  # three sweeps against exact
        assert exact.comparison.noise is not None
        assert 0 < used.findings.rho_forward < 0.2
        assert 0 < used.findings.rho_backward < 0.2
        assert same


@pytest.mark.parametrize(("batch", "microbatches"), [(6, 2), (20, 4), (12, None)])
def test_an_exact_probe_takes_the_gradient_of_every_sample(batch, microbatches):
    """Whose halves do not divide by `microbatches`."""
    plan = ProbePlan(candidate=rolling(0.02), bias=True)

    def work(channel, plan=plan):
        engine = make_engine(cyclic(channel.size, batch_size=batch, microbatches=microbatches), channel)
        return engine.train_step(3, SERIAL, plan).loss, {name: p.detach() for name, p in engine.block.parameters.items()}

    loss, wanted = work(LocalChannel.alone(), None)
    for found, parameters in run_workers(2, work):
        assert found == pytest.approx(loss, rel=1e-12)
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                parameter, wanted["transformer.wte.weight" if name == "lm_head.weight" else name], rtol=1e-9, atol=1e-12
            )


def noise_of_halves(first):
    """Of the exact gradients of these samples and of the others of a batch of 8, as a probe measures it."""
    engine = make_engine(cyclic(1, batch_size=8))
    batch, found = engine.step_batch(3, SERIAL), []
    for samples in (first, [k for k in range(8) if k not in first]):
        rows = torch.tensor(samples)
        engine.gradients(replace(batch, inputs=batch.inputs[rows], targets=batch.targets[rows], samples=tuple(samples)))
        layers = [engine.block.layers[n] for n in range(2, 10)]
        found.append([torch.cat([p.grad.flatten() for p in layer.parameters()]).double() for layer in layers])
        engine.optimizer.zero_grad()
    return relative_error([2 * gradient for gradient in found[0]], [*map(torch.add, *found)])


@pytest.mark.parametrize("accuracy", [rolling(0.05), SERIAL])
def test_a_probe_finds_the_same_whatever_the_number_of_replicas(accuracy):
    """Bias and noise are of the gradient of the whole batch."""
    plan = ProbePlan(candidate=sweeps(1, 1), bias=True, exact=True)

    def work(channel):
        config = cyclic(channel.size, batch_size=8, mesh={"data": channel.size, "layer": 1}, microbatches=1)
        return make_engine(config, LocalChannel.alone(), channel).train_step(3, accuracy, plan).comparison

    alone = work(LocalChannel.alone())
    for replicas in (2, 4):
        for found in run_workers(replicas, work):
            assert found.bias == pytest.approx(alone.bias, rel=1e-9)
            assert found.cosine == pytest.approx(alone.cosine, rel=1e-9)
            assert found.loss_gap == pytest.approx(alone.loss_gap, rel=1e-9)
            assert found.noise == pytest.approx(noise_of_halves([k for k in range(8) if k % (8 // replicas) < 4 // replicas]), rel=1e-9)


@pytest.mark.parametrize("name", ["lm_head.*", "transformer.wte.*"])
def test_a_tied_parameter_is_trained_by_either_of_its_names(name):
    def work(channel):
        engine = make_engine(cyclic(channel.size, model={"train": [name]}), channel)
        before = {each: p.detach().clone() for each, p in engine.block.parameters.items()}
        engine.train_step(0, rolling(0.01))
        return {each: p.detach() for each, p in engine.block.parameters.items() if not torch.equal(p, before[each])}

    first, last = run_workers(2, work)
    assert [*first] == ["transformer.wte.weight"]
    assert [*last] == ["lm_head.weight"]
    torch.testing.assert_close(first["transformer.wte.weight"], last["lm_head.weight"], rtol=0, atol=0)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_every_family(family, head, monkeypatch):
    """On two and three workers, with dropout, as many sweeps as layers, layers in turn, and no tolerance give the exact gradient."""
    options = {"solver": "windows", "model": {"dropout": 0.1}}
    wanted, _, _, wanted_loss = ours(config_of(family, head, **options), SERIAL)
    monkeypatch.setattr("rayllp.mgrit.shares.IN_PIECES_BYTES", 0)
    for workers, accuracy in ((2, sweeps(3, 3)), (3, SERIAL), (2, rolling(0.0)), (3, rolling(0.0))):
        config = config_of(family, head, workers=workers, **options)
        got, _, _, loss = ours(config, replace(accuracy, windows=Windows.alike(equal_windows(len(config.solved_layers), 3), 3, 3)))
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=1e-12)
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "accuracy",
    [
        sweeps(2, 2, (4,) * 5),
        sweeps(2, 2, (1, 1, 2, 4, 4, 4, 4)),
        of_each((1, 1, 1), (3, 3, 1), (4, 2, 3), (4, 1, 2), (4, 1, 1), (4, 1, 1)),
    ],
)
def test_a_step_takes_what_the_planner_says(accuracy):
    """Compares work by worker and kind, counted on a timeline, with the schedule on logical clocks."""
    config = cyclic(4, model={"layers": 20})

    def work(channel):
        engine = make_engine(config, channel)
        engine.timeline = Timeline()
        engine.train_step(0, accuracy)
        return [span.name for span in engine.timeline.spans if span.kind == "compute"]

    costs = Costs(forward=1, record=1, input_gradient=1, full_gradient=2)
    for mine, planned in zip(run_workers(4, work), predict(config, accuracy, costs).spans, strict=True):
        for name in ("forward relaxation", "forward last sweep", "adjoint relaxation", "adjoint last sweep"):
            assert mine.count(name) == sum(span.name == name for span in planned)


@pytest.mark.parametrize("tolerance", [1.0, 0.02])
def test_a_step_by_a_rolling_window_takes_what_the_planner_says(tolerance):
    """The planner does not know the strides, but work follows from the number of sweeps, except at the ends of the network."""
    config = cyclic(4, model={"layers": 20})

    def work(channel):
        engine = make_engine(config, channel)
        engine.timeline = Timeline()
        stats = engine.train_step(0, rolling(tolerance))
        return (stats.forward.sweeps, stats.adjoint.sweeps), [span.name for span in engine.timeline.spans if span.kind == "compute"]

    costs, found = Costs(forward=1, record=1, input_gradient=1, full_gradient=2), run_workers(4, work)
    planned = predict(config, rolling(tolerance), costs, sweeps=found[0][0]).spans
    for (_, mine), expected in zip(found, planned, strict=True):
        for name in ("forward sweep", "adjoint sweep"):
            assert mine.count(name) == pytest.approx(sum(span.name == name for span in expected), abs=1)
        assert mine.count("adjoint settle") == sum(span.name == "adjoint settle" for span in expected) == 5


def test_what_windows_cannot_do_is_refused_in_words():
    for changes, words in (
        ({"adaptive": {"consistency": 1.0}}, "consistency is for coarse steps"),
        ({"adaptive": {"smoothness": 1.0}}, "wants neighbouring layers on one worker"),
        ({"mesh": {"blocks": (4, 4)}}, "mesh.blocks shares out neighbouring layers"),
        ({"mgrit": {"tolerance": 1e-3}}, "mgrit.tolerance is of solver: mgrit, and solver is windows: set solver: mgrit, or leave"),
        ({"mgrit": {"levels": {"forward": 3}}}, "mgrit.levels.forward is of solver: mgrit"),
        ({"adaptive": {"ladder": ["0+1"]}}, "windows take sweeps, such as 2\\+1"),
        ({"solver": "mgrit", "windows": {"length": 4}}, "windows.length is of solver: windows, and solver is mgrit"),
    ):
        with pytest.raises(SettingsError, match=words):
            cyclic(2, **changes)


def test_the_controller_of_a_cyclic_run_hands_out_windows():
    config = cyclic(4, mode="adaptive", adaptive={"rule": "bias", "probe_every": 10}, windows={"rolling": False})
    control = Controller(config)
    assert [(rung.name, rung.windows.lengths, rung.serial) for rung in control.rungs] == [
        (name, (1, 1, 4, 4, 1, 1), name == "serial") for name in ("1+1", "2+1", "2+2", "3+3", "serial")
    ]
