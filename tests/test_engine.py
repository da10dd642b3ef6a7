"""One training step compared with plain transformers, and with itself on other meshes."""

import math
import platform
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rayllp.channel import LocalChannel, run_workers
from rayllp.channel.torch_dist import TorchChannel
from rayllp.config.schedule import learning_rate
from rayllp.control import Accuracy, Controller
from rayllp.engine.batch import StepBatch
from rayllp.engine.layer_group import LayerGroup
from rayllp.engine.reduce_gradients import add_shared_gradients
from rayllp.mgrit import Status
from rayllp.mgrit.deferred import DeferredRun
from rayllp.timeline import TimedStep, Timeline, sum_kinds
from tests.conftest import losses_over_gloo, losses_over_threads, make_engine, run_processes, tiny, train_engine

PLAIN = {"buffers": {"open": 0, "close": 0}, "step": {"middle": 1.0}, "mode": "serial", "model": {"layers": 6}}


def bare_losses(config, steps):
    """Return the losses of a plain transformers training loop with the same weights, batches and AdamW, without our engine."""
    engine = make_engine(config)
    model = GPT2LMHeadModel(GPT2Config(**engine.block.architecture.config.to_dict(), attn_implementation="sdpa"))
    weights = {name: parameter.data for name, parameter in engine.block.parameters.items()}
    model = model.to(engine.block.dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.train()
    settings = config.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    losses = []
    for step in range(steps):
        inputs, targets = engine.batches.batch("train", step, config.batch_size)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, config.steps)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-5)])
def test_serial_mode_is_a_bare_transformers_loop(dtype, tolerance):
    config = tiny(**PLAIN, dtype=dtype)
    wanted = bare_losses(config, 30)
    assert wanted[-1] < wanted[0] - 0.3
    for workers in (1, 2, 3):
        # 1F1B over Gloo, or plain autograd
        losses, piped = run_processes(workers, losses_over_gloo, tiny(**PLAIN, dtype=dtype, workers=workers), 30)[0]
        assert piped == (workers > 1)
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < tolerance


def test_dropout_does_not_depend_on_the_workers():
    dropped = {**PLAIN, "model": {"layers": 6, "dropout": 0.1}}
    wanted = losses_over_threads(tiny(**dropped), 8)
    assert wanted != losses_over_threads(tiny(**PLAIN), 8)
    for workers in (2, 3):
        losses, piped = run_processes(workers, losses_over_gloo, tiny(**dropped, workers=workers), 8)[0]
        assert piped
        assert losses == pytest.approx(wanted, abs=1e-10)
        assert losses_over_threads(
            tiny(**{**dropped, "mode": "parallel"}, workers=workers, mgrit={"levels": {"forward": 1, "backward": 1}}), 8
        ) == pytest.approx(wanted, abs=1e-10)


def gradients(config, accuracy):
    def work(channel):
        engine = make_engine(config, channel)
        formed = engine.gradients(engine.step_batch(3, accuracy))
        add_shared_gradients(engine.block, engine.layer_channel, 3)
        return {name: p.grad.clone() for name, p in engine.block.parameters.items()}, formed.loss

    merged = {}
    for mine, _ in run_workers(config.layer_workers, work):
        merged |= mine
    return merged


SERIAL = Accuracy(serial=True, levels_forward=2, levels_backward=2, iterations_forward=1, iterations_backward=1)
ENOUGH = Accuracy(serial=False, levels_forward=2, levels_backward=2, iterations_forward=4, iterations_backward=4)
FEW = Accuracy(serial=False, levels_forward=2, levels_backward=2, iterations_forward=1, iterations_backward=1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_enough_iterations_equal_serial(recompute, dropout):
    options = {"model": {"layers": 12, "dropout": dropout}, "mgrit": {"coarsening": 3}, "recompute": recompute, "step": {"middle": 0.3}}
    wanted = gradients(tiny(**options), SERIAL)
    for workers in (1, 2, 3, 5):
        got = gradients(tiny(**options, workers=workers), ENOUGH)
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12)
    # The tied head's copy has the embedding's gradient.
    torch.testing.assert_close(got["lm_head.weight"], wanted["transformer.wte.weight"], rtol=1e-10, atol=1e-12)


