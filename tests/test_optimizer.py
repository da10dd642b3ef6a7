"""Muon for the layers' matrices and AdamW for the rest: compared with torch's, on any number of workers, and in checkpoints."""

import pytest
import torch

import rayllp
from rayllp.channel import run_workers
from rayllp.checkpoint import load_pieces
from rayllp.checkpoint.store import PieceWriter
from rayllp.config import OptimizerSettings
from rayllp.engine import muon
from rayllp.engine.optimizer import averages_per_weight
from rayllp.errors import CheckpointError, SettingsError
from rayllp.models.base import hidden_matrices
from rayllp.plan import Device, make_plan
from rayllp.report import RunDirectory
from rayllp.training.prepare import prepare, validate
from tests.conftest import losses_over_threads, make_engine, tiny, train_engine
from tests.test_planner import layers

MUON = {"optimizer": {"name": "muon", "lr": 1e-2, "warmup": 2}}
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}


def moved(make, shapes, steps=3):
    """Return matrices after some steps, each with its own made-up gradient."""
    numbers = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=numbers)) for shape in shapes]
    optimizer = make(matrices)
    for step in range(steps):
        for n, matrix in enumerate(matrices):
            # The last one has no gradient at first.
            matrix.grad = torch.randn(matrix.shape, generator=numbers) if step or n + 1 < len(matrices) else None
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


SHAPES = [(8, 24), (8, 8), (24, 8), (8, 32), (32, 8), (8, 8), (8, 24), (1, 8), (24, 8)]


def torchs(matrices):
    return torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **SETTINGS)


def apart(found, wanted):
    """Return the largest difference between a matrix and torch's, relative to how far torch's has moved."""
    start = moved(torchs, SHAPES, steps=0)
    return max(float((mine - theirs).norm() / (theirs - before).norm()) for mine, theirs, before in zip(found, wanted, start, strict=True))


@pytest.mark.parametrize("limit", [muon.CALL_BYTES, 1000, 1])
def test_muon_is_torchs(monkeypatch, limit):
    """However many matrices a call takes. In bfloat16 to the last bit, where a product does not depend on how many are formed at once."""
    monkeypatch.setattr(muon, "CALL_BYTES", limit)
    wanted = moved(torchs, SHAPES)
    assert apart(moved(lambda matrices: muon.Muon(matrices, precision=torch.bfloat16, **SETTINGS), SHAPES), wanted) < 0.005
    assert 0 < apart(moved(lambda matrices: muon.Muon(matrices, precision=torch.float32, **SETTINGS), SHAPES), wanted) < 0.03


def test_updates_are_orthogonal_matrices():
    numbers = torch.Generator().manual_seed(1)
    wide = torch.randn(3, 16, 48, generator=numbers, dtype=torch.float64)
    group = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5, "eps": 1e-7}
    for made, matrix in zip(muon.orthogonalise(wide, group), wide, strict=True):
        left, values, right = torch.linalg.svd(made, full_matrices=False)
        assert 0.6 < float(values.min()) < float(values.max()) < 1.3
        was_left, _, was_right = torch.linalg.svd(matrix, full_matrices=False)
        assert float((left @ right - was_left @ was_right).norm()) < 1e-8


def test_which_parameters_are_muons():
    block = make_engine(tiny(**MUON)).block
    names = {name for name, p in block.parameters.items() if any(p is matrix for matrix in block.matrices)}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"transformer.h.{n}.{part}.weight" for n in range(12) for part in parts}


def test_tables_within_a_layer_are_adamws():
    layer = torch.nn.ModuleDict({"positions": torch.nn.Embedding(4, 8), "inner": torch.nn.Linear(8, 8), "read": torch.nn.Conv1d(8, 8, 3)})
    assert [tuple(p.shape) for p in hidden_matrices(layer)] == [(8, 8)]
    assert hidden_matrices(layer)[0] is layer["inner"].weight


