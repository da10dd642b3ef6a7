"""The figures that the documents quote from an example, made by that example."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
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
