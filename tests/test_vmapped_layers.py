"""Sweeps over several intervals at once, with one batched call for all their layers: the same numbers as one interval after the other."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from rayllp.channel import LocalChannel, run_workers
from rayllp.control import Accuracy
from rayllp.engine.block import Block, BoundBlock
from rayllp.engine.reduce_gradients import add_shared_gradients
from rayllp.errors import SettingsError
from rayllp.models import LayerStack, build_architecture, check_batched
from tests.conftest import make_engine, merge, tiny, train_engine
from tests.test_families import RandomBatches, config_of, make

ONE = Accuracy(serial=False, levels_forward=2, levels_backward=2, iterations_forward=1, iterations_backward=1)
TWO = replace(ONE, iterations_forward=2, iterations_backward=2)
FCF = replace(TWO, relaxation="FCF")


def settings(*, batched, family="gpt2", middle=16, **changes):
    base = {"model": {"layers": middle + 2}, "buffers": {"open": 1, "close": 1}, "mgrit": {"coarsening": 4, "batched": batched}}
    return config_of(family, **merge(base, changes))


def gradients(config, accuracy):
    def work(channel):
        engine = make(config, channel)
        engine.gradients(engine.step_batch(3, accuracy))
        add_shared_gradients(engine.block, engine.layer_channel, 3)
        return {name: p.grad.clone() for name, p in engine.block.parameters.items()}

    merged = {}
    for mine in run_workers(config.layer_workers, work):
        merged |= mine
    return merged


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("accuracy", "middle"),  # 19 and 23: the last interval is short
    [(ONE, 16), (TWO, 19), (FCF, 19), (replace(TWO, levels_forward=3, levels_backward=3), 23)],
    ids=["1+1", "2+2", "FCF", "levels"],
)
def test_gradients_are_those_of_one_interval_after_another(accuracy, middle):
    for workers in (1, 2, 3):
        assert_equal(*(gradients(settings(batched=b, middle=middle, workers=workers), accuracy) for b in (True, False)))


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "mc"])
def test_of_every_family(family):
    assert_equal(*(gradients(settings(batched=b, family=family), TWO) for b in (True, False)))


def test_with_penalty_and_accumulation():
    penalised = replace(ONE, consistency=2.0)
    for options in ({}, {"accumulate": 2}, {"workers": 2, "mesh": {"blocks": (8, 8)}}):
        assert_equal(*(gradients(settings(batched=b, **options), penalised) for b in (True, False)))


def test_one_call_for_all_intervals(monkeypatch):
    calls = []
    single, together = BoundBlock.layer, BoundBlock.layers_together
    monkeypatch.setattr(BoundBlock, "layer", lambda block, n, state: calls.append((n,)) or single(block, n, state))
    monkeypatch.setattr(BoundBlock, "layers_together", lambda block, ns, state, w: calls.append(tuple(ns)) or together(block, ns, state, w))
    gradients(settings(batched=True), ONE)
    # Buffers 0 and 17; C-points 1, 5, 9, 13, whose steps the coarse solve takes and the sweep need not take again (the last one's it does).
    assert calls == [(0,), (1,), (5,), (9,), (13,), (2, 6, 10, 14), (3, 7, 11, 15), (4, 8, 12, 16), (17,)]


def test_probes_training_and_weights_go_on_as_ever():
    """Optimizer steps, probes with their bias and the return to serial steps work, though parameters are views of stacked tensors."""
    adaptive = {"probe_every": 3, "rule": "bias", "switch_at": 8, "lipschitz_every": 2}
    changes = {"mode": "adaptive", "solver": "mgrit", "adaptive": adaptive}
    one, other = (list(train_engine(make_engine(settings(batched=b, **changes)), 10)) for b in (True, False))
    assert [s.loss for s in one] == pytest.approx([s.loss for s in other], rel=1e-9)
    assert [s.comparison.bias for s in one if s.comparison] == pytest.approx([s.comparison.bias for s in other if s.comparison], rel=1e-6)
    assert len([s for s in one if s.comparison]) > 1
    found, wanted = ([s.lipschitz for s in stats if s.lipschitz] for stats in (one, other))
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)


def test_a_parameter_that_was_given_another_tensor_is_stacked_anew():
    engine = make(settings(batched=True), LocalChannel.alone())
    stack = engine.block.stacks.containing([2, 6])
    assert engine.block.stacks.containing([2, 6]) is stack
    parameter = next(engine.block.layers[2].parameters())
    parameter.data = parameter.data + 1
    again = engine.block.stacks.containing([2, 6])
    assert again is not stack
    name = next(iter(again.parameters))
    assert torch.equal(again.parameters[name][0], parameter)
    # Sets that overlap become one, which serves both.
    union = engine.block.stacks.containing([6, 10])
    assert union.layers == (2, 6, 10)
    assert engine.block.stacks.containing([2, 6]) is union
    assert torch.equal(union.weights([6, 10])[name], union.parameters[name][1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recompute": True}, "choose one"),
        ({"model": {"dropout": 0.1}}, "set model.dropout=0 or mgrit.batched=false"),
    ],
)
def test_what_cannot_be_batched_is_refused(changes, message):
    with pytest.raises((SettingsError, ValueError), match=message):
        make(settings(batched=True, **changes), LocalChannel.alone())


def test_of_an_encoder_and_a_decoder_on_workers_of_their_own():
    """The decoder's layers share the encoder's final norm, whose gradient comes from all of them."""
    options = {"family": "mt", "model": {"layers": 18, "encoder_layers": 9}, "workers": 2}
    one, other = (gradients(settings(batched=b, **options), TWO) for b in (True, False))
    assert any("encoder.layer_norm" in name for name in one)
    assert_equal(one, other)


def test_an_encoder_and_a_decoder_are_refused():
    with pytest.raises(SettingsError, match="differ in more than their weights"):
        gradients(settings(batched=True, family="mt"), TWO)


def test_they_are_refused_before_a_worker_starts():
    options = {"family": "mt", "model": {"layers": 18, "encoder_layers": 9}}
    for workers, mode, refused in ((1, "parallel", True), (1, "serial", False), (2, "parallel", False)):
        config = settings(batched=True, workers=workers, mode=mode, **options)
        architecture = build_architecture(config, RandomBatches("mt", "auto").facts)
        with pytest.raises(SettingsError, match="one is the encoder's, one the decoder's") if refused else nullcontext():
            check_batched(config, architecture)


def test_layers_that_differ_are_refused():
    class Power(nn.Module):
        def __init__(self, exponent):
            super().__init__()
            self.exponent, self.linear = exponent, nn.Linear(4, 4)

        def forward(self, x):
            return x + self.linear(x) ** self.exponent

    stack = LayerStack(
        embed=nn.Linear(4, 4), layers=[Power(1 + (n == 6)) for n in range(12)], head=nn.Linear(4, 1), loss=lambda o, t: o.sum()
    )
    block = Block(stack, tiny(buffers={"open": 0, "close": 0}, mgrit={"batched": True}), 0, torch.device("cpu"))
    block.stacks.containing([1, 5])
    with pytest.raises(SettingsError, match="layers 2 and 6 differ in more than their weights"):
        block.stacks.containing([2, 6])


@pytest.mark.study
@pytest.mark.parametrize("batched", [False, True])
def test_compiled_layers_train_as_others(batched):
    losses = [
        [stats.loss for stats in train_engine(make_engine(settings(batched=batched, compile=compiled, mode="parallel")), 6)]
        for compiled in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
