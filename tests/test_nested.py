"""Nested iteration: its schedule, what a deeper network takes over from a shallower one, and whole runs that deepen twice."""

import json
import shutil
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import rayllp
from rayllp import LayerStack
from rayllp.channel import LocalChannel, run_workers
from rayllp.channel.base import MessageTag
from rayllp.checkpoint import PieceWriter, Prolongation, count_layers, load_pieces, read_manifest
from rayllp.checkpoint.depth_prolongation import prolong_layer
from rayllp.checkpoint.export import export
from rayllp.config import load_config, make_config
from rayllp.config.nested import stage_at, stage_of_depth, stages
from rayllp.control import Accuracy
from rayllp.engine import Engine
from rayllp.errors import CheckpointError, SettingsError
from rayllp.models.scaled import load_scaled
from rayllp.report import RunDirectory
from rayllp.report.buffers import show_suggestion
from rayllp.training.prepare import validate
from tests.conftest import make_engine, tiny, train_engine

SERIAL = Accuracy(serial=True, levels_forward=1, levels_backward=1, iterations_forward=1, iterations_backward=1)
PRETRAINED = {
    "layers": 20, "width": 64, "heads": 4, "feed_forward": None, "kv_heads": None, "patch_size": 4, "encoder_layers": None,
    "from_pretrained": "folder",
}  # fmt: skip
MGRIT = {"solver": "mgrit"}
TWICE = {"factors": [2, 2], "at": [100, 200]}


# The schedule -------------------------------------------------------------------------------------------------------------------


def test_without_a_schedule_the_one_stage_is_the_run():
    config = make_config({})
    (stage,) = stages(config)
    assert stage.config is config
    assert (stage.begin, stage.end, stage.note) == (0, config.steps, "")


def test_stages_keep_the_total_time_and_the_buffers():
    config = make_config({"model": {"layers": 36}, "nested": TWICE})
    found = stages(config)
    assert [(stage.number, stage.begin, stage.end) for stage in found] == [(1, 0, 100), (2, 100, 200), (3, 200, 250)]
    assert [stage.config.model.layers for stage in found] == [12, 20, 36]
    assert [stage.config.middle_layers * stage.config.middle_step for stage in found] == [1.0, 1.0, 1.0]
    assert {stage.config.steps for stage in found} == {config.steps}  # the learning rate follows the whole run
    assert found[-1].config == config.model_copy(update={"nested": make_config({}).nested})
    assert not any(stage.note for stage in found)


def test_a_step_that_is_a_number_is_the_deep_networks():
    config = make_config({"step": {"middle": 0.25}, "nested": {"factors": [2, 4], "at": [100, 200]}})
    assert [stage.config.middle_step for stage in stages(config)] == [2.0, 1.0, 0.25]


def test_the_stage_of_a_step_and_of_a_depth():
    config = make_config({"nested": TWICE})
    assert [stage_at(config, step).number for step in (0, 99, 100, 199, 200, 249, 250)] == [1, 1, 2, 2, 3, 3, 3]
    assert [stage_of_depth(config, layers).number for layers in (8, 12, 20)] == [1, 2, 3]
    with pytest.raises(CheckpointError, match="has 9 layers, but the run's settings make networks of 8, 12, 20"):
        stage_of_depth(config, 9)


def test_blocks_that_are_set_are_divided():
    config = make_config({"solver": "mgrit", "mesh": {"blocks": [12, 4]}, "nested": TWICE})
    assert [stage.config.blocks for stage in stages(config)] == [(3, 1), (6, 2), (12, 4)]


