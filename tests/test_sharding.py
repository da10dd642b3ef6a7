"""Optimizer state sharded over replicas: the same bits as without, in training, checkpoints and states in memory."""

import pytest
import torch

from rayllp.channel import LocalChannel, run_workers
from rayllp.checkpoint import load_pieces
from rayllp.checkpoint.memory import HeldStates
from rayllp.checkpoint.states import BlockState
from rayllp.checkpoint.store import PieceWriter
from rayllp.engine import sharding
from rayllp.engine.sharding import share_out
from rayllp.errors import ClusterError
from tests.conftest import make_engine, merge, tiny, train_engine
from tests.strict_channel import World

ADAMW, MUON = {"name": "adamw", "warmup": 2}, {"name": "muon", "warmup": 2, "lr": 1e-2}
SGD, ADAFACTOR = {"name": "sgd", "warmup": 2, "ema": 0.9}, {"name": "adafactor", "warmup": 2, "lr": 1e-2, "ema": 0.9}


def mesh(data, layer, optimizer=None, **changes):
    small = {"model": {"layers": 6}, "buffers": {"open": 1, "close": 1}, "batch_size": 12, "workers": None}
    small["mgrit"] = {} if changes.get("solver") == "windows" else {"coarsening": 2}
    return tiny(**merge(small | {"mesh": {"data": data, "layer": layer}, "optimizer": optimizer or ADAMW}, changes))


def over_mesh(config, work, *, strict=False):
    """Return `work(engine)` of every worker, replica by replica; `strict`: over channels that keep NCCL's rules."""
    D, P = config.mesh.data, config.layer_workers
    ranks = [[replica * P + block for block in range(P)] for replica in range(D)]
    world = World(D * P)
    make = world.group if strict else lambda members: LocalChannel.group(len(members))
    layers, replicas = [make(members) for members in ranks], [make(members) for members in zip(*ranks, strict=True)]

    def one(channel):
        replica, block = divmod(channel.rank, P)
        mine, failure = (layers[replica][block], replicas[block][replica]), None
        try:
            return work(make_engine(config, *mine))
        except BaseException as error:
            failure = error
            raise
        finally:
            world.end(channel.rank, failure)
            for end in mine if failure else ():
                end.close()

    return run_workers(D * P, one)


def trained(engine, steps=2):
    norms = [stats.grad_norm for stats in train_engine(engine, steps)]
    return norms, {name: p.detach().clone() for name, p in engine.block.parameters.items()}


def kept_numbers(engine):
    return sum(
        value.numel() for p in engine.block.parameters.values() for name, value in engine.optimizer.state_of(p).items() if name != "step"
    )


