"""TorchBraid's solver and ours side by side, with the same weights and input. Tests that need TorchBraid are skipped where it is missing.

The forward solves are the same algorithm, and so are the adjoint ones but for one difference: where the coarse adjoint steps are
linearised (docs/torchbraid.md).
"""

from importlib.util import find_spec
from itertools import product

import pytest
import torch

from rayllp.config import make_config
from rayllp.control import Controller
from rayllp.engine import gradients as gradients_module
from rayllp.engine.propagators import AdjointPropagator, record_graph
from rayllp.engine.torchbraid_solver import check_installed
from rayllp.errors import ChannelError, SettingsError
from rayllp.state import like, tensors
from tests.conftest import make_engine, merge, run_mpi_processes, tiny

installed = pytest.mark.skipif(find_spec("torchbraid") is None, reason="TorchBraid is not installed: see docs/torchbraid.md")
BASE = {
    "model": {"layers": 32}, "buffers": {"open": 0, "close": 0}, "dtype": "float32", "channel": "mpi", "step": {"middle": 1.0},
}  # fmt: skip
CLOSE = 1e-5
WAYS = [(c, L, k, relaxation) for c, L, k, relaxation in product((4, 8), (2, 3), (1, 2, 3), ("F", "FCF")) if c**L < 32 * 4]


def settings(workers, c, levels, iterations, relaxation, **changes):
    mgrit = {
        "coarsening": c, "levels": dict(zip(("forward", "backward"), levels, strict=True)), "relaxation": {"fine": relaxation},
        "iterations": dict(zip(("forward", "backward"), iterations, strict=True)),
    }  # fmt: skip
    return merge(BASE, {"workers": workers, "mgrit": mgrit, **changes})


def solved(channel, config):
    """Return the loss, the gradients, and the last input of each of this worker's layers."""
    engine = make_engine(config, channel)
    with engine.block.recorded_inputs() as states:
        loss = engine.gradients(engine.step_batch(3, Controller(config).chosen)).loss
    gradients = {name: p.grad.clone() for name, p in engine.block.parameters.items() if p.grad is not None}
    return float(loss), states, gradients


def apart(one, other, names):
    """Return the largest relative difference between tensors of two solutions."""
    return max((float((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-12)) for name in names), default=0.0)


def compare(world, ways):
    """Return for each set of settings the loss of both, and how far apart states at F-points and gradients are, on this worker."""
    found = []
    for way in ways:
        theirs = tiny(**way, solver="torchbraid")
        ours = tiny(**way, mesh={"blocks": theirs.blocks})
        channel = world.channel(0, 60.0)  # a channel remembers what messages come, of one run
        (loss, states, gradients), (its, others, grads) = solved(channel, ours), solved(channel, theirs)
        assert gradients.keys() == grads.keys()
        f_points = [n for n in states if n % ours.fine_coarsening]
        found.append((loss, its, apart(states, others, f_points), apart(gradients, grads, gradients)))
    return found


@installed
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_forward_solves_are_one_algorithm(workers):
    ways = [settings(workers, c, (L, L), (k, k), relaxation) for c, L, k, relaxation in WAYS]
    for found in run_mpi_processes(workers, compare, ways):
        for way, (loss, its, states, _) in zip(WAYS, found, strict=True):
            assert its == pytest.approx(loss, rel=CLOSE), way
            assert states < CLOSE, way


@installed
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_adjoint_solves_are_one_algorithm(workers):
    ways = [settings(workers, c, (1, L), (1, k), relaxation) for c, L, k, relaxation in WAYS]
    for found in run_mpi_processes(workers, compare, ways):
        for way, (_, _, _, gradients) in zip(WAYS, found, strict=True):
            assert gradients < CLOSE, way


class Theirs(AdjointPropagator):
    """Linearises coarse adjoint steps where TorchBraid does, at C-points after the last sweep; for one worker and one adjoint iteration."""

    def step(self, layer, state):
        if layer == 0:
            return super().step(layer, state)
        graph, _ = record_graph(self.forward.bound, layer, like(state, self.forward.graphs[layer - 1].outputs))
        return like(state, torch.autograd.grad(graph.outputs, graph.inputs, tensors(state)))