def test_a_stage_too_shallow_for_its_levels_has_fewer_or_is_serial():
    levels = {"levels": {"forward": 1, "backward": 3}, "coarsening": 4}
    adaptive = {"consistency": 1.0, "steer": True, "rule": "bias"}
    found = stages(
        make_config(
            {"solver": "mgrit", "model": {"layers": 68}, "mgrit": levels, "adaptive": adaptive, "nested": {**TWICE, "factors": [4, 4]}}
        )
    )
    assert [stage.config.mode for stage in found] == ["serial", "adaptive", "adaptive"]
    assert [stage.config.mgrit.levels.backward for stage in found] == [1, 2, 3]
    assert [stage.config.adaptive.consistency for stage in found] == [0.0, 1.0, 1.0]
    assert [stage.note for stage in found] == [
        "4 middle layers are too few for mgrit.coarsening, so it is trained serially",
        "16 middle layers allow 1 levels forward and 2 backward",
        "",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nested": {"factors": [2]}}, r"1 factors \[2\] at 0 steps \[\]: give as many"),
        ({"nested": {"factors": [1], "at": [9]}}, r"factors \[1\]: every factor must be at least 2"),
        ({"nested": {"factors": [2, 2], "at": [9, 9]}}, r"at \[9, 9\]: steps must be positive and increase"),
        ({"nested": {"factors": [2], "at": [0]}}, r"at \[0\]: steps must be positive and increase"),
        ({"nested": {"factors": [2], "at": [250]}}, r"at \[250\]: the last deepening must come before the end, step 250: lower it"),
        ({"nested": {"factors": [2, 3], "at": [8, 9]}}, r"16 middle layers do not divide by nested.factors 2 × 3 = 6: use .*=16 or 22"),
        ({"nested": {"factors": [32], "at": [9]}}, r"16 middle layers do not divide by nested.factors 32: use model.layers=36,"),
        ({"workers": 8, "nested": TWICE}, r"stage 1 of 3, with 4 middle layers: 8 layer-parallel workers .* use at most 4 .*; or lower"),
        ({**MGRIT, "mesh": {"blocks": [10, 6]}, "nested": TWICE}, r"mesh.blocks \(10, 6\) .* every block must be a multiple of 4"),
        ({**MGRIT, "workers": 4, "adaptive": {"consistency": 1}, "nested": TWICE}, r"stage 2 of 3, .* blocks \(2, 2, 2, 2\) cut intervals"),
        ({"model": PRETRAINED, "nested": TWICE}, r"nested with model.from_pretrained: .* leave one of them out"),
        ({"model": {"family": "mt"}, "nested": TWICE}, r"nested with model.family=mt: .* leave nested out"),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be_are_refused_in_words(changes, message):
    with pytest.raises(SettingsError, match=message):
        make_config(changes)


def test_a_network_that_cannot_be_thinned_is_refused():
    class Own:
        layers = 20

    with pytest.raises(SettingsError, match="nested needs a LayerStack, to make shallower ones of it; got a Own"):
        validate(make_config({"nested": TWICE}), Own(), object())


# Prolongation -------------------------------------------------------------------------------------------------------------------


def test_sources_of_the_layers():
    prolongation = Prolongation(open=1, middle=2, close=2, factor=3)
    assert [prolongation.source(n) for n in range(9)] == [0, 1, 1, 1, 2, 2, 2, 3, 4]
    assert [prolongation.is_middle(n) for n in range(9)] == [False, *[True] * 6, False, False]


def test_what_a_checkpoint_is_prolonged_to():
    config = tiny()  # 2 + 8 + 2
    assert Prolongation.between(12, config, Path("here")) is None
    assert Prolongation.between(6, config, Path("here")) == Prolongation(open=2, middle=2, close=2, factor=4)
    for layers in (7, 4, 20):
        with pytest.raises(CheckpointError, match=rf"here has {layers - 4} middle layers \(of {layers}\).* want 8, which is no multiple"):
            Prolongation.between(layers, config, Path("here"))


def test_a_copys_state():
    stored = {f"{part}/h.1.w": torch.full((2,), 8.0) for part in ("weight", "exp_avg", "exp_avg_sq", "momentum_buffer", "step")}
    copy = prolong_layer(stored, "h.1.", "h.5.", 1 / 4)
    assert {key: float(value[0]) for key, value in copy.items()} == {
        "weight/h.5.w": 8.0, "exp_avg/h.5.w": 2.0, "exp_avg_sq/h.5.w": 0.5, "momentum_buffer/h.5.w": 2.0, "step/h.5.w": 8.0,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="not known how the optimizer's momentum follows"):
        prolong_layer({"momentum/h.1.w": torch.ones(1)}, "h.1.", "h.5.", 1 / 4)


def deepen(shallow, config, folder, architecture=None, workers=1):
    """Return the engines of `config`'s network, by rank, initialised from the shallow engine's state."""
    folder.mkdir(parents=True)
    writer = PieceWriter()
    writer.begin(shallow, folder)
    writer.finish()
    prolongation = Prolongation.between(shallow.config.model.layers, config, folder)

    def work(channel):
        if architecture is None:
            engine = make_engine(config, channel)
        else:
            engine = Engine(architecture, config, None, channel, LocalChannel.alone(), torch.device("cpu"))
        load_pieces(engine, folder, prolongation)
        return engine

    return run_workers(workers, work)


class Growth(torch.nn.Module):
    """x -> (1 + a) x."""

    def __init__(self, a):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x):
        return x + self.a * x