def test_few_iterations_do_not_depend_on_workers_recomputation_or_accumulation():
    wanted = gradients(tiny(), FEW)
    exact = gradients(tiny(), SERIAL)
    assert any((wanted[name] - exact[name]).norm() > 1e-6 * exact[name].norm() for name in wanted)
    for options in ({"workers": 2}, {"workers": 3, "recompute": True}, {"workers": 2, "accumulate": 2}, {"workers": 8}):
        got = gradients(tiny(**options), FEW)
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


PUT_OFF = {
    "intervals that workers share": {"mgrit": {"coarsening": 5}},
    "one that three share": {"mgrit": {"coarsening": 9}},
    "recomputation": {"mgrit": {"coarsening": 2}, "recompute": True},
    "recomputation of shared ones": {"mgrit": {"coarsening": 5}, "recompute": True},
    "the penalty": {"mgrit": {"coarsening": 2}, "adaptive": {"consistency": 1.0}},
    "three levels": {"mgrit": {"coarsening": 2, "levels": {"forward": 3, "backward": 3}}},
    "an exact adjoint": {"mgrit": {"coarsening": 2, "levels": {"forward": 2, "backward": 1}}},
}


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("case", PUT_OFF)
def test_when_what_was_put_off_is_done_changes_no_bit(case, iterations, monkeypatch):
    config = tiny(workers=3, **{"model": {"layers": 20, "dropout": 0.1}, **PUT_OFF[case]})
    accuracy = replace(Controller(config).chosen, iterations_forward=iterations, iterations_backward=iterations)
    asked, steps = [], []
    with monkeypatch.context() as patch:
        solve = LayerGroup.solve_by_mgrit
        patch.setattr(LayerGroup, "solve_by_mgrit", lambda self, *arguments, **_: solve(self, *arguments))
        wanted = gradients(config, accuracy)  # nothing is put off
    advance = DeferredRun.advance
    monkeypatch.setattr(DeferredRun, "advance", lambda self: advance(self) and (steps.append(self), True)[1])
    for there in (False, True):  # all of it before the first message is looked at, or no layer before the adjoint wants it
        monkeypatch.setattr(LocalChannel, "arrived", lambda *_, there=there: (asked.append(1), there)[1])
        got = gradients(config, accuracy)
        assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())
    assert asked
    assert bool(steps) != ("recompute" in PUT_OFF[case])


def test_recomputation_makes_a_graph_that_was_put_off_once():
    """Two workers, 16 layers, c_f = 4, 1 + 1 iterations: 16 forwards without recomputation; with it, those of the coarse steps too."""
    counts = {}
    for recompute in (False, True):
        config = tiny(model={"layers": 16}, buffers={"open": 0, "close": 0}, workers=2, mgrit={"coarsening": 4}, recompute=recompute)

        def work(channel, config=config):
            engine, calls = make_engine(config, channel), []
            engine.check_first_batch(engine.step_batch(0, FEW))
            for layer in engine.block.layers.values():
                layer.register_forward_hook(lambda *_: calls.append(1))
            engine.train_step(0, FEW)
            return len(calls)

        counts[recompute] = run_workers(2, work)
    # The first worker: 2 coarse steps forward, 1 in the adjoint, and its 8 layers. The second: 1, 2, and 8, and 4 for the loss.
    assert counts == {False: [8, 8], True: [2 + 1 + 8, 1 + 2 + 8 + 4]}


def test_replicas_give_the_same_losses():
    def work_on(data, layer, config):
        layers = [LocalChannel.group(layer) for _ in range(data)]
        replicas = [LocalChannel.group(data) for _ in range(layer)]

        def work(channel):
            d, p = divmod(channel.rank, layer)
            return [stats.loss for stats in train_engine(make_engine(config, layers[d][p], replicas[p][d]), 6)]

        return run_workers(data * layer, work)[0]

    options = {"model": {"dropout": 0.1}, "workers": None}
    one = work_on(1, 2, tiny(**options, mesh={"data": 1, "layer": 2}))
    two = work_on(2, 2, tiny(**options, mesh={"data": 2, "layer": 2}))
    assert two == pytest.approx(one, abs=1e-10)


