"""Reading and writing TorchBraid's files: the same modules with the same weights are the same network."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from rayllp.channel import LocalChannel, MessageTag
from rayllp.checkpoint.torchbraid import TorchBraidWeights
from rayllp.data import Batches
from rayllp.engine import Engine
from rayllp.errors import CheckpointError
from tests.conftest import run_mpi_processes, tiny

WIDTH, LAYERS, DT = 6, 8, 0.125


class Open(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(3, WIDTH)

    def forward(self, x):
        return self.lift(x)


class StepLayer(nn.Module):
    """x -> F(x)."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.mix(self.norm(x)))


class TwoHalves(StepLayer):
    """x, dt -> the whole step. Its second half begins where the first one ended, so it is not linear in dt."""

    def forward(self, x, dt: float = 1.0):
        x = x + dt * torch.tanh(self.mix(x))
        return x + dt * self.norm(x)


class Close(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.drop(x)


def network(step):
    torch.manual_seed(1)
    return Open(), [step() for _ in range(LAYERS)], Close()


def theirs(parts, x):
    opening, steps, closing = parts
    x = opening(x)
    for step in steps:
        x = step(x, DT) if isinstance(step, TwoHalves) else x + DT * step(x)
    return closing(x)


def rank_states(parts, counts=(5, 3)):
    """Return the state_dicts of a ParallelNet on two ranks, with TorchBraid's names."""
    opening, steps, closing = parts
    ends = {f"open_nn.{n}": v for n, v in opening.state_dict().items()} | {f"close_nn.{n}": v for n, v in closing.state_dict().items()}
    states, start = [], 0
    for rank, count in enumerate(counts):
        own = steps[start : start + count]
        layers = {f"parallel_nn.local_layers.{i}.layer.{n}": v for i, step in enumerate(own) for n, v in step.state_dict().items()}
        states.append((ends if rank == 0 else {}) | layers)
        start += count
    return states


class Points(Batches):
    def batch(self, split, step, size):
        generator = torch.Generator().manual_seed(step)
        return torch.randn(size, 3, generator=generator), torch.zeros(size, 2)


def settings(**changes):
    base = {"model": {"layers": LAYERS}, "buffers": {"open": 0, "close": 0}, "step": {"middle": DT}, "steps": 3, "dtype": "float32"}
    return tiny(**{**base, **changes})


def stack(weights, step):
    loss = nn.MSELoss(reduction="sum")
    return weights.stack(embed=Open(), step=step, head=Close(), loss=loss, dt=DT)


@pytest.mark.parametrize("step", [StepLayer, TwoHalves])
def test_the_files_of_all_ranks_make_the_same_network(step, tmp_path):
    parts, paths = network(step), []
    for rank, state in enumerate(rank_states(parts)):
        paths.append(tmp_path / f"model_rank{rank}_cp1.pt")
        torch.save({"model_state": state, "epoch": 3}, paths[-1])
    weights = TorchBraidWeights.read(paths)
    assert len(weights.layers) == LAYERS
    engine = Engine(stack(weights, step), settings(), Points(), LocalChannel.alone(), LocalChannel.alone(), torch.device("cpu"))
    inputs = Points().batch("train", 0, 4)[0]
    assert torch.allclose(engine.exact_forward(inputs, MessageTag(0, "test")), theirs(parts, inputs), atol=1e-6)


def test_there_and_back(tmp_path):
    parts = network(StepLayer)
    ranks = rank_states(parts)
    weights = TorchBraidWeights.of(ranks)
    for found, wanted in zip(weights.states(workers=2), ranks, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (path,) = weights.write(tmp_path / "serial.pt")
    again = TorchBraidWeights.read(path)
    assert "serial_nn.7.layer.layer.mix.weight" in torch.load(path, weights_only=True)
    assert again.ends.keys() == weights.ends.keys()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(again.layers, weights.layers, strict=True) for name in b)
    assert [each.name for each in weights.write(tmp_path / "net.pt", workers=4)] == [f"net_rank{n}.pt" for n in range(4)]


def test_what_is_no_network_of_torchbraids_is_refused(tmp_path):
    pickled = tmp_path / "serialnet"
    torch.save(Open(), pickled)
    with pytest.raises(CheckpointError, match=r"cannot be read as tensors alone .* save its state_dict\(\)"):
        TorchBraidWeights.read(pickled)
    with pytest.raises(CheckpointError, match="no name begins with parallel_nn"):
        TorchBraidWeights.of([Open().state_dict()])
    ranks = rank_states(network(StepLayer))
    with pytest.raises(CheckpointError, match="Sequential is not the module that these weights are of"):
        TorchBraidWeights.of(ranks).stack(embed=nn.Sequential(Open()), step=StepLayer, head=Close(), loss=nn.MSELoss())
    with pytest.raises(CheckpointError, match="8 do not divide by 3"):
        TorchBraidWeights.of(ranks).states(workers=3)


def _their_names(world):
    from torchbraid import LayerParallel

    net = nn.Module()
    net.parallel_nn = LayerParallel(world.comm, StepLayer, LAYERS, 1.0, max_fwd_levels=1, max_bwd_levels=1, max_iters=1)
    if world.comm.Get_rank() == 0:
        net.open_nn, net.close_nn = Open(), Close()
    serial = net.parallel_nn.buildSequentialOnRoot()
    return list(net.state_dict()), None if serial is None else list(serial.state_dict())


@pytest.mark.skipif(find_spec("torchbraid") is None, reason="TorchBraid is not installed: see docs/torchbraid.md")
def test_the_names_are_those_of_torchbraid():
    found = run_mpi_processes(2, _their_names)
    weights = TorchBraidWeights.of(rank_states(network(StepLayer)))
    assert [set(names) for names, _ in found] == [set(state) for state in weights.states(workers=2)]
    assert {f"serial_nn.{name}" for name in found[0][1]} == set(weights.states()[0]) - set(weights.ends)