def compare_linearised(world, ways):
    before = [gradients for *_, gradients in compare(world, ways)]
    gradients_module.AdjointPropagator = Theirs
    return list(zip(before, (gradients for *_, gradients in compare(world, ways)), strict=True))


@installed
def test_what_makes_the_gradients_differ_is_where_coarse_adjoint_steps_are_linearised():
    ways = [settings(1, c, (2, 2), (k, 1), relaxation) for c, L, k, relaxation in WAYS if L == 2]
    found = run_mpi_processes(1, compare_linearised, ways)[0]
    assert all(after < CLOSE for _, after in found)
    assert found[0][0] > 0.01  # at one forward iteration it is no trifle


def train_both(world, config, other):
    channel, found = world.channel(0, 60.0), []
    for each in (config, other):
        engine, controller = make_engine(each, channel), Controller(each)
        found.append([engine.train_step(step, controller.chosen).loss for step in range(5)])
    return found


@installed
def test_training_with_dropout_buffers_and_accumulation():
    changes = {"buffers": {"open": 2, "close": 2}, "model": {"layers": 20, "dropout": 0.1}, "accumulate": 2, "mgrit": {"coarsening": 4}}
    theirs = tiny(**merge(settings(2, 4, (2, 2), (1, 2), "FCF"), changes), solver="torchbraid")
    ours = tiny(**merge(settings(2, 4, (1, 2), (1, 2), "FCF"), changes), mesh={"blocks": theirs.blocks})
    exact = tiny(**merge(settings(2, 4, (1, 2), (1, 2), "FCF"), changes), solver="torchbraid")
    for losses, others in run_mpi_processes(2, train_both, ours, exact):
        assert others == pytest.approx(losses, rel=CLOSE)


def broken(world, config):
    engine = make_engine(config, world.channel(0, 60.0))
    engine.block.layers[engine.block.indices[3]].forward = None  # cannot be called
    with pytest.raises(ChannelError) as caught:
        engine.train_step(0, Controller(config).chosen)
    return str(caught.value)


@installed
def test_an_exception_that_torchbraid_swallows_is_raised():
    config = tiny(**settings(1, 4, (2, 2), (1, 1), "F"), solver="torchbraid")
    assert "TorchBraid's forward solve failed: TypeError" in run_mpi_processes(1, broken, config)[0]


# Without it -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("torchbraid") is not None, reason="TorchBraid is installed here")
def test_where_it_is_missing_a_run_is_refused_with_advice():
    with pytest.raises(SettingsError, match=r"solver: torchbraid, but there is no such module here: install TorchBraid as its README says"):
        check_installed(tiny(**BASE, solver="torchbraid"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel": "gloo"}, "talks by MPI alone: set channel: mpi"),
        ({"mode": "adaptive"}, "has no controller: set mode: parallel"),
        ({"workers": 3}, "wants middle layers in equal blocks of at least 2, and 32 on 3 workers are not"),
        ({"workers": {"min": 1, "max": 2}}, "decides itself which worker has which layers"),
        ({"dtype": "float64"}, "sends float32 alone: set dtype: float32"),
        ({"mgrit": {"cycle": "F"}}, "has V-cycles alone"),
        ({"mgrit": {"coarse_step_weight": 0.5}}, "has one coarse operator"),
        ({"mgrit": {"coarsening": [4, 2]}}, r"keeps layers by one coarsening factor, not \(4, 2\)"),
        ({"mgrit": {"tolerance": 1e-3}}, "has no tolerance here"),
        ({"recompute": True}, "keeps every graph"),
        ({"adaptive": {"probe_every": 5}}, "measures no convergence factor for probes: set adaptive.probe_every: 0"),
        ({"adaptive": {"consistency": 0.3}}, "knows no consistency penalty"),
    ],
)
def test_what_torchbraid_cannot_do_is_refused_before_anything_starts(changes, message):
    base = merge({"mode": "parallel", "workers": 2, "solver": "torchbraid", "adaptive": {"probe_every": 0}}, BASE)
    with pytest.raises(SettingsError, match=message):
        make_config(merge(base, changes))


def test_layers_are_shared_out_as_torchbraid_does():
    assert tiny(**settings(4, 4, (2, 2), (1, 1), "F"), solver="torchbraid").blocks == (9, 8, 8, 7)
    assert tiny(**settings(1, 4, (2, 2), (1, 1), "F"), solver="torchbraid").blocks == (32,)