def test_residuals_at_bfloat16s_rounding_are_converged():
    """GPT-2 with h = 1/N and 6 iterations: in bfloat16 the last residuals are rounding, which must not keep the ladder from going down."""
    six = replace(ENOUGH, iterations_forward=6, iterations_backward=6)
    options = {"model": {"layers": 36}, "step": {"middle": "1/N"}, "mgrit": {"coarsening": 4}}
    stats = {}
    for dtype in ("float32", "bfloat16"):
        stats[dtype] = make_engine(tiny(dtype=dtype, **options)).train_step(0, six)
        found = stats[dtype].findings
        assert found.rho_forward < 0.1
        assert found.rho_backward < 0.1
        config = tiny(dtype=dtype, **options, mode="adaptive", adaptive={"rule": "convergence", "switch_at": 1.0, "probe_every": 5})
        assert Controller(config)._is_calm(found)
    assert stats["bfloat16"].forward.status is stats["bfloat16"].adjoint.status is Status.CONVERGED


def test_bfloat16_autocast_trains():
    losses = losses_over_threads(tiny(dtype="bfloat16", workers=2), 20)
    exact = losses_over_threads(tiny(dtype="float32", workers=2), 20)
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.02)


def test_a_probe_measures_both_convergence_factors():
    config = tiny(workers=2, adaptive={"probe_every": 5}, mgrit={"coarsening": 2}, model={"layers": 20})

    def work(channel):
        return train_engine(make_engine(config, channel), 6)

    stats = run_workers(2, work)[0]
    probed = [s.step for s in stats if s.findings.rho_forward is not None]
    assert probed == [0, 4]
    assert 0 < stats[4].findings.rho_forward < 0.5
    assert 0 < stats[4].findings.rho_backward < 0.5
    assert stats[4].forward.status is Status.CONVERGING


def test_only_the_own_block_is_built():
    config = tiny(workers=3)

    def work(channel):
        engine = make_engine(config, channel)
        return sorted(engine.block.layers), engine.block.embed is not None, engine.block.head is not None

    assert run_workers(3, work) == [([0, 1, 2, 3, 4], True, False), ([5, 6, 7], False, False), ([8, 9, 10, 11], False, True)]


def test_samples_and_steps_that_a_block_is_bound_to_do_not_get_mixed_up():
    block = make_engine(tiny(model={"dropout": 0.1})).block
    state, inputs = torch.randn(2, 16, 16, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.int64)

    def bind(step, first, training):
        if not training:
            return block.bind_for_evaluation(inputs)
        return block.bind(StepBatch(step, SERIAL, inputs, inputs, (first, first + 1), 1.0))

    ways = [(step, first, training) for step in (3, 4) for first in (0, 2) for training in (True, False)]
    alone = [bind(*way).layer(5, state) for way in ways]
    bound = [bind(*way) for way in ways]
    turns = [[each.layer(5, state) for each in bound] for _ in range(2)]
    for found in turns:
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    trained = [after for after, (*_, training) in zip(alone, ways, strict=True) if training]
    assert not any(torch.equal(one, other) for one, other in pairwise(trained))


def test_weights_do_not_depend_on_the_workers():
    config = tiny(workers=1)
    wanted = {name: p.data for name, p in make_engine(config).block.parameters.items()}
    tied = {"lm_head.weight": "transformer.wte.weight"}
    for mine in run_workers(3, lambda channel: make_engine(tiny(workers=3), channel).block.parameters):
        for name, parameter in mine.items():
            assert torch.equal(parameter.data, wanted[tied.get(name, name)])
    c_proj = wanted["transformer.h.3.mlp.c_proj.weight"]
    assert c_proj.std().item() == pytest.approx(0.02 / (2 * 12) ** 0.5, rel=0.1)


def test_the_step_with_a_bad_weight_is_not_taken_and_the_layer_is_named():
    config = tiny(workers=2)

    def work(channel):
        engine = make_engine(config, channel)
        if 5 in engine.block.layers:
            engine.block.layers[5].mlp.c_fc.weight.data[0, 0] = float("nan")
        before = {name: p.detach().clone() for name, p in engine.block.parameters.items()}
        stats = engine.train_step(0, Controller(config).chosen)
        same = all(torch.equal(p, before[name]) or torch.isnan(before[name]).any() for name, p in engine.block.parameters.items())
        return stats, same

    outcomes = run_workers(2, work)
    assert all(same for _, same in outcomes)
    assert min(stats.fault for stats, _ in outcomes if stats.fault)[2] == "layer 5: its output is not finite"


