"""Predicted step times compared with schedules counted by hand."""

import time
from dataclasses import replace
from itertools import islice
from random import Random

import pytest

from rayllp.config import make_config
from rayllp.control import Controller
from rayllp.errors import SettingsError
from rayllp.mgrit import SolverOptions, build_hierarchy, split_evenly
from rayllp.mgrit.windows import Windows
from rayllp.plan import Costs, predict, predict_step, recording


def config_of(workers, **mgrit):
    return make_config(
        {
            "workers": workers,
            "mode": "parallel",
            "solver": "mgrit",
            "model": {"layers": 16},
            "buffers": {"open": 0, "close": 0},
            "mgrit": {"coarsening": 4, "iterations": {"forward": 1, "backward": 1}, **mgrit},
        }
    )


def predicted(workers, costs, **mgrit):
    config = config_of(workers, **mgrit)
    return predict_step(config, Controller(config).chosen, costs)


def test_one_worker_pays_every_evaluation():
    # Forward: 16 recorded steps, the 3 coarse ones among them; adjoint: 3 input gradients, 16 full ones.
    costs = Costs(forward=1.0, record=10.0, input_gradient=100.0, full_gradient=1000.0)
    assert predicted(1, costs) == pytest.approx(160 + 300 + 16000)
    # A second iteration takes 3 intervals' layers but their first ones without a graph, and the 2 coarse steps that changed; the adjoint's
    # relaxation shares none with its coarse steps, but the terms of its full approximation scheme are known.
    twice = {"iterations": {"forward": 2, "backward": 2}, "relaxation": {"fine": "F", "coarse": "F"}}
    assert predicted(1, costs, **twice) == pytest.approx(160 + 20 + 9 + 300 + 1200 + 200 + 16000)


def test_two_workers_halve_the_fine_sweeps_but_not_the_coarse_chain():
    # Forward: the second worker gets its first C-point after two coarse steps, takes the one that it owns, and the last interval. The
    # other one, whose first layer is that coarse step, it puts off until it has taken its two coarse steps of the adjoint.
    costs = Costs(forward=1.0, record=1.0, input_gradient=1.0, full_gradient=1.0)
    assert predicted(1, costs) == pytest.approx(35)
    assert predicted(2, costs) == pytest.approx(2 + 1 + 4 + 2 + 3 + 8)
    # Where gradients cost more, the first worker is the last: after the adjoint's whole coarse chain. It has swept its layers by then.
    assert predicted(4, replace(costs, input_gradient=2.0)) == pytest.approx(3 + 4 + 3 * 2 + 4)


def test_what_was_put_off_is_done_while_waiting_or_when_it_is_wanted():
    costs = Costs(forward=1.0, record=1.0, input_gradient=1.0, full_gradient=1.0)
    config = config_of(2)
    first, second = predict(config, Controller(config).chosen, costs).spans
    assert [(s.layer, s.begin) for s in first if s.solve == "forward" and s.phase == "last sweep"] == [
        (1, 2), (2, 3), (3, 4), (5, 5), (6, 6), (7, 7),
    ]  # fmt: skip
    assert [(s.kind, s.begin, s.end) for s in first if s.solve == "adjoint"][:2] == [("wait", 8, 9), ("compute", 9, 10)]
    put_off = [(s.solve, s.layer, s.begin) for s in second if s.begin >= 7]
    assert put_off[:6] == [
        ("adjoint", 12, 7), ("adjoint", 8, 8), ("forward", 9, 9), ("forward", 10, 10), ("forward", 11, 11), ("adjoint", 11, 12),
    ]  # fmt: skip


def test_messages_and_serial_solves_count():
    costs = Costs(forward=1.0, record=1.0, input_gradient=1.0, full_gradient=1.0, message=0.5)
    assert predicted(2, costs) == pytest.approx(20 + 0.5)
    assert predicted(4, costs) == pytest.approx(3 + 4 + 3 + 4 + 6 * 0.5)
    serial = {"levels": {"forward": 1, "backward": 1}}
    assert predicted(4, costs, **serial) == pytest.approx(32 + 6 * 0.5)


