"""Which mesh pays: whole plans, their advice, and the command."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from rayllp.bench.layers import LayerBench
from rayllp.cli import app
from rayllp.config import OptimizerSettings, make_config
from rayllp.config.run import SWEEPS
from rayllp.control import Controller
from rayllp.engine.replica_sums import BUCKET_BYTES
from rayllp.errors import SettingsError
from rayllp.plan import Costs, Device, LayerModel, MGRITSolve, RollingSolve, WindowSolve, make_plan, predict
from rayllp.plan.measure import measure_costs
from rayllp.plan.options import mgrit_solves
from rayllp.quantities import quantity
from rayllp.report.plan import measured_biases
from tests.test_families import RandomBatches, config_of

FREE = Device(latency_s=1e-9, bandwidth=1e18)


def config(layers=64, batch=16):
    return make_config({"model": {"layers": layers}, "buffers": {"open": 0, "close": 0}, "batch_size": batch, "workers": 1})


def layers(small=1e-2, per_sample=0.0, **changes):
    """Return a layer model whose forward takes `small` seconds plus `per_sample` for each sample, and each gradient as long."""

    def costs(batch):
        seconds = small + per_sample * batch
        return Costs(forward=seconds, record=seconds, input_gradient=seconds, full_gradient=2 * seconds)

    return LayerModel(measured={1: costs(1), 16: costs(16)}, **changes)


def test_latency_bound_layers_want_layer_parallelism_and_others_do_not():
    # However small the batch, a layer takes as long: neither replicas nor microbatches help.
    slow = make_plan(config(), layers(), FREE, 8)
    assert (slow.best.kind, slow.best.replicas, slow.best.layer_workers) == ("layer", 1, 8)
    assert slow.best.solve == RollingSolve(8, 1.2 * 8**0.5, 1.2 * 8**0.5, measured=False)
    # Of 64 layers, each with 8 parameter gradients of 10 ms on every worker: 19 + 19 sweeps of 10 ms.
    assert slow.best.step_s == pytest.approx(0.46, rel=1e-3)
    # Exact steps gain what parameter gradients off the critical path take: a third of the gradient's half.
    assert (slow.exact.kind, slow.exact.microbatches) == ("in_order", 1)
    assert slow.serial_s / slow.exact.step_s == pytest.approx(1.5, rel=0.02)
    assert "layer-parallel pays here" in slow.advice
    assert "a short run with windows.length=8, on any number of workers, measures them (--run)" in slow.advice
    # A layer's time is proportional to the batch: replicas divide it for nothing.
    wide = make_plan(config(), layers(small=0.0, per_sample=1e-3), FREE, 8)
    assert (wide.best.kind, wide.best.replicas) == ("data", 8)
    assert wide.serial_s / wide.best.step_s == pytest.approx(8)
    assert "use plain data parallelism here" in wide.advice
    # The same where gradients are too large to be exchanged: the pipeline, whose microbatches take their share, if there are enough.
    heavy = make_plan(config(batch=64), layers(small=0.0, per_sample=1e-3, parameter_bytes=1e9), Device(bandwidth=1e9), 8)
    assert (heavy.best.kind, heavy.best.layer_workers) == ("in_order", 8)
    assert "use layers in turn (mode=adaptive, adaptive.switch_at=0) here" in heavy.advice


def test_costs_between_and_beyond_what_was_measured():
    model = layers(small=1e-3, per_sample=1e-3)
    assert model.at(8, FREE).forward == pytest.approx(9e-3)
    assert model.at(32, FREE).forward == pytest.approx(33e-3)
    assert model.at(0.5, FREE).forward == pytest.approx(2e-3)
    one = LayerModel(measured={16: model.measured[16]})
    assert one.at(4, FREE).forward == pytest.approx(17e-3 / 4)


def test_a_ladder_or_a_tolerance_changes_no_prediction():
    changes = {"adaptive": {"ladder": ["3+3"]}, "mgrit": {"tolerance": 1e-3}}
    plain = config().model_dump(mode="json") | {"solver": "mgrit"}
    other = make_config({**plain, **{name: {**plain[name], **values} for name, values in changes.items()}})
    solves = [MGRITSolve(4, 2, 1, 1), MGRITSolve(4, 3, 3, 3)]
    found = [make_plan(some, layers(), FREE, 8, solves=solves).options for some in (config(), other)]
    assert [(o.text, o.step_s) for o in found[0]] == [(o.text, o.step_s) for o in found[1]]


def test_a_pipeline_takes_microbatches_and_stages_less_one():
    found = make_plan(config(), layers(small=0.0, per_sample=1e-3), FREE, 4).options
    pipe = next(option for option in found if (option.kind, option.replicas, option.layer_workers) == ("pipeline", 1, 4))
    assert pipe.microbatches == 16
    assert pipe.step_s == pytest.approx((16 + 3) * 16 * 3e-3)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_what_is_not_tried_is_not_faster(weight):
    some, model = (
        make_config({**config(48, 8).model_dump(mode="json"), "solver": "mgrit", "mgrit": {"coarse_step_weight": weight}}),
        layers(2e-3, 1e-3),
    )
    biases = {solve: 0.9 for solve in mgrit_solves(48) if solve.forward == 1 and solve.coarsening > 2}
    biases |= dict.fromkeys([WindowSolve(length, *sweeps) for length in (2, 4, 8, 16) for sweeps in SWEEPS], 0.9)
    quick = make_plan(some, model, Device(), 16, biases=biases)
    whole = make_plan(some, model, Device(), 16, biases=biases, solves=list(mgrit_solves(48)))
    assert len([o for o in quick.options if not isinstance(o.solve, WindowSolve)]) < len(whole.options)
    assert quick.best == whole.best
    assert {(o.replicas, o.layer_workers) for o in quick.options} == {(o.replicas, o.layer_workers) for o in whole.options}


def by_mgrit(**changes):
    return make_config({**config().model_dump(mode="json"), "solver": "mgrit", **changes})


def test_bias_and_memory_rule_options_out():
    fast = make_plan(by_mgrit(), layers(), FREE, 8)
    assert "its bias was not measured" in fast.advice
    known = make_plan(by_mgrit(), layers(), FREE, 8, biases={fast.best.solve: 0.9})
    assert known.best.solve != fast.best.solve
    good = make_plan(by_mgrit(), layers(), FREE, 8, biases={fast.best.solve: 0.03})
    assert good.best.solve == fast.best.solve
    assert "measured to be 0.03" in good.advice
    # Eight blocks of weights fit where the whole network does not.
    model = layers(parameter_bytes=1e9, graph_bytes=1e6)
    tight = make_plan(config(), model, Device(bandwidth=1e18, memory=64e9), 8)
    assert tight.best.layer_workers >= 8
    assert tight.best.memory < 64e9
    none = make_plan(config(), model, Device(memory=1e9), 8)
    assert none.best is None
    assert "nothing fits" in none.advice
    with pytest.raises(SettingsError, match="0 devices"):
        make_plan(config(), model, FREE, 0)


def test_measured_strides_of_a_rolling_window_take_the_place_of_usual_ones():
    usual = make_plan(config(), layers(), FREE, 8)
    known = make_plan(config(), layers(), FREE, 8, biases={RollingSolve(8, 4.0, 5.0): 0.3, RollingSolve(2, 1.0, 1.0): 0.3})
    assert known.best.solve == RollingSolve(8, 4.0, 5.0)  # a bias above the limit does not rule it out: probes have seen it, and its noise
    assert known.best.step_s < usual.best.step_s
    assert "its strides were measured" in known.advice
    slow = make_plan(config(), layers(), FREE, 8, biases={RollingSolve(8, 1.0, 1.0): 0.01})
    assert slow.best.solve is None or slow.best.layer_workers < 8
    fixed = make_config({**config().model_dump(mode="json"), "windows": {"rolling": False}})
    assert make_plan(fixed, layers(), FREE, 8).best.solve == WindowSolve(8, 1, 1)


def test_a_sharded_optimizer_saves_memory_and_costs_an_all_gather():
    model, device = layers(parameter_bytes=1e9, graph_bytes=1e6), Device(bandwidth=1e9)
    whole, sharded = (
        {option.text: option for option in make_plan(config().model_copy(update={"optimizer": optimizer}), model, device, 4).options}
        for optimizer in (OptimizerSettings(), OptimizerSettings(sharded=True))
    )
    for text, option in whole.items():
        if option.kind == "layer":  # blocks may be uneven
            continue
        other, owned = sharded[text], -(-64 // option.layer_workers)
        assert option.memory - other.memory == pytest.approx(owned * 2e9 * (1 - 1 / option.replicas))
        assert other.step_s - option.step_s == pytest.approx(device.all_gather_s(owned * 1e9 / option.replicas, option.replicas))


def test_gradients_are_summed_behind_the_adjoint():
    model, device = layers(small=1e-2, parameter_bytes=1e9), Device(bandwidth=1e12)
    fast, slow = (
        next(o for o in make_plan(config(), model, each, 4).options if o.text == "data parallel 4 × 1")
        for each in (device, replace(device, bandwidth=1e10))
    )
    busy_s = 64 * (1e-2 + 2e-2)
    assert fast.step_s == pytest.approx(busy_s + device.all_reduce_s(BUCKET_BYTES, 4))  # the last bucket
    assert slow.step_s == pytest.approx(busy_s + replace(device, bandwidth=1e10).all_reduce_s(64e9, 4) - 64 * 2e-2)


def test_spans_fill_a_predicted_step():
    """A worker's spans follow one another without gaps or overlaps, from the step's beginning to its end."""
    some = make_config({"model": {"layers": 24}, "workers": 5, "mode": "parallel", "solver": "mgrit", "mgrit": {"coarsening": 3}})
    costs = Costs(forward=2, record=3, input_gradient=2, full_gradient=5, enter=1, leave=4, update=0.5, message=0.25)
    found = predict(some, Controller(some).chosen, costs)
    for spans in found.spans:
        assert spans[0].begin == 0
        assert all(one.end == other.begin for one, other in pairwise(spans))
    assert max(spans[-1].end for spans in found.spans) == found.step_s


@pytest.mark.parametrize(("text", "value"), [("20us", 2e-5), ("1.5ms", 1.5e-3), ("2s", 2.0)])
def test_quantities_are_read(text, value):
    assert quantity(text, "--latency", "us µs ms s") == pytest.approx(value)


@pytest.mark.parametrize("text", ["20", "us", "-1us", "nanus", "fast", "3GB"])
def test_what_is_no_quantity_is_refused(text):
    with pytest.raises(SettingsError, match="--latency"):
        quantity(text, "--latency", "us µs ms s")


def test_biases_come_from_runs_and_sweeps(tmp_path):
    some = make_config({"mode": "parallel", "solver": "mgrit", "mgrit": {"coarsening": 2, "iterations": {"forward": 1, "backward": 1}}})
    run = tmp_path / "sweep" / "trials" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps(some.model_dump(mode="json")))
    steps = [(1, None), (3, 0.2), (1, None), (3, 0.4), (2, None), (4, 0.1)]  # a probe's own iterations are more
    counts = ("iterations_forward", "iterations_backward")
    lines = [{"mode": "parallel", "bias": bias, "rho_backward": bias, **dict.fromkeys(counts, count)} for count, bias in steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured_biases([tmp_path / "sweep"]) == measured_biases([run]) == {MGRITSolve(2, 2, 1, 1): 0.4, MGRITSolve(2, 2, 2, 2): 0.1}
    windows = make_config({"mode": "adaptive", "workers": 4})
    (run / "config.yaml").write_text(json.dumps(windows.model_dump(mode="json")))
    for line, probed in zip(lines[1::2], ("1+1", "rolling", "rolling"), strict=True):
        line["probed"] = probed
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured_biases([run]) == {WindowSolve(4, 1, 1): 0.2}  # and no step was taken by the rolling window
    steps = [(3, 6, None), (5, 4, None), (12, 9, 0.05), (4, 5, None)]  # the third was a probe
    for (forward, backward, bias), line in zip(steps, lines, strict=False):
        counts = {"iterations_forward": forward, "iterations_backward": backward}
        line |= {"step": 5, "solve": "rolling", "probed": bias and "rolling", "bias": bias, **counts}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    assert measured_biases([run, run]) == {RollingSolve(4, 3 * 20 / 12, 3 * 20 / 15): 0.05}
    nested = windows.model_copy(update={"nested": type(windows.nested)(factors=[4], at=[6])})  # 4 of 16 middle layers until step 6
    (run / "config.yaml").write_text(json.dumps(nested.model_dump(mode="json")))
    assert measured_biases([run]) == {RollingSolve(4, 3 * 8 / 12, 3 * 8 / 15): 0.05}
    with pytest.raises(SettingsError, match="neither a run's directory nor a sweep's"):
        measured_biases([tmp_path])


def test_the_command(tmp_path):
    files = []
    for batch in (1, 8):
        costs = Costs(forward=0.01, record=0.01, input_gradient=0.01, full_gradient=0.02)
        bench = LayerBench(batch=batch, costs=costs, parameter_bytes=1000, frozen_bytes=0, graph_bytes=100 * batch, state_bytes=10 * batch)
        files.append(tmp_path / f"layers{batch}.json")
        values = bench.as_dict()
        assert None not in values["costs"].values()
        values["costs"] |= {"gather": None, "total": None}  # as earlier files have
        files[-1].write_text(json.dumps(values))
    arguments = ["plan", "--set", "model.layers=64", "--set", "workers=1", "--devices", "16", "--json", str(tmp_path / "plan.json")]
    arguments += [part for file in files for part in ("--costs", str(file))]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "layer-parallel pays here" in result.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["best"] in written["options"]
    best = {name: written["best"][name] for name in ("kind", "data", "layer", "solve", "microbatches", "in_order", "bias")}
    assert best == {"kind": "layer", "data": 1, "layer": 16, "solve": [16, 1, 4.8, 4.8], "microbatches": 1, "in_order": False, "bias": None}
    assert (written["exact"]["kind"], written["exact"]["in_order"], written["exact"]["solve"]) == ("pipeline", True, None)
    assert written["serial_s"] == pytest.approx(64 * 0.03)
    files[0].write_text("{}")
    with pytest.raises(SettingsError, match="bench layers --json"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"model": {"layers": 6}, "buffers": {"open": 2, "close": 2}, "mgrit": {"levels": {"forward": 1, "backward": 1}}}),
        ("mt", {"model": {"layers": 12, "encoder_layers": 7}}),
    ],
)
def test_layers_are_timed_where_few_are_left_of_a_network(family, changes):
    costs = measure_costs(config_of(family, **changes), RandomBatches(family, "auto"), message_s=0.0, device="cpu", rounds=1)
    assert min(costs.forward, costs.record, costs.full_gradient) > 0
