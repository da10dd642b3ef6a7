"""The depth-smoothness penalty compared with autograd, over several workers and between layers that differ."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from rayllp.channel import LocalChannel, run_workers
from tests.test_engine import ENOUGH, SERIAL
from tests.test_families import config_of, make

WEIGHT = 0.3


def gradients(config, accuracy):
    def work(channel):
        engine = make(config, channel)
        before = {name: p.detach().clone() for name, p in engine.block.parameters.items()}
        stats = engine.train_step(2, accuracy)
        return stats.grad_norm, {name: p.detach() - before[name] for name, p in engine.block.parameters.items()}

    outcomes = run_workers(config.layer_workers, work)
    return outcomes[0][0], {name: move for _, moves in outcomes for name, move in moves.items()}


@pytest.mark.parametrize("family", ["gpt2", "mt"])
def test_its_gradient_is_autograds_on_any_number_of_workers(family):
    options = {"optimizer": {"clip": 0, "warmup": 0}, "step": {"middle": 0.3}}
    engine = make(config_of(family, **options), LocalChannel.alone())
    engine.gradients(engine.step_batch(2, SERIAL))
    layers = [dict(engine.block.layers[n].named_parameters()) for n in engine.block.indices]
    penalty = sum(
        (b[name] - a[name]).square().sum() / 0.3 for a, b in pairwise(layers) for name in a
        if name in b and a[name].shape == b[name].shape
    )  # fmt: skip
    (WEIGHT * penalty).backward()
    wanted = torch.stack([p.grad.square().sum() for p in engine.block.parameters.values()]).sum().sqrt().item()
    for workers in (1, 2, 3):
        norm, _ = gradients(config_of(family, workers=workers, **options), replace(ENOUGH, smoothness=WEIGHT))
        assert norm == pytest.approx(wanted, rel=1e-9)


def test_it_draws_neighbouring_layers_together():
    config = config_of("gpt2", optimizer={"clip": 0, "lr": 0.01, "warmup": 0})

    def distance(weight):
        engine = make(config, LocalChannel.alone())
        for step in range(10):
            engine.train_step(step, replace(ENOUGH, smoothness=weight))
        layers = [dict(engine.block.layers[n].named_parameters()) for n in engine.block.indices]
        return sum((b[name] - a[name]).square().sum().item() for a, b in pairwise(layers) for name in a)

    assert distance(WEIGHT) < 0.9 * distance(0.0)