def test_muon_learns_and_its_rate_is_in_the_ratio_of_the_peaks():
    faster = {"optimizer": {**MUON["optimizer"], "muon_lr": 3e-2}}
    engines = [make_engine(tiny(**changes)) for changes in (MUON, faster)]
    before = {name: p.detach().clone() for name, p in engines[0].block.parameters.items()}
    for engine in engines:
        train_engine(engine, 1)
    plain, fast = ({name: p.detach() - before[name] for name, p in engine.block.parameters.items()} for engine in engines)
    for name, change in plain.items():
        ratio = 3.0 if name.endswith("weight") and ".c_" in name else 1.0
        torch.testing.assert_close(fast[name], ratio * change, rtol=1e-9, atol=1e-12)
    losses = [stats.loss for stats in train_engine(engines[0], 12, first=1)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    "changes",
    [{"mode": "serial"}, {"mgrit": {"coarsening": 2}}, {"solver": "windows", "windows": {"length": 4}}],
    ids=["serial", "MGRIT", "windows"],
)
def test_losses_do_not_depend_on_the_number_of_workers(changes):
    wanted = losses_over_threads(tiny(**MUON, **changes), 6)
    assert losses_over_threads(tiny(**MUON, **changes, workers=3), 6) == pytest.approx(wanted, rel=1e-9)


def saved(engine, folder):
    folder.mkdir()
    writer = PieceWriter()
    writer.begin(engine, folder)
    writer.finish()
    return folder


def test_a_checkpoint_goes_on_to_the_last_bit_and_with_other_workers(tmp_path):
    engine = make_engine(tiny(**MUON))
    train_engine(engine, 3)
    folder = saved(engine, tmp_path / "step_3")
    wanted = [stats.grad_norm for stats in train_engine(engine, 3, first=3)]

    def go_on(channel):
        again = make_engine(tiny(**MUON, workers=channel.size), channel)
        with torch.no_grad():  # all must be overwritten
            for parameter in again.block.parameters.values():
                parameter.fill_(torch.nan)
        load_pieces(again, folder)
        return [stats.grad_norm for stats in train_engine(again, 3, first=3)]

    assert run_workers(1, go_on)[0] == wanted
    assert run_workers(2, go_on)[0] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_checkpoint_of_another_optimizer(tmp_path, before, after):
    engine = make_engine(tiny(optimizer={"name": before}))
    train_engine(engine, 1)
    folder = saved(engine, tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=f"optimizer.name={after} goes on from .*: put optimizer.name back"):
        load_pieces(make_engine(tiny(optimizer={"name": after})), folder)
    run = RunDirectory.create(tmp_path / "run", tiny(optimizer={"name": before}))
    with pytest.raises(SettingsError, match=f"run was trained by {before}, and {after} cannot go on from its state: leave optimizer.name"):
        prepare(tiny(optimizer={"name": after}), resume=run.path)


def test_a_network_without_matrices():
    def stack(layer):
        end = torch.nn.Identity
        return rayllp.LayerStack(embed=end, layers=[layer] * 12, head=end, loss=lambda outputs, targets: (outputs - targets).sum())

    with pytest.raises(SettingsError, match="no layer of this network has one"):
        validate(tiny(**MUON), stack(lambda: torch.nn.Conv2d(4, 4, 3, padding=1)), object())
    assert validate(tiny(**MUON), stack(lambda: torch.nn.Linear(4, 4, bias=False)), object()).data_set is None


def test_the_planner_counts_one_moment():
    model = layers(parameter_bytes=1e6)
    plans = [make_plan(tiny(batch_size=16, optimizer={"name": name}), model, Device(), 2) for name in ("adamw", "muon")]
    adamw, with_muon = (plan.best.memory for plan in plans)
    assert adamw == pytest.approx(with_muon * 4 / 3)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 2), ({"ema": 0.9}, 3), ({"name": "muon"}, 1), ({"name": "sgd"}, 0), ({"name": "sgd", "momentum": 0.9}, 1),
        ({"name": "adafactor"}, 0),
    ],
)  # fmt: skip
def test_averages_of_a_weight(settings, count):
    assert averages_per_weight(OptimizerSettings(**{"momentum": 0.0, **settings})) == count
