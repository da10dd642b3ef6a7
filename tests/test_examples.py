"""The figures that the documents quote from an example, made by that example."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

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
    """c_f = 4, L = 2, F-relaxation: state error after 1 and 2 forward iterations, gradient error at 1+1, 2+1, 2+2 (docs/method.md)."""
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
        result("serial", 64, 2.0, {"serial": 100}, lr=2e-3), result("adaptive", 64, 2.05, {"1+1": 99}, {"1+1 in parallel": 1}, lr=2e-3),
    ]  # fmt: skip
    found = {(row.way, row.middle): row for row in frontier.rows(results)}
    assert found["serial", 64].lr == 2e-3  # the better of two
    assert found["serial", 64].hours == pytest.approx(100 * 68 * 0.030 / 3600)
    adaptive = found["adaptive", 64]
    assert adaptive.gaps == pytest.approx([2.5])
    assert adaptive.kept == pytest.approx([75])
    assert 4.5 < adaptive.speedup < 5.67  # windows of eight on eight workers, messages, and a probe
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
