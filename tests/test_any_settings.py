"""Settings drawn at random are either refused with a message or train, and how the work is shared out does not change the losses.

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
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rayllp.channel import LocalChannel, run_workers
from rayllp.config import TrainConfig, kind_in, make_config, setting_names, to_yaml
from rayllp.config.parse import parse_yaml
from rayllp.control import Controller
from rayllp.engine import Engine, replica_sums, sharding
from rayllp.errors import RayllpError
from rayllp.models import build_architecture, check_muon, check_network
from tests.strict_channel import World
from tests.test_families import CASES, RandomBatches

STEPS = 3
TOLERANCE = {"float64": 1e-9, "float32": 2e-3, "bfloat16": math.inf}
"""Of losses, relative. AdamW makes a step of its full length of a gradient that is nothing but rounding; bfloat16 trains, and no more."""
MINUTES = float(os.environ.get("RAYLLP_FUZZ_MINUTES", "10"))
NAMES = {name for dotted in setting_names() for name in (dotted, dotted.split(".")[-1]) if len(name) > 4}  # not "at", "min", "name"


# Settings that look valid --------------------------------------------------------------------------------------------------------

OUT = object()
"""In place of a value: the setting is left out."""


def pick(*values):
    return st.sampled_from(values)


def maybe(*values):
    return pick(*[OUT] * len(values), *values)


def group(**settings):
    return st.fixed_dictionaries(settings).map(lambda found: {name: value for name, value in found.items() if value is not OUT})


TYPES = ("qwen3", "phi3", "gpt_neox", "olmo2")
"""Of transformers, beside the families."""
model = group(
    case=pick(*CASES, *[(kind, "causal") for kind in TYPES]), width=pick(8, 16), heads=pick(1, 2, 4), kv_heads=maybe(1, 2),
    dropout=maybe(0.1), tie_embeddings=maybe(True, False), feed_forward=maybe(12, 24), encoder_layers=maybe(1, 2, 5),
    label_smoothing=maybe(0.1), initialisation=maybe("default", "deep", "scaled"), patch_size=pick(2, 4, 4, 5),
)  # fmt: skip
mgrit = group(
    coarsening=pick(OUT, 2, 2, 3, 5, [2, 2], [3, 2]),
    levels=group(forward=pick(OUT, OUT, 1, 3), backward=pick(OUT, OUT, 1, 3)),
    iterations=group(forward=maybe(1, 2, 3), backward=maybe(1, 2, 3)),
    relaxation=group(fine=maybe("F", "FCF"), coarse=maybe("F", "FCF")), cycle=maybe("V", "F"), coarse_step_weight=maybe(0.0, 0.5),
    initial_guess=maybe("coarse", "constant"), tolerance=pick(*[OUT] * 4, 1e-2, 1e-8), batched=pick(*[OUT] * 3, True),
)  # fmt: skip
windows = group(length=pick(OUT, 2, 3, 5), sweeps=group(forward=maybe(1, 2, 3), backward=maybe(1, 2, 3)), fit=maybe(False))
adaptive = group(
    probe_every=pick(0, 1, 2), rule=maybe("convergence", "bias", "both"), threshold=maybe(0.4), bias_limit=maybe(1e-4),
    bias_to_noise=maybe(0.0), exact_every=maybe(1), lipschitz_every=pick(OUT, OUT, 1), return_below=maybe(None), patience=maybe(1),
    ladder=pick(*[OUT] * 3, ["1+1", "2+1"], ["0+1"], ["2+2 FCF"]), consistency=pick(OUT, OUT, 0.0, 0.3), smoothness=pick(*[OUT] * 4, 1e-2),
    steer=pick(*[OUT] * 3, True, False), switch_at=pick(*[OUT] * 3, 0, 2, 0.5, 1.0), late_bias_to_noise=maybe(0.0),
    late_from=pick(*[OUT] * 3, 0, 2, 0.5, 1.0),
)  # fmt: skip
optimizer = group(
    name=maybe("muon", "sgd", "adafactor"), lr=maybe(1e-2), muon_lr=maybe(1e-2), warmup=maybe(0, 2), weight_decay=maybe(0.0),
    clip=maybe(0.0),
    sharded=maybe(True), schedule=maybe("linear", "constant", "wsd"), ema=maybe(0.5), momentum=maybe(0.0),
)  # fmt: skip
mesh = group(
    data=pick(OUT, OUT, 1, 2, 3), layer=pick(*[OUT] * 4, 2), blocks=pick(*[OUT] * 6, [3, 4], [1, 5])
)  # fmt: skip
untouched = st.just({})
runs = group(
    model=model, middle=st.integers(2, 10), careful=pick(*[True] * 5, False),
    buffers=group(open=pick(0, 1, 2), close=pick(0, 1, 2)), solver=pick(OUT, "windows", "mgrit", "mgrit"), mgrit=mgrit | mgrit | untouched,
    windows=windows | untouched, recompute=maybe(False, True), adaptive=adaptive | adaptive | untouched,
    optimizer=optimizer, mesh=mesh, mode=maybe("parallel", "serial", "adaptive"), dtype=pick(*["float64"] * 6, *TOLERANCE),
    workers=pick(OUT, 1, 2, 2, 3, 4, {"min": 1, "max": 3}), step=group(middle=maybe("2/N", 0.1, 1.0), buffer=maybe(0.5)),
    batch_size=pick(1, 2, 2, 3), accumulate=maybe(2), microbatches=pick(OUT, OUT, 1, 2), seed=pick(0, 1),
    nested=pick(*[OUT] * 7, {"factors": [2], "at": [2]}),
)  # fmt: skip


def tidied(run):
    """Return the settings without obvious contradictions, which most random examples would have."""
    run = {**run, "model": dict(run["model"]), "optimizer": dict(run["optimizer"]), "mgrit": dict(run["mgrit"]), "mesh": dict(run["mesh"])}
    if run["model"]["heads"] % run["model"].get("kv_heads", 1):
        del run["model"]["kv_heads"]
    if run["optimizer"].get("name") != "muon":
        run["optimizer"].pop("muon_lr", None)
    if run.get("recompute"):
        run["mgrit"].pop("batched", None)
    run["windows" if run.get("solver") == "mgrit" else "mgrit"] = {}
    if run.get("adaptive", {}).get("probe_every") == 0:
        run["adaptive"] = {name: value for name, value in run["adaptive"].items() if name != "lipschitz_every"}
    if "blocks" in run["mesh"]:
        run["middle"], run["workers"] = sum(run["mesh"]["blocks"]), len(run["mesh"]["blocks"])
    run["batch_size"] *= run["mesh"].get("data", 1) * run.get("accumulate", 1) * run.get("microbatches", 1)
    if isinstance(run.get("workers"), dict):
        run["mesh"] = {}
    elif "workers" in run:
        run["workers"] = min(run["workers"], run["middle"]) * run["mesh"].get("data", 1)
        run["mesh"].pop("layer", None)
    return run


def config_of(run):
    run = tidied(run) if run["careful"] else run
    values = {name: value for name, value in run.items() if name not in ("middle", "careful")}
    (family, head), layers = run["model"]["case"], run["middle"] + sum(run["buffers"].values())
    kind = "architecture" if family in TYPES else "family"
    values["model"] = {**{n: v for n, v in run["model"].items() if n != "case"}, kind: family, "head": head, "layers": layers}
    return make_config({"steps": STEPS, "sequence_length": 10, **values})


# Training them -------------------------------------------------------------------------------------------------------------------


def data_of(config):
    return RandomBatches(config.model.family, "auto" if config.model.architecture else config.model.head)


@pytest.fixture(autouse=True, scope="module")
def small_messages():
    """Divide gradients of replicas into many buckets, and shares of parameters into many calls, as happens in large networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica_sums, "BUCKET_BYTES", 1024)
        patch.setattr(sharding, "CALL_NUMBERS", 256)
        yield


