"""Any settings are refused in words or train, and how the work is shared out does not change the losses.

A few seconds of it belong to the suite. For longer:

    RAYLLP_FUZZ_MINUTES=30 make test ARGS="-m study tests/test_any_settings.py -n 0 -s"
"""

import math
import os
import time
from collections import Counter
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st

from rayllp.channel import LocalChannel, run_workers
from rayllp.config import TrainConfig, kind_in, make_config, setting_names, to_yaml
from rayllp.config.parse import parse_yaml
from rayllp.control import Controller, Probe
from rayllp.engine import Engine
from rayllp.errors import RayllpError
from rayllp.models import build_architecture, check_muon, check_network
from tests.test_families import CASES, RandomBatches

STEPS = 3
TOLERANCE = {"float64": 1e-9, "float32": 2e-3, "bfloat16": math.inf}
"""Of losses, relative. AdamW makes a step of its full length of a gradient that is nothing but rounding; bfloat16 trains, and no more."""
MINUTES = float(os.environ.get("RAYLLP_FUZZ_MINUTES", "10"))
NAMES = {part for name in setting_names() for part in (name, name.split(".")[-1])}


# Settings that look valid --------------------------------------------------------------------------------------------------------


def group(required=None, **optional):
    """A group of settings, each there or left out."""
    return st.fixed_dictionaries(required or {}, optional=optional)


def pick(*values):
    return st.sampled_from(values)


def directions(*values):
    return group(forward=pick(*values), backward=pick(*values))


model = group(
    {"layers": st.integers(3, 14), "width": pick(8, 16), "heads": pick(1, 2, 4), "case": pick(*CASES)},
    kv_heads=pick(1, 2), dropout=pick(0.0, 0.1), tie_embeddings=st.booleans(), feed_forward=pick(12, 24), encoder_layers=st.integers(1, 8),
    label_smoothing=pick(0.0, 0.1), initialisation=pick("default", "deep", "scaled"), patch_size=pick(2, 4, 5),
)  # fmt: skip
mgrit = group(
    coarsening=st.integers(2, 5) | st.lists(st.integers(2, 3), min_size=1, max_size=2), levels=directions(1, 2, 2, 3),
    iterations=directions(1, 2, 3), window=st.integers(1, 5), relaxation=group(fine=pick("F", "FCF"), coarse=pick("F", "FCF")),
    cycle=pick("V", "F"), coarse_step_weight=pick(0.0, 0.5, 1.0), initial_guess=pick("coarse", "constant"), tolerance=pick(1e-2, 1e-8),
    batched=st.booleans(), recompute=st.booleans(),
)  # fmt: skip
adaptive = group(
    {"probe_every": pick(0, 1, 2)}, rule=pick("convergence", "bias", "both"), threshold=pick(0.4, 1.0), bias_limit=pick(1e-4, 0.1),
    bias_to_noise=pick(0.0, 0.4), exact_every=pick(0, 1), lipschitz_every=pick(0, 1), return_below=pick(None, 0.3), patience=pick(1, 3),
    ladder=st.lists(pick("1+1", "2+1", "0+1", "2+2 FCF"), min_size=1, max_size=2), consistency=pick(0.0, 0.3), smoothness=pick(0.0, 1e-2),
    steer=st.booleans(), switch_at=pick(0, 2, 0.5, 1.0),
)  # fmt: skip
optimizer = group(
    name=pick("adamw", "muon"), lr=pick(1e-3, 1e-2), muon_lr=pick(1e-2), warmup=pick(0, 2), weight_decay=pick(0.0, 0.1), clip=pick(0.0, 1.0)
)
mesh = group(
    data=pick(1, 1, 2), layer=st.integers(1, 4), blocks=st.lists(st.integers(1, 6), min_size=1, max_size=3), placement=pick("blocks", "cyclic")
)
nested = pick({}, {}, {}, {"factors": [2], "at": [2]})
runs = group(
    {"model": model, "buffers": group(open=st.integers(0, 2), close=st.integers(0, 2)), "dtype": pick(*["float64"] * 6, *TOLERANCE)},
    step=group(middle=pick("1/N", "2/N", 0.1, 0.5, 1.0), buffer=pick(0.5, 1.0)), mgrit=mgrit, adaptive=adaptive, optimizer=optimizer,
    mode=pick("parallel", "serial", "adaptive"), workers=st.integers(1, 5) | group(min=pick(1, 2), max=pick(2, 4)), mesh=mesh | st.just({}),
    batch_size=pick(1, 2, 4, 6), accumulate=pick(1, 2), microbatches=pick(1, 2, 4), seed=pick(0, 1), nested=nested,
)  # fmt: skip


def config_of(run):
    (family, head), values = run["model"]["case"], {name: value for name, value in run["model"].items() if name != "case"}
    return make_config({"steps": STEPS, "sequence_length": 10, **run, "model": {**values, "family": family, "head": head}})


# Training them -------------------------------------------------------------------------------------------------------------------


def data_of(config):
    return RandomBatches(config.model.family, config.model.head)