def test_the_copies_of_a_linear_layer_are_smaller_steps_of_it(tmp_path):
    rates = [0.3, -0.5, 0.7, 0.2]
    identity = torch.nn.Identity()
    whole = LayerStack(embed=identity, layers=[Growth(rates[n // 2]) for n in range(8)], head=identity, loss=lambda y, _: y.sum())
    buffers = {"open": 1, "close": 1}
    whole_config = tiny(model={"layers": 8}, buffers=buffers, step={"middle": "3/N"}, nested={"factors": [3], "at": [1]})
    shallow_config, config = (stage.config for stage in stages(whole_config))
    stack = LayerStack(embed=identity, layers=[Growth(a) for a in rates], head=identity, loss=lambda y, _: y.sum())
    shallow = Engine(stack, shallow_config, None, LocalChannel.alone(), LocalChannel.alone(), torch.device("cpu"))
    (deep,) = deepen(shallow, config, tmp_path / "shallow", whole)
    x = torch.ones(1, 1, dtype=torch.float64)
    outputs = [float(engine.exact_forward(x, MessageTag(0, "test"))) for engine in (shallow, deep)]
    buffers, middle = 1.3 * 1.2, (-0.5, 0.7)
    assert outputs[0] == pytest.approx(buffers * prod(1 + 1.5 * a for a in middle), rel=1e-12)
    assert outputs[1] == pytest.approx(buffers * prod((1 + 0.5 * a) ** 3 for a in middle), rel=1e-12)


def shallow_and_deep(path, step, factor=4, steps=5, workers=1, optimizer="adamw"):
    """Return a GPT-2 of 2 + 2 + 2 layers after some steps, and the deeper network made of it, with Δt = `step`."""
    nested = {"factors": [factor], "at": [steps]}
    config = tiny(
        model={"layers": 4 + 2 * factor},
        step={"middle": step},
        mgrit={"coarsening": 2},
        nested=nested,
        workers=workers,
        optimizer={"name": optimizer},
    )
    first, last = stages(config)
    shallow = make_engine(first.config.model_copy(update={"workers": 1}))
    train_engine(shallow, steps)
    return shallow, deepen(shallow, last.config, path, workers=workers)


def weights(engine, index):
    """Return a layer's weights as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in engine.block.layers[index].parameters()])


def test_copies_have_the_weights_and_their_share_of_the_moments(tmp_path):
    shallow, engines = shallow_and_deep(tmp_path / "a", 0.125, workers=2)
    block = shallow.block
    seen = set()
    for engine in engines:
        for index, layer in engine.block.layers.items():
            is_middle = 2 <= index < 10
            source = block.layers[2 + (index - 2) // 4 if is_middle else (index if index < 2 else index - 6)]
            scale = 1 / 4 if is_middle else 1
            seen.add(index)
            for copied, original in zip(layer.parameters(), source.parameters(), strict=True):
                assert torch.equal(copied, original)
                got, had = engine.optimizer.state_of(copied), shallow.optimizer.state_of(original)
                torch.testing.assert_close(got["exp_avg"], had["exp_avg"] * scale, rtol=1e-14, atol=0)
                torch.testing.assert_close(got["exp_avg_sq"], had["exp_avg_sq"] * scale**2, rtol=1e-14, atol=0)
                assert got["step"] == had["step"] == 5
    assert seen == set(range(12))
    outer = [name for name in block.parameters if ".h." not in name]
    assert outer
    for name in outer:
        engine = next(engine for engine in engines if name in engine.block.parameters)
        mine, theirs = engine.block.parameters[name], block.parameters[name]
        assert torch.equal(mine, theirs)
        assert torch.equal(engine.optimizer.state_of(mine)["exp_avg"], shallow.optimizer.state_of(theirs)["exp_avg"])


def test_the_deep_gpt2_is_the_shallow_one_up_to_the_step_squared_a_layer(tmp_path):
    """Each of two layers has an error of O(Δt²): half of Δt makes a quarter of the difference."""
    gaps = []
    for n, step in enumerate((0.02, 0.01, 0.005)):
        shallow, (deep,) = shallow_and_deep(tmp_path / str(n), step)
        inputs = shallow.step_batch(0, split="validation").inputs
        outputs = [engine.exact_forward(inputs, MessageTag(0, "test")) for engine in (shallow, deep)]
        gaps.append(float((outputs[0] - outputs[1]).norm() / outputs[0].norm()))
    assert 0 < gaps[0] < 1e-2
    assert [early / late for early, late in pairwise(gaps)] == pytest.approx([4, 4], rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_the_next_optimizer_step_of_each_copy_is_the_layers(tmp_path, optimizer):
    """So the optimizer's moments are scaled rightly: unscaled, the copies' first steps would differ from the layer's."""
    shallow, (deep,) = shallow_and_deep(tmp_path / "a", 0.02, optimizer=optimizer)
    before = {index: weights(shallow, index) for index in (2, 3)}
    for engine in (shallow, deep):
        engine.train_step(5, SERIAL)
    for index in range(2, 10):
        source = 2 + (index - 2) // 4
        moved = weights(shallow, source) - before[source]
        assert float((weights(deep, index) - before[source] - moved).norm() / moved.norm()) < 0.1


# Whole runs ---------------------------------------------------------------------------------------------------------------------


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def deepened(kept_workers, tmp_path_factory):
    """Train 2 + 2 + 2 layers to step 4 (too few for MGRIT), 2 + 4 + 2 to step 8, 2 + 8 + 2 to step 12."""
    config = tiny(
        workers=2, steps=12, mgrit={"coarsening": 2}, nested={"factors": [2, 2], "at": [4, 8]}, checkpoint={"every": 3, "keep": 9},
        eval={"every": 4},
    )  # fmt: skip
    return config, rayllp.train(config, output=tmp_path_factory.mktemp("nested") / "run").directory


def test_a_run_deepens_in_one_directory(deepened):
    config, run = deepened
    metrics = read(run / "metrics.jsonl")
    assert [metric["step"] for metric in metrics] == list(range(12))
    assert [metric["mode"] for metric in metrics] == ["serial"] * 4 + ["parallel"] * 8
    assert [evaluation["step"] for evaluation in read(run / "evals.jsonl")] == [4, 8, 12]
    found = [{key: value for key, value in event.items() if key != "time"} for event in read(run / "events.jsonl")]
    assert [event for event in found if event["kind"] != "checkpoint"] == [
        {"step": 4, "kind": "deepen", "layers_before": 6, "layers": 8, "middle_layers": 4, "step_size": 0.25},
        {"step": 8, "kind": "deepen", "layers_before": 8, "layers": 12, "middle_layers": 8, "step_size": 0.125},
    ]
    depths = {step: count_layers(read_manifest(run / "checkpoints" / f"step_{step}")) for step in (3, 4, 6, 8, 9, 12)}
    assert depths == {3: 6, 4: 6, 6: 8, 8: 8, 9: 12, 12: 12}
    assert load_config(run / "config.yaml") == config


@pytest.mark.parametrize("step", [4, pytest.param(6, marks=pytest.mark.study)])
def test_an_interrupted_run_goes_on_in_its_stage_to_the_same_weights(deepened, step, tmp_path):
    """It is interrupted at the last step of a stage, whose checkpoint is still shallow, and in the middle of one."""
    config, whole = deepened
    copy = RunDirectory.create(tmp_path / "copy", config)
    for name in ("metrics.jsonl", "evals.jsonl", "events.jsonl", "model.json"):
        shutil.copy(whole / name, copy.path)
    shutil.copytree(whole / "checkpoints" / f"step_{step}", copy.checkpoints / f"step_{step}")
    assert rayllp.train(resume=copy.path).steps == 12
    kinds = [event["kind"] for event in read(copy.path / "events.jsonl")]
    assert kinds[kinds.index("restore") - 1 :].count("deepen") == {4: 2, 6: 1}[step]
    assert [metric["step"] for metric in read(copy.path / "metrics.jsonl")] == list(range(12))
    for path in (whole / "checkpoints" / "step_12").glob("*.safetensors"):
        again = load_file(copy.checkpoints / "step_12" / path.name)
        assert all(torch.equal(value, again[name]) for name, value in load_file(path).items()), path.name


@pytest.mark.parametrize(("step", "layers", "size"), [(4, 6, 0.5), (8, 8, 0.25), (12, 12, 0.125)])
def test_an_export_has_the_depth_of_its_checkpoint(deepened, step, layers, size, tmp_path):
    config, run = deepened
    model = load_scaled(export(run, tmp_path / "model", step)).eval()
    assert model.config.n_layer == layers
    assert model.config.scaled["step_sizes"] == [1.0, 1.0, *[size] * (layers - 4), 1.0, 1.0]
    engine = make_engine(stage_of_depth(config, layers).config.model_copy(update={"workers": 1}))
    load_pieces(engine, run / "checkpoints" / f"step_{step}")
    inputs = engine.step_batch(0, split="validation").inputs
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, engine.exact_forward(inputs, MessageTag(0, "test")), rtol=1e-10, atol=1e-10)


def test_buffers_are_suggested_for_the_depth_that_estimates_have_now(tmp_path):
    run = RunDirectory.create(tmp_path / "run", make_config({"nested": TWICE}))
    for step, layers in ((99, 8), (199, 12)):
        run.metric({"step": step, "lipschitz": [9.0, 9.0, *[1.0] * (layers - 4), 9.0, 9.0]})
    found = show_suggestion(run.path, 2.0, Console(quiet=True))
    assert (found.open, found.middle, found.close) == (2, 8, 2)


class Halves:
    """Batches whose target is whether the sum of two numbers is positive, as a function of (split, step)."""

    def batch(self, split, step, size):
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        return x, (x.sum(1, keepdim=True) > 0).double()


@pytest.mark.usefixtures("ray_cluster")
def test_a_layer_stack_deepens_too(tmp_path):
    stack = LayerStack(
        embed=lambda: torch.nn.Linear(4, 4), layers=[lambda: torch.nn.Linear(4, 4)] * 10, head=lambda: torch.nn.Linear(4, 1),
        loss=lambda outputs, targets: torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum"),
    )  # fmt: skip
    config = tiny(model={"layers": 10}, buffers={"open": 1, "close": 1}, steps=4, nested={"factors": [2], "at": [2]})
    result = rayllp.train(config, model=stack, batches=Halves(), output=tmp_path / "run")
    assert [metric["step"] for metric in read(result.directory / "metrics.jsonl")] == [0, 1, 2, 3]
    assert count_layers(read_manifest(result.directory / "checkpoints" / "step_4")) == 10