@pytest.mark.parametrize("solver", ["mgrit", "windows"])
def test_the_gradient_that_is_named_is_the_first_that_the_adjoint_comes_to(solver):
    """Whoever owns its layer: on a cyclic placement the last worker does not have the last layers alone."""

    def work(channel):
        engine = make_engine(tiny(workers=2, solver=solver), channel)
        mine = [layer for layer in (3, 8) if layer in engine.block.layers]
        for layer in mine:
            engine.block.layers[layer].mlp.c_fc.weight.register_hook(lambda gradient: gradient * math.nan)
        return mine, engine.train_step(0, Controller(engine.config).chosen).fault

    outcomes = run_workers(2, work)
    assert sorted(layers for layers, _ in outcomes) == [[3], [8]]
    assert "h.8.mlp.c_fc.weight: its gradient is not finite" in min(fault for _, fault in outcomes if fault)[2]


def timed_over_gloo(rank, size, config):
    """Return the losses of two steps without a timeline and of two with one, and the last step's spans."""
    engine = make_engine(config, TorchChannel(timeout_s=60))
    stats = train_engine(engine, 2)
    engine.timeline = Timeline()
    begin = engine.timeline.clock()
    stats += train_engine(engine, 1, first=2)
    seconds = engine.timeline.clock() - begin
    spans, engine.timeline = engine.timeline.spans, None
    stats += train_engine(engine, 1, first=3)
    return [each.loss for each in stats], TimedStep(0.0, seconds, tuple(spans))


def test_a_timeline_of_the_pipeline_covers_it_and_changes_nothing():
    config = tiny(**PLAIN, workers=2)
    found = run_processes(2, timed_over_gloo, config)
    assert found[0][0] == losses_over_gloo_processes(config, 4)
    for _, step in found:
        assert [span.name for span in step.spans if span.phase].count("forward microbatch") == 4
        assert [span.name for span in step.spans if span.phase].count("adjoint microbatch") == 4
        sums = sum_kinds(step)
        assert sums["compute"] > 0
        assert sums["wait"] > 0
        assert sums["other"] < 0.9 * step.seconds
        pieces = sorted(step.spans)
        assert all(later.begin >= earlier.end - 1e-9 for earlier, later in pairwise(pieces))  # none counts twice


def losses_over_gloo_processes(config, steps):
    return run_processes(config.workers, losses_over_gloo, config, steps)[0][0]


def test_a_timeline_of_one_worker():
    config = tiny(mode="serial")
    engine, plain = make_engine(config), make_engine(config)
    engine.timeline = Timeline()
    assert [stats.loss for stats in train_engine(engine, 2)] == [stats.loss for stats in train_engine(plain, 2)]
    assert [span.name for span in engine.timeline.spans] == 2 * ["forward", "adjoint", "wait", "wait", "update"]


FAULTS = """
import resource, sys, torch
from rayllp.engine.memory import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(2**18) for _ in range(64)]  # 64 MiB
    del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_pages_of_freed_tensors_are_kept():
    faults = {}
    for how in ("kept", "left"):
        command = [sys.executable, "-c", FAULTS, how]
        faults[how] = [
            int(line) for line in subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.split()
        ]
    assert faults["kept"][0] > 10_000
    assert faults["kept"][2] < faults["kept"][0] / 10
    assert faults["kept"][2] <= faults["left"][2]  # mostly a hundredth of it; now and then the end of the heap is in use, and stays


def test_the_last_bit_of_a_loss_does_not_depend_on_who_has_which_layers():
    """That holds with a set number of microbatches, and includes the gradient norm, by which gradients are clipped."""
    size = {"model": {"layers": 12, "width": 96, "heads": 2}, "sequence_length": 64, "batch_size": 16, "microbatches": 8, "mode": "serial"}
    two, four = (run_processes(workers, losses_over_gloo, tiny(workers=workers, **size), 13)[0] for workers in (2, 4))
    assert two == four