def check(config):
    """What `rayllp train` refuses before it starts a worker, but for data and what is installed."""
    data = data_of(config)
    check_network(config, data.facts)
    check_muon(config, build_architecture(config, data.facts))


def train(config):
    """Losses of the steps, and of an evaluation at the end, of all workers; they are threads."""
    data, layer = config.mesh.data, config.layer_workers
    layers, replicas = [LocalChannel.group(layer) for _ in range(data)], [LocalChannel.group(data) for _ in range(layer)]
    batches = data_of(config)

    def work(channel):
        replica, place = divmod(channel.rank, layer)
        ends = layers[replica][place], replicas[place][replica]
        try:
            architecture = build_architecture(config, batches.facts)
            engine, controller = Engine(architecture, config, batches, *ends, torch.device("cpu")), Controller(config)
            losses = [step_of(engine, controller, step) for step in range(STEPS)]
            return [*losses, engine.evaluate(1)["loss"]]
        except BaseException:
            for end in ends:
                end.close()
            raise

    return run_workers(data * layer, work)


def step_of(engine, controller, step):
    controller.begin(step)
    plan = controller.probe(step)
    found = engine.train_step(step, controller.accuracy, plan)
    assert found.fault is None
    if plan is not None:
        bias, noise = (None, None) if found.bias is None else (found.bias.relative, found.bias.noise)
        controller.observe(step, Probe(rho_forward=found.rho_forward, rho_backward=found.rho_backward, bias=bias, noise=noise))
    return found.loss


def changed(config, **changes):
    """The same settings with others, as `with_workers` keeps what follows from their number."""
    values = config.model_dump()
    values["adaptive"] |= {"consistency": config.consistency, "steer": config.steers} | changes.pop("adaptive", {})
    values["mgrit"] |= {"window": config.window if config.placement == "cyclic" else None} | changes.pop("mgrit", {})
    values["mesh"] |= {"placement": config.placement} | changes.pop("mesh", {})
    return TrainConfig.model_validate(values | changes)


ALONE = {"workers": 1, "mesh": {"data": 1, "layer": None, "blocks": None}, "mgrit": {"recompute": False, "batched": False}}


def alone(config):
    """On one worker, in one piece, by the plainest way; None where a part of the batch decides how it is solved."""
    # Probes see the noise between halves of a part, and a tolerance is compared with a part's residual.
    by_parts = (config.mode == "adaptive" and config.adaptive.probe_every > 0) or config.mgrit.tolerance is not None
    if by_parts:
        return None if config.mesh.data > 1 else changed(config, **ALONE)
    return changed(config, **ALONE, accumulate=1, microbatches=None)


def enough(config):
    """As many iterations as make the solve exact, and the exact training that it then is."""
    most = config.window if config.placement == "cyclic" else len(config.coarse_lengths) + 1
    plain = {"dtype": "float64", "adaptive": {"consistency": 0.0, "smoothness": 0.0, "steer": None, "probe_every": 0, "ladder": None}}
    plain["adaptive"] |= {"lipschitz_every": 0, "switch_at": None}
    solve = {"iterations": {"forward": most, "backward": most}, "tolerance": None}
    return changed(config, mode="parallel", mgrit=solve, **plain), changed(config, mode="serial", mgrit=solve, **plain)


def close(found, wanted, tolerance):
    return all(abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in zip(found, wanted, strict=True))


def try_out(run, outcomes):
    """Refused in words, or trained, with all that is promised of it."""
    outcomes["tried"] += 1
    try:
        config = config_of(run)
        assert config == TrainConfig.model_validate(parse_yaml(to_yaml(config), lambda path: kind_in(TrainConfig, path)))
        check(config)
    except RayllpError as error:
        outcomes["refused"] += 1
        assert any(name in str(error) for name in NAMES), f"no setting is named: {error}"
        return
    if config.nested.factors:  # the driver's; the engine sees networks of one depth
        return
    note(to_yaml(config))
    outcomes["trained"] += 1
    everyone = train(config)
    losses = everyone[0]
    assert all(math.isfinite(loss) for loss in losses), losses
    assert all(other == losses for other in everyone), everyone
    other = alone(config)
    if other is not None:
        outcomes["compared with one worker"] += 1
        wanted = train(other)[0]
        assert close(losses, wanted, TOLERANCE[config.dtype]), (losses, wanted)
    if run.get("seed"):
        outcomes["enough iterations"] += 1
        found, wanted = (train(each)[0] for each in enough(config))
        assert close(found, wanted, 1e-8), (found, wanted)


CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)
@given(runs)
def test_any_settings_are_refused_in_words_or_train(run):
    try_out(run, Counter())


@pytest.mark.study
def test_any_settings_for_long():
    outcomes, until = Counter(), time.monotonic() + 60 * MINUTES
    for number in count():
        if time.monotonic() > until:
            break
        seed(number)(settings(max_examples=100, deadline=None, database=None, suppress_health_check=CHECKS)(given(runs)(
            lambda run: try_out(run, outcomes)
        )))()  # fmt: skip
        print(dict(outcomes), flush=True)
