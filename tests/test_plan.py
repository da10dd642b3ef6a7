"""Predictions against schedules counted by hand."""

import pytest

from rayllp.config import make_config
from rayllp.control import Controller
from rayllp.plan import Costs, predict_step


def predicted(workers, costs, **mgrit):
    config = make_config(
        {
            "workers": workers,
            "mode": "parallel",
            "model": {"layers": 16},
            "buffers": {"open": 0, "close": 0},
            "mgrit": {"coarsening": 4, "iterations": {"forward": 1, "backward": 1}, **mgrit},
        }
    )
    return predict_step(config, Controller(config).accuracy, costs)


def test_one_worker_pays_every_evaluation():
    # Forward: 16 recorded steps, the 3 coarse ones among them; adjoint: 3 input gradients, 16 full ones.
    costs = Costs(forward=1.0, record=10.0, input_gradient=100.0, full_gradient=1000.0)
    assert predicted(1, costs) == pytest.approx(160 + 300 + 16000)
    # A second iteration takes 3 intervals' layers but their first ones without a graph, and the 2 coarse steps that changed; the adjoint's
    # relaxation shares none with its coarse steps, but the terms of its full approximation scheme are known.
    twice = {"iterations": {"forward": 2, "backward": 2}, "relaxation": {"fine": "F", "coarse": "F"}}
    assert predicted(1, costs, **twice) == pytest.approx(160 + 20 + 9 + 300 + 1200 + 200 + 16000)


def test_two_workers_halve_the_fine_sweeps_but_not_the_coarse_chain():
    # Forward: the second worker gets its first C-point after two coarse steps, then sweeps 8 layers while the first sweeps its own.
    # The coarse step that it owns comes first, and is one of the sweep's. Adjoint likewise, from the other end, where it is not.
    costs = Costs(forward=1.0, record=1.0, input_gradient=1.0, full_gradient=1.0)
    assert predicted(1, costs) == pytest.approx(35)
    assert predicted(2, costs) == pytest.approx(2 + 1 + 7 + 2 + 1 + 8)


def test_messages_and_serial_solves_count():
    costs = Costs(forward=1.0, record=1.0, input_gradient=1.0, full_gradient=1.0, message=0.5)
    assert predicted(2, costs) == pytest.approx(21 + 2 * 0.5)
    serial = {"levels": {"forward": 1, "backward": 1}}
    assert predicted(4, costs, **serial) == pytest.approx(32 + 6 * 0.5)