def accepted(run):
    """Return the settings and "", or None and why `rayllp train` refuses them before it starts a worker. Packages are not checked."""
    try:
        config = config_of(run)
        data = data_of(config)
        check_network(config, data.facts)
        check_muon(config, build_architecture(config, data.facts))
    except RayllpError as error:
        return None, str(error)
    return config, ""


def train(config, *, strictly=False):
    """Return the losses of the steps and of an evaluation at the end, by worker; the workers are threads.

    Args:
        strictly: their messages keep NCCL's rules.
    """
    data, layer = config.mesh.data, config.layer_workers
    world = World(data * layer)
    grid = torch.arange(data * layer).view(data, layer)
    join = world.group if strictly else lambda ranks: LocalChannel.group(len(ranks))
    layers, replicas = [join(ranks) for ranks in grid.tolist()], [join(ranks) for ranks in grid.T.tolist()]
    batches = data_of(config)

    def work(channel):
        replica, place = divmod(channel.rank, layer)
        ends = layers[replica][place], replicas[place][replica]
        try:
            engine = Engine(build_architecture(config, batches.facts), config, batches, *ends, torch.device("cpu"))
            controller = Controller(config)
            losses = [step_of(engine, controller, step) for step in range(STEPS)]
            losses.append(engine.evaluate(1)["loss"])
            for end in ends:
                end.finish()
        except BaseException as error:
            world.end(channel.rank, error)
            for end in ends:
                end.close()
            raise
        world.end(channel.rank)
        return losses

    return run_workers(data * layer, work)


