"""Learning rates compared with transformers' schedules, and which parameters weight decay applies to."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from rayllp.config import make_config
from rayllp.config.schedule import learning_rate
from rayllp.errors import SettingsError
from rayllp.models.base import decayed_weights, hidden_matrices
from rayllp.training.messages import describe_other_length
from tests.conftest import make_engine, tiny

STEPS, WARMUP, FLOOR = 50, 8, 0.2


def rates(schedule, **changes):
    settings = make_config({"optimizer": {"schedule": schedule, "warmup": WARMUP, "min_lr_ratio": FLOOR, "lr": 0.5, **changes}}).optimizer
    return [learning_rate(settings, step, STEPS) / settings.lr for step in range(STEPS)]


def transformers_rates(name, **kwargs):
    """Return the rates of a transformers schedule that ends at the last step, from the end of warm-up on, where all agree."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    made = get_scheduler(name, optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS - 1, scheduler_specific_kwargs=kwargs)
    return [made.lr_lambdas[0](step) for step in range(WARMUP, STEPS)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_are_transformers(schedule):
    found = rates(schedule)
    assert found[:WARMUP] == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP)])
    wanted = transformers_rates("constant_with_warmup" if schedule == "constant" else schedule)
    floor = 0 if schedule == "constant" else FLOOR
    assert found[WARMUP:] == pytest.approx([floor + (1 - floor) * rate for rate in wanted])


def test_wsd_is_transformers():
    for decay, steps in ((None, 10), (0.5, 25)):
        found = rates("wsd", decay=decay)
        wanted = transformers_rates("warmup_stable_decay", num_decay_steps=steps, decay_type="linear", min_lr_ratio=FLOOR)
        assert found[WARMUP:] == pytest.approx(wanted)
        assert found[STEPS - 1 - steps] == 1.0 > found[STEPS - steps]
    assert rates("wsd", decay=1.0) == pytest.approx(rates("linear"))  # no room for a stable part
    with pytest.raises(SettingsError, match=r"decay=0\.2 is of schedule wsd, and schedule is cosine: leave one of them out"):
        rates("cosine", decay=0.2)


def test_a_constant_rate_does_not_jump_where_a_run_goes_on_longer():
    constant, cosine = (make_config({"steps": 80, "optimizer": {"schedule": name}}) for name in ("constant", "cosine"))
    assert describe_other_length(constant, 50, 40) == "80 steps instead of 50: the learning rate stays at 0.001"
    assert "at once" in describe_other_length(cosine, 50, 40)


def test_what_weight_decay_is_for():
    layer = nn.ModuleDict(
        {
            "table": nn.Embedding(4, 8), "inner": nn.Linear(8, 8), "kernel": nn.Conv1d(8, 8, 3),
            "plane_norm": nn.LayerNorm([4, 8]), "batch": nn.BatchNorm1d(8), "relative_bias": nn.Embedding(4, 8),
        }
    )  # fmt: skip
    assert set(decayed_weights(layer)) == {"table.weight", "inner.weight", "kernel.weight"}
    assert [p is layer["inner"].weight for p in hidden_matrices(layer)] == [True]  # Muon is not for a norm of two dimensions either


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_leaves_norms_and_biases_alone(name):
    def decayed(weight_decay):
        engine = make_engine(tiny(optimizer={"name": name, "weight_decay": weight_decay, "warmup": 0}))
        for parameter in engine.block.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        engine.optimizer.step(0.1)
        return {key: p.detach() for key, p in engine.block.parameters.items()}

    without, with_decay = decayed(0.0), decayed(0.5)
    for key, before in without.items():
        is_weight = before.ndim == 2  # of GPT-2
        torch.testing.assert_close(with_decay[key], before * (0.95 if is_weight else 1.0), rtol=1e-12, atol=0)
    assert without["transformer.wte.weight"].ndim == 2
