"""Training over channels that keep NCCL's rules: nothing hangs, and nothing differs."""

import pytest
import torch

from rayllp.channel import LocalChannel, MessageTag, StateSpec, run_workers
from rayllp.checkpoint.memory import HeldStates
from rayllp.engine.generation import continue_text
from rayllp.errors import ChannelError
from tests.conftest import IN_TURN, make_engine, tiny, train_engine
from tests.strict_channel import run_strictly
from tests.test_families import CASES, ENOUGH, SERIAL, config_of, make

TAG = MessageTag(3, "forward", "relaxation", 1)
STATE = torch.zeros(2)


def test_two_sends_before_two_receives_are_found_to_hang():
    def work(channel):
        other = 1 - channel.rank
        channel.send(STATE, other, TAG)
        channel.receive(StateSpec.of(STATE), other, TAG)

    with pytest.raises(ChannelError, match=r"nobody can go on: worker 0: send to worker 1 \(step 3.*worker 1: send to worker 0"):
        run_strictly(2, work)


def test_a_message_that_nobody_takes():
    with pytest.raises(ChannelError, match="nobody can go on: worker 0: send to worker 1"):
        run_strictly(2, lambda channel: channel.send(STATE, 1, TAG) if channel.rank == 0 else None)


@pytest.mark.parametrize("pairs", [True, False])
def test_what_is_issued_together_proceeds_together(pairs):
    def work(channel):
        left, right = (channel.rank - 1) % channel.size, (channel.rank + 1) % channel.size
        mine = torch.full((2,), float(channel.rank))
        found = channel.exchange([(mine, left), (mine, right)], [(StateSpec.of(mine), left), (StateSpec.of(mine), right)], TAG)
        return [float(state[0]) for state in found]

    assert run_strictly(3, work, pairs=pairs) == [[2, 1], [0, 2], [1, 0]]


WAYS = {
    "serial": {"mode": "serial", "microbatches": 1},
    "pipeline": {"mode": "serial", "microbatches": 4},
    "parallel": {},
    "windows": {"solver": "windows", "windows": {"length": 4, "sweeps": {"forward": 2, "backward": 2}}},
    "in turn": IN_TURN,
    "in turn, to the first worker": {**IN_TURN, "model": {"layers": 11}},
    "adaptive": {"mode": "adaptive", "adaptive": {"rule": "bias", "probe_every": 2}},
    "a rolling window": {"mode": "adaptive", "solver": "windows", "adaptive": {"rule": "bias", "probe_every": 2}},
    "smooth": {"adaptive": {"smoothness": 1e-3}},
}


def losses(channel, config):
    return [stats.loss for stats in train_engine(make_engine(config, channel), 3)]


@pytest.mark.parametrize("workers", [2, 3, pytest.param(4, marks=pytest.mark.study)])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_as_over_channels_without_these_rules(way, workers):
    config = tiny(workers=workers, **WAYS[way])
    expected = run_workers(workers, lambda channel: losses(channel, config))
    found = run_strictly(workers, lambda channel: losses(channel, config))
    assert [each == pytest.approx(other, rel=1e-12) for each, other in zip(found, expected, strict=True)] == [True] * workers


@pytest.mark.parametrize("way", ["windows", "a rolling window"])
def test_sweeps_whose_arithmetic_is_shared_out(way, monkeypatch):
    config = tiny(workers=3, **WAYS[way])
    expected = run_workers(3, lambda channel: losses(channel, config))
    monkeypatch.setattr("rayllp.mgrit.shares.IN_PIECES_BYTES", 0)
    assert run_strictly(3, lambda channel: losses(channel, config)) == expected


@pytest.mark.parametrize("accuracy", [ENOUGH, SERIAL], ids=["parallel", "serial"])
@pytest.mark.parametrize(("family", "head"), CASES)
def test_every_family(family, head, accuracy):
    """Covers tied embeddings, states of two tensors, masks, and parameters that several layers use."""
    config = config_of(family, head, workers=3)

    def work(channel):
        engine = make(config, channel)
        return [engine.train_step(step, accuracy).loss for step in range(2)]

    assert run_strictly(3, work) == run_workers(3, work)


@pytest.mark.parametrize("solver", ["mgrit", "windows"])
def test_generation(solver):
    """The last worker broadcasts each request to the others, which then send states to each other."""
    config = config_of("gpt2", workers=3, solver=solver)

    def work(channel):
        return continue_text(make(config, channel).exact_forward, [1, 2, 3], 4)

    assert run_strictly(3, work) == run_workers(3, work)


def test_copies_of_states():
    """Each worker sends its state to the next one, round the ring, and all at once."""
    config = tiny(workers=3)

    def work(channel):
        states = HeldStates(make_engine(config, LocalChannel.alone()), lambda limit: channel)
        states.keep(0)
        states.wait()
        return states.inventory().neighbours

    assert run_strictly(3, work) == [(0,)] * 3
