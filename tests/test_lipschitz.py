"""Lipschitz estimates compared with dense Jacobians, over several workers; the buffers suggested for made-up profiles; the command."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from rayllp.channel import run_workers
from rayllp.cli import app
from rayllp.config import make_config
from rayllp.control import Controller, ProbePlan
from rayllp.engine.lipschitz import estimate_layers, lipschitz_constant
from rayllp.errors import SettingsError
from rayllp.plan import suggest_buffers
from rayllp.report import RunDirectory
from tests.conftest import make_engine, merge, tiny
from tests.test_engine import ENOUGH, SERIAL
from tests.test_families import config_of, make

MANY = 60


def dense(f, x):
    """Return the largest singular value of f's Jacobian at x."""
    jacobian = torch.autograd.functional.jacobian(f, x).reshape(x.numel(), x.numel())
    return torch.linalg.svdvals(jacobian)[0].item()


def test_of_a_linear_layer_it_is_the_largest_singular_value():
    layer = nn.Linear(12, 12, dtype=torch.float64)
    x = torch.randn(1, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.linalg.svdvals(layer.weight)[0].item()
    assert lipschitz_constant(layer, x, seed=0, iterations=MANY) == pytest.approx(wanted, rel=0.01)
    assert 0.8 * wanted < lipschitz_constant(layer, x, seed=0) <= wanted * (1 + 1e-9)
    assert lipschitz_constant(layer, 0 * x, seed=0, iterations=MANY) == pytest.approx(wanted, rel=0.01)


def test_of_a_gpt2_layer_it_is_the_dense_jacobians():
    engine = make_engine(tiny(sequence_length=8))
    batch, block = engine.step_batch(0), engine.block
    with block.recorded_inputs() as states:
        bound = block.bind(batch)
        state = bound.enter(batch.inputs)
        bound.layer(2, state.detach())
    bound.layer(2, 2 * state.detach())  # no longer recorded
    first = batch.part(slice(0, 1))
    for parameter in block.layers[2].parameters():
        parameter.data *= 2
    bound = block.bind(first)
    wanted = dense(partial(bound.increment, 2), state[:1].detach())
    for dtype in ("float64", "float32", "bfloat16"):
        mine = make_engine(tiny(sequence_length=8, dtype=dtype)).block
        mine.layers[2].load_state_dict(block.layers[2].state_dict())
        increment = partial(mine.bind(first).increment, 2)
        found = lipschitz_constant(increment, states[2].to(mine.dtype), seed=0, iterations=MANY)
        assert found == pytest.approx(wanted, rel=0.01)
    # The increment is what `layer` adds, over Δt.
    after = bound.layer(2, state[:1])
    torch.testing.assert_close(after - state[:1], bound.increment(2, state[:1]) * tiny().middle_step)


def test_a_layer_that_moves_nothing_has_none():
    x = torch.ones(1, 2, 3)
    assert lipschitz_constant(lambda x: 0 * x, x, seed=0) == 0
    assert lipschitz_constant(lambda x: torch.ones(1, 2, 3), x, seed=0) == 0


def estimates(config, accuracy=ENOUGH, make=make_engine):
    """Return the estimates of all layers, merged over the layer group's threads, and the gradient norm of the step."""
    plan = ProbePlan(candidate=accuracy, lipschitz=True)

    def work(channel):
        engine = make(config, channel)
        stats = engine.train_step(2, accuracy, plan)
        assert set(stats.lipschitz) == set(engine.block.layers)
        return asdict(stats)

    found = run_workers(config.layer_workers, work)
    merged = {n: value for stats in found for n, value in stats["lipschitz"].items()}
    return [merged[n] for n in range(config.model.layers)], found[0]["grad_norm"]


def test_estimates_do_not_depend_on_the_workers():
    options = {
        "model": {"layers": 8, "dropout": 0.1},
        "buffers": {"open": 1, "close": 1},
        "mgrit": {"coarsening": 3},
        "step": {"middle": 0.3},
    }
    wanted, norm = estimates(tiny(**options))
    assert all(value > 0 for value in wanted)
    for changes, accuracy in (
        ({"workers": 2}, ENOUGH),
        ({"workers": 3, "recompute": True, "accumulate": 2}, ENOUGH),
        ({}, SERIAL),
    ):
        found, same_norm = estimates(tiny(**merge(options, changes)), accuracy)
        assert found == pytest.approx(wanted, rel=1e-6)
        assert same_norm == pytest.approx(norm, rel=1e-9)
    engine = make_engine(tiny(**options))
    assert engine.train_step(2, ENOUGH, ProbePlan(candidate=ENOUGH)).lipschitz is None


def test_an_encoder_decoder_has_them_too():
    wanted, _ = estimates(config_of("mt"), make=make)
    assert all(value > 0 for value in wanted)
    assert estimates(config_of("mt", workers=2), make=make)[0] == pytest.approx(wanted, rel=1e-6)


def test_a_replica_without_the_first_sequence_has_none():
    engine = make_engine(tiny())
    batch = replace(engine.step_batch(0), samples=tuple(range(4, 8)))
    with engine.block.recorded_inputs() as states:
        engine.block.bind(batch).enter(batch.inputs)
    assert estimate_layers(engine.block, batch, states) == {}


def test_probes_estimate_as_often_as_is_set():
    control = Controller(make_config({"mode": "parallel", "adaptive": {"probe_every": 10, "lipschitz_every": 2}}))
    assert [step for step in range(60) if (plan := control.plan_probe(step)) and plan.lipschitz] == [0, 19, 39, 59]
    control = Controller(make_config({"mode": "parallel", "adaptive": {"probe_every": 10}}))
    assert not any(plan.lipschitz for step in range(60) if (plan := control.plan_probe(step)))
    with pytest.raises(SettingsError, match="lipschitz_every 1 counts probes, of which probe_every=0 makes none"):
        make_config({"adaptive": {"probe_every": 0, "lipschitz_every": 1}})


# What is made of them -----------------------------------------------------------------------------------------------------------


def suggest(profile, *, factor=2.0, **settings):
    config = make_config(merge({"model": {"layers": len(profile)}, "workers": 2, "solver": "mgrit", "mgrit": {"coarsening": 4}}, settings))
    return suggest_buffers([profile], config, factor=factor)


def numbers(found):
    return found.open, found.middle, found.close


def test_hot_ends_are_taken_out():
    found = suggest([9.0, 4.0, *[1.0] * 16, 3.0, 5.0])
    assert numbers(found) == (2, 16, 2)
    assert found.threshold == 2.0
    assert found.reasons[0] == "the first 2 layers are beyond the bar of 2 (9, 4)"
    assert found.reasons[1] == "the last 2 layers are beyond the bar of 2 (5, 3)"


def test_one_hot_end_is_taken_out_alone():
    assert numbers(suggest([*[1.0] * 16, 3.0, 4.0, 5.0, 6.0])) == (0, 16, 4)
    assert numbers(suggest([3.0, 4.0, 5.0, 6.0, *[1.0] * 16])) == (4, 16, 0)


def test_a_flat_profile_needs_no_buffers():
    found = suggest([1.0, 1.1] * 10)
    assert numbers(found) == (0, 20, 0)
    assert "not beyond the bar" in found.reasons[0]


def test_what_is_left_divides_and_the_steeper_layer_goes_first():
    found = suggest([9.0, *[1.0] * 16, 1.2, 1.5, 5.0])
    assert found.steep_ends == (1, 1)
    assert numbers(found) == (1, 16, 3)
    assert "18 middle layers do not divide into coarse intervals of 4" in found.reasons[2]
    # On more levels too.
    three = {"mgrit": {"coarsening": [4, 2], "levels": {"forward": 3, "backward": 3}}}
    assert numbers(suggest([*[1.0] * 16, *[9.0] * 4], **three)) == (0, 16, 4)


def test_a_steep_layer_inside_is_named_and_stays():
    found = suggest([9.0, 9.0, *[1.0] * 8, 7.0, *[1.0] * 7, 9.0, 9.0])
    assert numbers(found) == (2, 16, 2)
    assert found.reasons[-1] == "steep layers inside the middle, which buffers do not reach: 10"


def test_a_steep_middle_gives_no_buffer_back():
    # As measured of 0 + 16 + 4 layers: the first layers are steep, but so is the whole middle that they are in.
    profile = [19.0, 12.0, 27.0, 15.0, *[10.0] * 12, 0.8, 0.8, 0.5, 0.4]
    found = suggest(profile, buffers={"open": 0, "close": 4})
    assert found.steep_ends == (0, 0)
    assert numbers(found) == (0, 16, 4)
    assert "c_f·Δt times its median constant is 2.5, and calm up to 0.5" in found.reasons[2]
    assert numbers(suggest([each / 10 for each in profile], buffers={"open": 0, "close": 4})) == (0, 20, 0)
    assert numbers(suggest([50.0, *profile[1:]], buffers={"open": 0, "close": 4})) == (4, 12, 4)


def test_where_nothing_is_left_the_runs_own_stay():
    profile = [32.0, 16.0, 8.0, 4.0, 1.0, 1.0, 4.0, 8.0, 16.0, 32.0]
    found = suggest(profile, buffers={"open": 1, "close": 1}, solver="mgrit", factor=1.0)
    assert numbers(found) == (1, 8, 1)
    assert "leaves no middle" in found.reasons[3]


def test_the_last_estimates_count_by_their_median():
    config = make_config({"model": {"layers": 20}})
    flat, hot, odd = [1.0] * 20, [9.0, 9.0, *[1.0] * 16, 9.0, 9.0], [*[1.0] * 18, float("nan"), 1.0]
    assert numbers(suggest_buffers([flat, flat, hot, flat, hot], config)) == (2, 16, 2)
    assert numbers(suggest_buffers([hot, hot, flat, hot, flat], config)) == (0, 20, 0)
    assert suggest_buffers([odd], config).constants[18] == float("inf")
    assert numbers(suggest_buffers([odd], config)) == (0, 20, 0)


@pytest.mark.parametrize(
    ("estimates", "factor", "message"),
    [
        ([], 2.0, "no Lipschitz estimates: .*adaptive.lipschitz_every"),
        ([[1.0] * 19], 2.0, "estimates of 19 layers for model.layers=20: give one a layer"),
        ([[1.0] * 20], 0.5, "factor 0.5: .*at least 1"),
        ([[float("nan")] * 20], 2.0, "are not finite: the run diverged"),
    ],
)
def test_what_cannot_be_judged_is_refused(estimates, factor, message):
    with pytest.raises(SettingsError, match=message):
        suggest_buffers(estimates, make_config({"model": {"layers": 20}}), factor=factor)


# The command ----------------------------------------------------------------------------------------------------------------------


def run_directory(path, config, steps):
    """Write the run directory that the driver would write for these steps, which run on this thread."""
    run, engine, control = RunDirectory.create(path, config), make_engine(config), Controller(config)
    for step in range(steps):
        plan = control.plan_probe(step)
        stats = engine.train_step(step, control.accuracy, plan)
        run.metric({"step": step, "loss": stats.loss, "lipschitz": stats.lipschitz and [stats.lipschitz[n] for n in range(12)]})
    return run


def test_the_command_reads_a_run(tmp_path):
    config = tiny(adaptive={"probe_every": 2, "lipschitz_every": 1}, mgrit={"coarsening": 2})
    run = run_directory(tmp_path / "run", config, 4)
    assert len(run.read_lipschitz()) == 3
    done = CliRunner().invoke(app, ["suggest-buffers", str(run.path)])
    assert done.exit_code == 0, done.output
    assert "From the last 3 of 3 estimates: 0 + 12 + 0 layers; the run has 2 + 8 + 2. For a new run:" in done.output
    assert "--set buffers.open=0 --set buffers.close=0" in done.output
    rows = [line.split() for line in done.output.splitlines() if line.strip()[:1].isdigit()]
    assert [row[1] for row in rows] == ["open"] * 2 + ["middle"] * 8 + ["close"] * 2
    assert [row[-1] for row in rows] == ["middle"] * 12


def test_the_command_says_where_nothing_changes(tmp_path):
    run = RunDirectory.create(tmp_path / "run", tiny(mesh={"blocks": [8]}))
    run.metric({"step": 0, "lipschitz": [9.0, 9.0, *[1.0] * 8, 9.0, 9.0]})
    assert "2 + 8 + 2 layers, as the run has them" in CliRunner().invoke(app, ["suggest-buffers", str(run.path)]).output
    done = CliRunner().invoke(app, ["suggest-buffers", str(run.path), "--factor", "10"])
    assert "--set buffers.open=0 --set buffers.close=0 --set mesh.blocks=null" in done.output


def test_the_command_says_what_a_run_lacks(tmp_path):
    run = RunDirectory.create(tmp_path / "run", tiny())
    for path, message in ((tmp_path, "is not a run directory"), (run.path, "adaptive.lipschitz_every=0.*--set adaptive.lipschitz_every=1")):
        done = CliRunner().invoke(app, ["suggest-buffers", str(path)])
        assert isinstance(done.exception, SettingsError)
        with pytest.raises(SettingsError, match=message):
            raise done.exception
    (run.path / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")  # of an older version: no such entry
    assert "has no Lipschitz estimates" in str(CliRunner().invoke(app, ["suggest-buffers", str(run.path)]).exception)