CASES = {
    "adamw": (2, 2, ADAMW, {}),
    "muon": (3, 1, MUON, {}),
    "stacked layers": (2, 2, ADAMW, {"mgrit": {"batched": True}}),
    "windows": (2, 2, MUON, {"solver": "windows"}),
    "sgd": (2, 1, SGD, {}),
    "adafactor, stacked": (2, 2, ADAFACTOR, {"mgrit": {"batched": True}}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_to_the_last_bit(case, monkeypatch):
    monkeypatch.setattr(sharding, "CALL_NUMBERS", 1000)
    data, layer, optimizer, changes = CASES[case]

    def work(engine):
        return *trained(engine), kept_numbers(engine), engine.evaluate(1)

    whole = over_mesh(mesh(data, layer, optimizer, **changes), work)
    found = over_mesh(mesh(data, layer, {**optimizer, "sharded": True}, **changes), work)
    for (norms, weights, numbers, figures), (other_norms, other_weights, other_numbers, other_figures) in zip(found, whole, strict=True):
        assert figures == other_figures
        assert norms == other_norms
        assert norms[0] > 1  # so that gradients were clipped
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
        assert numbers < 1.05 * other_numbers / data


def test_shares_are_even_and_whole():
    sizes = {"table": (1000, 8), "matrix": (40, 40), "other": (40, 40), "third": (30, 40), "bias": (40,)}
    parameters = {name: torch.nn.Parameter(torch.empty(shape)) for name, shape in sizes.items()}
    matrices = ["matrix", "other", "third"]
    for replicas in (1, 2, 3, 4):
        shares = share_out(parameters, matrices, replicas)
        for name, parameter in parameters.items():
            parts = sorted((share[name] for share in shares if len(share.get(name, ()))), key=lambda part: part.start)
            assert [number for part in parts for number in part] == list(range(parameter.numel()))
            assert len(parts) == 1 or name not in matrices
            assert all(part.start % sharding.ALIGNED == 0 for part in parts)
        states = [sum(len(part) * (1 if name in matrices else 2) for name, part in share.items()) for share in shares]
        assert max(states) - min(states) <= 4 * sharding.ALIGNED


SAVED = {
    "new": (0, ADAMW, {}),
    "muon": (2, MUON, {}),
    "frozen": (2, ADAMW, {"model": {"train": ["*.mlp.*"]}}),
    "adafactor": (2, ADAFACTOR, {}),
}


@pytest.mark.parametrize(("steps", "optimizer", "changes"), SAVED.values(), ids=SAVED)
def test_a_checkpoint_is_the_same_whatever_shares_there_are(steps, optimizer, changes, tmp_path):
    """Checkpoints are written by three replicas that shard, and by two that do not; each is then loaded by another number of replicas."""

    def write(folder):
        folder.mkdir()

        def work(engine):
            train_engine(engine, steps)
            writer = PieceWriter()
            writer.begin(engine, folder)
            return sorted(writer.finish())

        return work

    def go_on(folder):
        def work(engine):
            with torch.no_grad():
                for parameter in engine.block.parameters.values():
                    parameter.fill_(torch.nan)
            load_pieces(engine, folder)
            return [stats.grad_norm for stats in train_engine(engine, 2, first=steps)]

        return work

    sharded = {**optimizer, "sharded": True}
    files = over_mesh(mesh(3, 2, sharded, **changes), write(tmp_path / "sharded"))
    assert len({file for written in files for file in written}) == sum(map(len, files)) == 8
    assert sum(map(bool, files)) == 6  # all write
    over_mesh(mesh(3, 2, optimizer, **changes), write(tmp_path / "whole"))
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "sharded" / file.name).read_bytes()
    wanted = over_mesh(mesh(1, 2, optimizer, **changes), go_on(tmp_path / "sharded"))[0]
    for found in over_mesh(mesh(2, 1, sharded, **changes), go_on(tmp_path / "sharded")):
        assert found == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(("after", "optimizer"), [((3, 1), ADAMW), ((1, 2), MUON), ((3, 1), ADAFACTOR), ((3, 1), SGD)])
def test_states_in_memory_serve_other_numbers_of_replicas(after, optimizer):
    def save(engine):
        train_engine(engine, 2)
        state = BlockState(engine)
        flat = state.new_buffer()
        state.copy_into(flat)
        return (state.layout, flat), [stats.grad_norm for stats in train_engine(engine, 2, first=2)]

    found = over_mesh(mesh(2, 2, {**optimizer, "sharded": True}), save)
    states = [state for state, _ in found]

    def go_on(engine):
        with torch.no_grad():
            for parameter in engine.block.parameters.values():
                parameter.fill_(torch.nan)
        BlockState(engine).restore_from(states)
        return [stats.grad_norm for stats in train_engine(engine, 2, first=2)]

    for norms in over_mesh(mesh(*after, {**optimizer, "sharded": True}), go_on):
        assert norms == pytest.approx(found[0][1], rel=1e-10)


def test_a_lost_replica_comes_back_from_the_others_weights_and_the_copy_of_its_share():
    config = mesh(3, 1, {**ADAMW, "sharded": True})
    world = LocalChannel.group(3)

    def work(engine):
        rank = engine.replicas.rank
        states = HeldStates(engine, lambda limit: world[rank])
        train_engine(engine, 2)
        states.keep(2)
        states.wait()
        states.close()
        assert torch.equal(states.give(2, neighbour=False, weights=False), states.give(2, neighbour=False)[states.state.copied])
        return states.state.layout, states.give(2, neighbour=False), states.give(2, neighbour=True)

    held = over_mesh(config, work)
    layouts = [layout for layout, _, _ in held]
    # The second replica is lost; the third has the copy of its share, and everybody has the weights.
    copy = layouts[1].without_weights, held[2][2]
    assert len(copy[1]) < 0.7 * layouts[1].weights
    channels = LocalChannel.group(3)
    twin = make_engine(config, None, channels[1])
    BlockState(twin).restore_from([(layouts[0], held[0][1]), copy])
    flat = BlockState(twin).new_buffer()
    BlockState(twin).copy_into(flat)
    assert torch.equal(flat, held[1][1])
    with pytest.raises(ClusterError, match="optimizer's state of"):
        BlockState(twin).restore_from([(layouts[0], held[0][1])])