def step_of(engine, controller, step):
    controller.begin(step)
    plan = controller.plan_probe(step)
    found = engine.train_step(step, controller.accuracy, plan)
    assert found.fault is None
    if plan is not None:
        controller.observe(step, found.findings)
    return found.loss


def changed(config, **changes):
    """Return the settings with these changes. Like `with_workers`, keep the values that were derived from the number of workers."""
    values = config.model_dump()
    values["adaptive"] |= {"consistency": config.consistency, "steer": config.steers} | changes.pop("adaptive", {})
    if config.solver == "windows":
        values["windows"]["length"] = values["windows"]["length"] or config.longest_window
    for group in ("mesh", "mgrit", "windows"):
        values[group] |= changes.pop(group, {})
    return TrainConfig.model_validate(values | changes)


ALONE = {"workers": 1, "mesh": {"data": 1, "layer": None, "blocks": None}, "mgrit": {"batched": False}, "recompute": False}


def alone(config):
    """Return the settings for one worker and the whole batch at once; None where a part of the batch decides how it is solved."""
    # Probes see the noise between halves of a part, and a tolerance is compared with a part's residual.
    by_parts = (config.mode == "adaptive" and config.adaptive.probe_every > 0) or config.mgrit.tolerance is not None
    if by_parts:
        return None if config.mesh.data > 1 else changed(config, **ALONE)
    return changed(config, **ALONE, accumulate=1, microbatches=None)


def enough(config):
    """Return settings with enough iterations for an exact solve, and those of exact training; None where nothing runs in parallel."""
    most = config.longest_window if config.solver == "windows" else len(config.coarse_lengths) + 1
    plain = {"dtype": "float64", "adaptive": {"consistency": 0.0, "smoothness": 0.0, "steer": None, "probe_every": 0, "ladder": None}}
    plain["adaptive"] |= {"lipschitz_every": 0, "switch_at": None}
    counts = {"forward": most, "backward": most}
    solve = {"windows": {"sweeps": counts}} if config.solver == "windows" else {"mgrit": {"iterations": counts, "tolerance": None}}
    try:
        return [changed(config, mode=mode, **solve, **plain) for mode in ("parallel", "serial")]
    except ValidationError:  # where all is exact, levels may be too coarse for anything else
        return None


def close(found, wanted, tolerance):
    return all(abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in zip(found, wanted, strict=True))


def try_out(run, outcomes):
    """Check that these settings are refused with a message, or train and keep all promises."""
    outcomes["tried"] += 1
    config, why = accepted(run)
    if config is None:
        outcomes["refused"] += 1
        assert any(name in why for name in NAMES), f"no setting is named: {why}"
        return
    assert config == TrainConfig.model_validate(parse_yaml(to_yaml(config), lambda path: kind_in(TrainConfig, path)))
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
    if config.world > 1 and run["model"]["heads"] == 1:  # a third of them
        outcomes["by NCCL's rules"] += 1
        assert close(train(config, strictly=True)[0], losses, TOLERANCE[config.dtype])
    both = enough(config) if run["model"]["width"] == 8 else None  # half of them
    if both is not None:
        outcomes["enough iterations"] += 1
        found, wanted = (train(each)[0] for each in both)
        assert close(found, wanted, 1e-8), (found, wanted)


CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
PHASES = [Phase.generate, Phase.shrink]  # the others trace every line that is run
PLAIN = settings(deadline=None, database=None, suppress_health_check=CHECKS, phases=PHASES)


@settings(PLAIN, max_examples=8, derandomize=True)
@given(runs)
def test_any_settings_are_refused_in_words_or_train(run):
    try_out(run, Counter())


@pytest.mark.study
def test_any_settings_for_long():
    outcomes, until = Counter(), time.monotonic() + 60 * MINUTES

    for number in count():
        if time.monotonic() > until:
            break

        @seed(number)
        @settings(PLAIN, max_examples=25)  # of more, many would be variations of one
        @given(runs)
        def try_more(run):
            try_out(run, outcomes)

        try_more()
        print(dict(outcomes), flush=True)
