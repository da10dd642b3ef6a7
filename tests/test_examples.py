"""The figures that the documents quote from an example, computed by that example; and the commands that fetch examples' data."""

import ast
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import rayllp

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("h", "states", "gradients"),
    [(1 / 32, (1.6e-2, 1.7e-4), (1.7e-2, 1.2e-2, 1.6e-4)), (1.0, (0.50, 0.17), (0.50, 0.42, 0.17))],
)
def test_32_gpt_blocks_are_as_accurate_as_the_table_says(h, states, gradients):
    """c_f = 4, 2 levels, F-relaxation: state errors after 1 and 2 forward iterations, gradient errors at 1+1, 2+1, 2+2 (docs/method.md)."""
    table = load("convergence_table")
    exact_state, exact_gradient, _ = table.measure(32, h, 0, 0)
    for iterations, state, gradient in (((1, 1), states[0], gradients[0]), ((2, 1), states[1], gradients[1]), ((2, 2), None, gradients[2])):
        got_state, got_gradient, _ = table.measure(32, h, *iterations)
        if state is not None:
            assert table.error(got_state, exact_state) == pytest.approx(state, rel=0.1)
        assert table.error(got_gradient, exact_gradient) == pytest.approx(gradient, rel=0.1)


def test_the_frontier_accounts_time_and_depth_as_it_says():
    frontier = load("frontier")

    def result(way, middle, loss, solves, probes=None, lr=1e-3):
        return {
            "task": "shakespeare", "way": way, "middle": middle, "seed": 0, "lr": lr, "steps": 100, "loss": loss, "solves": solves,
            "probes": probes or {},
        }  # fmt: skip

    results = [
        result("serial", 16, 2.2, {"serial": 100}), result("serial", 64, 2.1, {"serial": 100}, lr=1e-3),
        result("serial", 64, 2.0, {"serial": 100}, lr=2e-3), 
        result("adaptive", 64, 2.05, {"rolling 9+9": 90, "rolling 11+9": 9}, {"rolling 9+9 by rolling 13+12": 1}, lr=2e-3),
    ]  # fmt: skip
    found = {(row.way, row.middle): row for row in frontier.rows(results)}
    assert found["serial", 64].lr == 2e-3  # the better of two
    assert found["serial", 64].hours == pytest.approx(100 * 68 * 0.030 / 3600)
    adaptive = found["adaptive", 64]
    assert adaptive.gaps == pytest.approx([2.5])
    assert adaptive.kept == pytest.approx(75)
    # An exact step on one device takes 3 × 68 evaluations of a layer; here 18 sweeps and the gradients of 9 layers, messages, and a probe.
    assert 0.9 * 204 / 27 < adaptive.speedup < 204 / 27
    assert "99% rolling, 9.2 + 9.0 sweeps" in adaptive.solves
    assert "| adaptive | 64 | 8 | 2.0500 | +2.50 | 75 |" in frontier.table(list(found.values()), "shakespeare")


def test_the_deep_teacher_gives_each_step_a_lesson_of_its_own():
    teacher = load("deep_teacher")
    config = rayllp.load_config(teacher.CONFIG, ["model.layers=4", "seed=3"])
    other = rayllp.load_config(teacher.CONFIG, ["model.layers=4", "seed=4"])
    lessons, others = teacher.Lessons(config), teacher.Lessons(other)
    inputs, targets = lessons.batch("train", 5, 16)
    assert all(torch.equal(one, two) for one, two in zip(lessons.batch("train", 5, 16), (inputs, targets), strict=True))
    assert not torch.equal(others.batch("train", 5, 16)[0], inputs)
    assert torch.equal(others.batch("validation", 5, 16)[0], lessons.batch("validation", 5, 16)[0])
    assert float(teacher.error(targets, targets)) == 0
    assert float(targets.var(0).mean()) == pytest.approx(1, rel=0.5)


@pytest.mark.parametrize("program", sorted(EXAMPLES.rglob("*.py")), ids=lambda program: program.stem)
def test_what_an_example_takes_from_rayllp_is_there(program):
    for node in ast.walk(ast.parse(program.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rayllp":
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), (
                    f"{node.module} has no {name.name}"
                )


# Configs: what a reader has to fetch ---------------------------------------------------------------------------------------------

CONFIGS = sorted(EXAMPLES.glob("*.yaml"))


def data_of(config):
    return yaml.safe_load(config.read_text(encoding="utf-8")).get("data", {})


def expanded(url):
    """Return all URLs that curl makes of one with {a,b} in it."""
    parts = re.split(r"\{([^}]*)\}", url)
    choices = [part.split(",") if n % 2 else [part] for n, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is what the examples fetch their data with")
@pytest.mark.parametrize("config", [config for config in CONFIGS if "path" in data_of(config)], ids=lambda config: config.stem)
def test_the_first_line_of_an_example_fetches_its_data(config, tmp_path):
    """Runs the command itself, with a folder in place of the network."""
    (command,) = re.findall(r"curl .*$", config.read_text(encoding="utf-8").splitlines()[0])
    (url,) = re.findall(r"https://[^\s']+", command)
    for one in expanded(url):
        file = tmp_path / "network" / one.removeprefix("https://")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("text")
    command = command.replace("https://", f"file://{tmp_path}/network/")
    done = subprocess.run(["bash", "-ec", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    data = data_of(config)
    for path in (data["path"], data.get("validation_path", data["path"])):
        assert (tmp_path / path).exists(), f"{config.name} wants {path}, which {command} does not make"
    if (tmp_path / data["path"]).is_dir():  # pairs
        names = {f"{split}.{data[side]}.gz" for split in ("train", "val") for side in ("source", "target")}
        assert {file.name for file in (tmp_path / data["path"]).iterdir()} == names


def test_no_example_wants_a_file_that_nothing_fetches():
    for config in CONFIGS:
        text, data = config.read_text(encoding="utf-8"), data_of(config)
        assert f"examples/{config.name}" in text or f"examples/{config.stem}.py" in text, f"{config.name} does not say how it is run"
        assert "path" in data or "dataset" in data or "othing to fetch" in text
    for sweep in sorted((EXAMPLES.parent / "tune_configs").glob("*.yaml")):
        text = sweep.read_text(encoding="utf-8")
        base = yaml.safe_load(text).get("base")
        assert f"rayllp tune tune_configs/{sweep.name}" in text
        assert base is None or ("first line of the base" in text) == ("path" in data_of(sweep.parent / base))
