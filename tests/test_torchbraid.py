"""TorchBraid and ours side by side: same weights, same input; where it is installed."""

from importlib.util import find_spec

import pytest
import torch

from rayllp.config import make_config
from rayllp.control import Controller
from rayllp.errors import SettingsError
from tests.conftest import make_engine, merge, run_mpi_processes, tiny

installed = pytest.mark.skipif(find_spec("torchbraid") is None, reason="TorchBraid is not installed: see docs/torchbraid.md")
BASE = {
    "model": {"layers": 32}, "buffers": {"open": 0, "close": 0}, "dtype": "float32", "channel": "mpi", "step": {"middle": 1.0},
}  # fmt: skip


def solved(channel, config):
    """Loss, gradients, and the states that the adjoint solve went by: the inputs of this worker's layers."""
    engine = make_engine(config, channel)
    inputs, targets, samples, terms = engine.my_batch("train", 3)
    engine.block.watched = {}
    loss, _, _ = engine.gradients(3, Controller(config).accuracy, inputs, targets, samples, 1 / terms)
    states = {n: state.clone() for n, state in engine.block.watched.items()}
    gradients = {name: p.grad.clone() for name, p in engine.block.parameters.items() if p.grad is not None}
    return float(loss), states, gradients


def both(world, config, other):
    """Of one worker: both losses, and how far states and gradients are apart."""
    channel = world.channel(0, 60.0)
    (loss, states, gradients), (its, others, theirs) = solved(channel, config), solved(channel, other)
    return loss, its, apart(states, others), apart(gradients, theirs)


def apart(one, other):
    """The largest relative difference of tensors of two solutions."""
    assert one.keys() <= other.keys()
    return max((float((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-12)) for name in one), default=0.0)
