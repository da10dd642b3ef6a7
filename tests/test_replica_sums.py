"""Gradients are summed over replicas while others are still being formed: the bits are the same, nothing hangs, nothing is lost."""

import pytest
import torch

from rayllp.channel import run_workers
from rayllp.engine import replica_sums
from rayllp.engine.replica_sums import ReplicaSums
from tests.conftest import IN_TURN, train_engine
from tests.test_sharding import MUON, mesh, over_mesh

WAYS = {
    "layer-parallel": {},
    "three levels, recomputed": {
        "model": {"layers": 8},
        "mgrit": {"levels": {"forward": 3, "backward": 3}},
        "recompute": True,
        "accumulate": 2,
    },
    "penalty": {"adaptive": {"consistency": 1.0}},
    "smoothness": {"adaptive": {"smoothness": 1e-3}},
    "stacked layers": {"mgrit": {"batched": True}},
    "windows": {"solver": "windows"},
    "in turn": IN_TURN,
    "exact": {"mode": "serial", "optimizer": MUON},
    "sharded": {"optimizer": {"sharded": True}},
    "frozen": {"model": {"train": ["transformer.ln_f.*"]}, "optimizer": {"sharded": True}},  # the first worker trains nothing
    "probes": {"mode": "adaptive", "adaptive": {"probe_every": 2, "rule": "bias", "switch_at": 3}},
}


def trained(engine):
    norms = [stats.grad_norm for stats in train_engine(engine, 4)]
    return norms, {name: p.detach().clone() for name, p in engine.block.parameters.items()}


@pytest.fixture
def small_buckets(monkeypatch):
    monkeypatch.setattr(replica_sums, "BUCKET_BYTES", 8 * 2000)


@pytest.mark.parametrize("way", WAYS)
def test_overlap_changes_no_bit(way, small_buckets, monkeypatch):
    config = mesh(2, 2, **WAYS[way])
    found = over_mesh(config, trained)
    monkeypatch.setattr(ReplicaSums, "_contributed", lambda self, parameter: None)
    for (norms, weights), (other_norms, other_weights) in zip(found, over_mesh(config, trained), strict=True):
        assert norms == other_norms
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize("way", ["layer-parallel", "windows", "in turn", "exact"])
def test_buckets_leave_while_the_adjoint_runs(way, small_buckets):
    config = mesh(2, 1 if way == "exact" else 2, **WAYS[way])

    def work(engine):
        sums = engine._sums
        early, finish = [], sums.finish

        def noting(loss):
            early.append((sums._next, len(sums._plan.buckets)))
            finish(loss)

        sums.finish = noting
        train_engine(engine, 3)
        return early

    for early in over_mesh(config, work):
        assert early[0][0] == 0  # the first step shows when gradients are final
        assert all(begun >= buckets - 2 > 1 for begun, buckets in early[1:])


@pytest.mark.parametrize("way", ["layer-parallel", "windows", "sharded"])
def test_replicas_over_a_strict_channel(way, small_buckets):
    config = mesh(2, 2, **WAYS[way])
    for (norms, weights), (other_norms, other_weights) in zip(
        over_mesh(config, trained, strict=True), over_mesh(config, trained), strict=True
    ):
        assert norms == other_norms
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


class Block:
    """A block of two parameters and nothing else."""

    def __init__(self):
        self.trained = {name: torch.nn.Parameter(torch.ones(3000)) for name in ("first", "second")}


def test_what_comes_to_a_gradient_after_it_has_left_is_summed_too(small_buckets):
    """A network may compute differently on other data: one replica's second parameter gets more gradients than in the first steps."""

    def work(channel):
        block, found = Block(), []
        first, second = block.trained.values()
        sums = ReplicaSums(block, channel)
        for step in range(4):
            sums.begin(step, "alike")
            (second * (channel.rank + 1)).sum().backward()
            if step == 2 and channel.rank == 1:
                (second * 10).sum().backward()
            (first * 100).sum().backward()
            loss = torch.full((), float(channel.rank))
            early = sums._next
            sums.finish(loss)
            found.append((early, first.grad[0].item(), second.grad[-1].item(), loss.item()))
            first.grad = second.grad = None
        return found

    for found in run_workers(2, work):
        # Once that has happened, nothing is taken for final before the end.
        assert found == [(0, 200, 3, 1), (1, 200, 3, 1), (1, 200, 13, 1), (0, 200, 3, 1)]