def hierarchies():
    """Yield hierarchies with blocks of all kinds, workers without layers or C-points, and short last intervals."""
    random = Random(0)
    yield build_hierarchy(blocks=(4,) * 32, levels=3, coarsening=4)
    while True:
        workers = random.randint(1, 24)
        blocks = random.choice([split_evenly(random.randint(workers, 90), workers), [random.randint(0, 7) for _ in range(workers)]])
        try:
            yield build_hierarchy(blocks=blocks, levels=random.randint(1, 4), coarsening=[random.randint(2, 6) for _ in range(3)])
        except SettingsError:  # too few layers for so many levels
            continue


@pytest.mark.parametrize("name", ["forward", "adjoint"])
def test_workers_that_are_alike_do_alike(name, monkeypatch):
    random, saved = Random(1), 0
    for forward in islice(hierarchies(), 60):
        hierarchy = forward if name == "forward" else forward.adjoint()
        options = SolverOptions(
            iterations=random.randint(1, 3), relaxation=(random.choice(["F", "FCF"]), random.choice(["F", "FCF"])),
            cycle=random.choice("VF"), initial_guess=random.choice(["coarse", "constant"]), coarse_step_weight=random.choice([0.0, 1.0]),
        )  # fmt: skip
        c_points = frozenset(range(0, forward.levels[0].size, random.choice([2, 4])))
        arguments = hierarchy, options, max(hierarchy.levels[0].owners) + 1, name, c_points
        found = recording._record_cycles.__wrapped__(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(recording._Alike, "signature", lambda _, rank, first: rank)
            assert found == recording._record_cycles.__wrapped__(*arguments)
        saved += len(found.workers) - len({id(work) for work in found.workers})
    assert saved > 150


def cyclic(workers, layers, costs, windows=(), microbatches=1):
    """Return the predicted seconds of a step by windows with 1+1 sweeps, or of an exact step with layers in turn."""
    config = make_config(
        {
            "workers": workers,
            "mode": "parallel",
            "solver": "windows",
            "model": {"layers": layers},
            "buffers": {"open": 0, "close": 0},
        }
    )
    accuracy = replace(Controller(config).chosen, windows=Windows.alike(windows), serial=not windows)
    return predict_step(config, accuracy, costs, microbatches=microbatches)


SLOW_MESSAGES = Costs(forward=1.0, record=1.0, input_gradient=1.0, full_gradient=2.0, message=0.5)


def test_windows_that_are_longer_than_there_are_workers_gather_once_a_layer():
    # A broadcast, two layers each and two gathers; back the same with gradients.
    assert cyclic(2, 4, SLOW_MESSAGES, (4,)) == pytest.approx((0.5 + 2 + 2 * 0.5) + (0.5 + 4 + 2 * 0.5))
    # Where sums in pieces are faster: an all-reduce for the first layer, half of one for the next.
    in_pieces = replace(SLOW_MESSAGES, all_gather=0.5, all_reduce=0.4)
    assert cyclic(2, 4, in_pieces, (4,)) == pytest.approx((0.5 + 2 + 0.6) + (0.5 + 4 + 0.6))


def test_a_chain_waits_for_the_messages_of_the_others_alone():
    # Forward to the second worker; back from it, which forms its parameters' gradient after its message; the first forms its own at once,
    # and the last state goes to all.
    assert cyclic(2, 2, SLOW_MESSAGES, (1, 1)) == pytest.approx((1 + 0.5 + 1) + (1 + 0.5 + 2 + 0.5))


def test_a_rolling_window_takes_its_sweeps_and_the_gradients_of_its_parameters():
    config = make_config({"workers": 4, "model": {"layers": 12}, "mode": "adaptive"})
    accuracy = Controller(config).chosen
    assert accuracy.tolerance
    costs = replace(SLOW_MESSAGES, all_gather=0.25)
    for forward, backward in ((3, 3), (5, 4), (12, 12)):
        # Messages: two broadcasts, and a gather each sweep. The last layers leave workers idle, which then form gradients.
        step_s = predict_step(config, accuracy, costs, sweeps=(forward, backward))
        least = 2 * 0.5 + (forward + backward) * 1.25
        assert least < step_s <= least + 3
    assert predict_step(config, accuracy, costs) == predict_step(config, accuracy, costs, sweeps=(3, 3))  # as few as there can be
    free = replace(SLOW_MESSAGES, message=0.0)
    assert predict_step(config, accuracy, free, sweeps=(3, 3)) == pytest.approx(3 + 3 + 3)
    # Two broadcasts, forward and adjoint with a gather each sweep, which in the last two lasts while a layer's gradients are formed.
    assert predict_step(config, accuracy, costs, sweeps=(3, 3)) == pytest.approx(2 * 0.5 + 3 * 1.25 + 1.25 + 2 + 2 + 1)
    # In pieces, half of the exchange and a few numbers come before that.
    pieces = replace(costs, all_gather=1.0, all_reduce=0.2, few_numbers=0.05)
    assert predict_step(config, accuracy, pieces, sweeps=(3, 3)) == pytest.approx(2 * 0.5 + 3 * 1.25 + 1.25 + 2.15 + 2.15 + 1)


def test_sums_are_done_as_in_training_whether_or_not_the_other_way_is_faster():
    config = make_config({"workers": 4, "model": {"layers": 12}, "mode": "adaptive"})
    accuracy = Controller(config).chosen
    times = {}
    for in_pieces in (None, True, False):
        costs = replace(SLOW_MESSAGES, all_gather=1.0, all_reduce=0.2, in_pieces=in_pieces)
        times[in_pieces] = predict_step(config, accuracy, costs)
    assert times[None] == times[True] < times[False]


def test_exact_steps_with_layers_in_turn():
    # A whole batch: each worker forms the gradients that it has put off while it waits, but for those of its last layer.
    assert cyclic(2, 4, replace(SLOW_MESSAGES, message=0.0)) == pytest.approx(4 + 4 + 1)
    # As many microbatches as workers: these are busy but for messages, of which each round has two.
    assert cyclic(2, 4, SLOW_MESSAGES, microbatches=2) == pytest.approx(18)
    assert cyclic(1, 4, SLOW_MESSAGES, microbatches=3) == pytest.approx(3 * 4 * 3)


def test_workers_that_are_alike_with_layers_in_turn_do_alike(monkeypatch):
    random, saved, of_all = Random(2), 0, recording._of_all
    for _ in range(40):
        workers = random.randint(1, 9)
        windows = tuple(random.choice([1, 1, 2, 3, workers, 2 * workers]) for _ in range(random.randint(1, 8)))
        layers = max(sum(windows), workers)
        windows += (1,) * (layers - sum(windows))
        for record, arguments in (
            (
                recording._record_windows,
                (layers, workers, windows, (random.randint(1, 3),) * len(windows), random.choice(["forward", "adjoint"])),
            ),
            (recording.in_order_schedule, (layers, workers, random.randint(1, 10))),
        ):
            found = record.__wrapped__(*arguments)
            with monkeypatch.context() as patch:
                patch.setattr(recording, "_of_all", lambda record, first, signatures: of_all(record, first, range(len(signatures))))
                assert found == record.__wrapped__(*arguments)
            saved += len(found.workers) - len({id(work) for work in found.workers})
    assert saved > 50


def test_thousands_of_workers_take_seconds():
    config = make_config(
        {"model": {"layers": 4096}, "workers": 4096, "mode": "parallel", "solver": "mgrit", "buffers": {"open": 0, "close": 0}}
    )
    costs = Costs(forward=1.0, record=1.0, input_gradient=1.0, full_gradient=2.0, message=0.1)
    started = time.process_time()
    step_s = predict_step(config, Controller(config).chosen, costs)
    assert time.process_time() - started < 10
    assert 2 * 1023 + 7 < step_s < 2 * 1023 * 1.1 + 20  # two coarse chains, and a message each
