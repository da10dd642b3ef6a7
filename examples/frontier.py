"""Time of a whole training against the loss it ends at: what depth is worth, and how much of it a faster way of training keeps.

    python examples/frontier.py run --data DATA --results docs/frontier.json [--tasks …] [--ways …] [--seeds …] [--jobs 2]
    python examples/frontier.py report --results docs/frontier.json --docs docs

`run` trains what RESULTS does not have yet, each run in one process on one core: which solve a step takes does not depend on how many
workers share the layers (tests/test_window_engine.py), only the time does. That is accounted afterwards: every step by the time that the
planner predicts for its solve on 8 or 16 workers whose layers take LAYER_MS forward and for each half of the
gradient, of a batch that cannot be split; probes count with all gradients that they form. Losses are those of the exact forward.

DATA holds tinyshakespeare/input.txt.gz; the teacher's task makes its own (examples/deep_teacher.py).
"""

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rayllp.config import TrainConfig, load_config
from rayllp.control import Accuracy, Controller
from rayllp.control.ladder import Ladder
from rayllp.control.records import ROLLING
from rayllp.engine import Engine
from rayllp.mgrit.windows import Windows
from rayllp.plan import Costs, predict_step

HERE = Path(__file__).parent
LAYER_MS, MESSAGE_MS = 10.0, 0.2
COSTS = Costs(
    forward=LAYER_MS, record=LAYER_MS, input_gradient=LAYER_MS, full_gradient=2 * LAYER_MS, message=MESSAGE_MS
)  # fmt: skip
STEPS = 2000
SHAKESPEARE = {"data.path": "tinyshakespeare/input.txt.gz"}
COUPLINGS = "couplings"
"""Name by which an earlier version counted probes that measured couplings, too."""


@dataclass(frozen=True)
class Way:
    """How a network is trained.

    Attributes:
        workers: that it is meant for. 1: exact training on one device.
        rungs: of the ladder; none: the default, a rolling window.
        interval: layers from one C-point to the next, by MGRIT of two levels; 0: windows of as many layers as there are workers.
        settings: besides.
    """

    workers: int
    rungs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    interval: int = 0

    def overrides(self) -> list[str]:
        """Settings of one process that solves as so many workers do."""
        if self.workers == 1:
            return ["mode=adaptive", "adaptive.switch_at=0", *self.settings]
        intervals = ["solver=mgrit", f"mgrit.coarsening={self.interval}"]
        windows = [f"windows.length={self.workers}"]
        ladder = [f"adaptive.ladder=[{','.join(self.rungs)}]"] if self.rungs else []
        return ["mode=adaptive", *ladder, *(intervals if self.interval else windows), *self.settings]


LADDER = ("1+1", "2+1", "2+2", "3+3")
"""Rungs for windows of equal length, as they were the default at first; results by them are of a version that also cut windows in two where
layers depended strongly on each other. Results called "fitted" are of a later one, which fitted lengths and sweeps of windows to how
strongly layers depend on each other, as probes measured it.
"""
FIXED = ("adaptive.bias_to_noise=1e9", "adaptive.late_from=1.0", "adaptive.probe_every=500")
TAILS = (0.8, 0.9, 0.95, 0.98, 1.0)


def tail(share: float) -> str:
    return f"1+1, exact from {share:g}"


def ablation(rung: str, *settings: str) -> Way:
    """One solve by intervals of four layers throughout, whatever probes say."""
    return Way(4, (rung,), (*FIXED, "adaptive.exact_every=1", "adaptive.switch_at=1.0", "adaptive.consistency=0", *settings), interval=4)


PAPER = (
    "adaptive.rule=convergence",
    "adaptive.return_below=null",
    "adaptive.switch_at=1.0",
    "adaptive.probe_every=50",
)
INTERVALS = {
    "intervals of 2": Way(8, ("1+1", "2+1", "2+2"), interval=2),
    "the paper's switch": Way(8, ("1+1",), PAPER, interval=4),
    "1+1": ablation("1+1"),
    "1+1, μ = 1": ablation("1+1", "adaptive.consistency=1"),
    "1+1, μ = 10": ablation("1+1", "adaptive.consistency=10"),
    "1+1, smoothness 1e-4": ablation("1+1", "adaptive.smoothness=1e-4"),
    "1+1, ω = 0.5": ablation("1+1", "mgrit.coarse_step_weight=0.5"),
    "2+2": ablation("2+2"),
    "2+2, μ = 1": ablation("2+2", "adaptive.consistency=1"),
    "2+2, FCF": ablation("2+2", "mgrit.relaxation.fine=FCF"),
}
"""Ways by MGRIT. All but the first two take one solve throughout, and change one thing at a time."""
LATE = {
    f"1+1, 2+2 from 0.8, exact from {share:g}": Way(8, ("2+2", "1+1"), (*FIXED, f"adaptive.switch_at={share}"))
    for share in (0.9, 0.95, 1.0)
}
"""Ways that go on from a state of 1+1 (`tails`) with a more accurate solve. The ladder begins with it, and nothing moves along it."""
EXACT = {
    "serial": Way(1),
    "serial, perturbed": Way(1, settings=("optimizer.weight_decay=0.1000001",)),
    "serial, two halves": Way(1, settings=("accumulate=2",)),
}
"""Exact training, and the same again but for rounding: how far apart do two runs end that should be equal?"""
EARLIER = {"fitted": Way(8), "fitted 16": Way(16)}
"""Results of an earlier version of the default, which today's code cannot repeat (see `LADDER`)."""
LESS, MORE = ("adaptive.bias_to_noise=0.2", "adaptive.late_bias_to_noise=0.2"), ("adaptive.bias_to_noise=0.6",)
WAYS = {
    **EXACT,
    "adaptive": Way(8),
    "adaptive 16": Way(16),
    **EARLIER,
    "adaptive, less bias": Way(8, settings=LESS),
    "adaptive, more bias": Way(8, settings=MORE),
    "ladder": Way(8, LADDER),
    "ladder 16": Way(16, LADDER),
    **{tail(share): Way(8, ("1+1",), (*FIXED, f"adaptive.switch_at={share}")) for share in TAILS},
    **LATE,
    **INTERVALS,
}


@dataclass(frozen=True)
class Task:
    """A config of this folder, the files it reads below DATA, and networks of how many middle layers are trained on it.

    Attributes:
        middle: N, and the depths it is compared with; the last one is N.
        settings: for all of its runs.
        seeds: of its runs.
        rates: learning rates, the same for every depth and way.
        steps: of each run.
        buffers: layers outside the middle.
        module: in this folder, whose `student` and `Lessons` are trained; none: what the config names.
        ways: that it is trained by.
        evaluated: the final loss is over so many times 8 held-out samples; 0: over all of them.
    """

    title: str
    config: str
    files: dict[str, str]
    middle: tuple[int, ...]
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)
    steps: int = STEPS
    buffers: int = 4
    module: str | None = None
    ways: tuple[str, ...] = ("serial", "adaptive", "adaptive 16")
    evaluated: int = 0


NARROW_TRANSLATION = (
    "model.width=32",
    "model.heads=2",
    "model.feed_forward=64",
    "optimizer.name=muon",
    "optimizer.min_lr_ratio=0",
    "optimizer.warmup=60",
)

TASKS = {
    "narrow": Task(
        "GPT-2 of width 16, Shakespeare, 2 + N + 2 layers, Δt = 1/N, by Muon",
        "gpt2_shakespeare",
        SHAKESPEARE,
        (4, 16, 64),
        ("model.width=16", "model.heads=2", "optimizer.name=muon", "optimizer.min_lr_ratio=0"),
        seeds=(0, 1, 2, 3),
        rates=(1e-2, 2e-2, 4e-2),
    ),
    "shakespeare": Task(
        "GPT-2 of width 64, Shakespeare, 2 + N + 2 layers, Δt = 1/N, by AdamW",
        "gpt2_shakespeare",
        SHAKESPEARE,
        (4, 8, 16, 32, 64),
        seeds=(0, 1, 2),
        ways=(*EXACT, "adaptive"),
    ),
    "intervals": Task(
        "GPT-2, Shakespeare, 2 + 16 + 2 layers, half the steps: MGRIT on intervals of four layers, or two",
        "gpt2_shakespeare",
        SHAKESPEARE,
        (16,),
        rates=(4e-3,),
        steps=1000,
        ways=("serial", *INTERVALS),
    ),
    "standard": Task(
        "GPT-2 of width 64, Shakespeare, N layers, Δt = 1, no buffers",
        "gpt2_shakespeare",
        SHAKESPEARE,
        (4, 16, 64),
        ("step.middle=1", "buffers.open=0", "buffers.close=0"),
        seeds=(0, 1, 2, 3),
        buffers=0,
        evaluated=40,
    ),
    "translation": Task(
        "Multi30k, German to English, width 32, N / 2 + N / 2 layers, Δt = 1, no buffers, by Muon",
        "mt_multi30k",
        {"data.path": "multi30k"},
        (6, 24),
        NARROW_TRANSLATION,
        seeds=(0, 1, 2),
        rates=(5e-3, 1e-2, 2e-2),
        steps=600,
        buffers=0,
        evaluated=40,
    ),
    "deep translation": Task(
        "Multi30k as above, 32 + 32 layers",
        "mt_multi30k",
        {"data.path": "multi30k"},
        (64,),
        NARROW_TRANSLATION,
        rates=(1e-2,),
        steps=600,
        buffers=0,
        evaluated=40,
    ),
    "words": Task(
        "Word classification, UD English-GUM, N layers, Δt = 1/N, no buffers",
        "mc_gum",
        {
            "data.path": "ud_english_gum/en_gum-ud-train.slim.conllu.gz",
            "data.validation_path": "ud_english_gum/en_gum-ud-dev.slim.conllu.gz",
        },
        (16, 64),
        rates=(2e-3,),
        steps=800,
        buffers=0,
    ),
    "bert": Task(
        "BERT, Shakespeare, N layers, Δt = 1/N, no buffers",
        "bert_shakespeare",
        SHAKESPEARE,
        (16, 64),
        rates=(2e-3,),
        steps=600,
        buffers=0,
    ),
    "vit": Task(
        "ViT, MNIST, N layers, Δt = 1/N, no buffers",
        "vit_mnist",
        {"data.path": "mnist"},
        (8, 32),
        ("model.patch_size=7",),
        rates=(2e-3,),
        steps=1000,
        buffers=0,
    ),
    "teacher": Task(
        "Imitating a random network of 64 layers, Δt = 4/N",
        "deep_teacher",
        {},
        (4, 8, 16, 32, 64),
        seeds=(0, 1, 2),
        rates=(1e-2, 3e-2),
        buffers=0,
        evaluated=40,
        module="deep_teacher",
    ),
}


def overrides(task: Task, way: str, middle: int, seed: int, lr: float, data: Path, steps: int) -> list[str]:
    files = [f"{setting}={data / path}" for setting, path in task.files.items()]
    always = [
        f"model.layers={middle + task.buffers}", f"steps={steps}", f"seed={seed}", f"optimizer.lr={lr:g}", "workers=1", "eval.every=250",
        "eval.batches=40",
    ]  # fmt: skip
    return [*files, *always, *task.settings, *WAYS[way].overrides()]


# Running ----------------------------------------------------------------------------------------------------------------------


Key = tuple[str, str, int, int, float, int]
"""Task, way, middle layers, seed, learning rate, steps."""


def branch_file(key: Key, step: int) -> Path:
    """Where a run leaves its state before a step, for others to go on from."""
    name, _, middle, seed, lr, steps = key
    return Path(tempfile.gettempdir()) / f"frontier_{name}_{middle}_{seed}_{lr:g}_{steps}_{step}.pt"


def engine_of(key: Key, data: Path) -> Engine:
    """The engine of a worker that has all layers, in this process and on one core."""
    import torch

    from rayllp.channel import LocalChannel
    from rayllp.data import load_data
    from rayllp.models import build_architecture

    torch.set_num_threads(1)
    name, way, middle, seed, lr, steps = key
    config = load_config(HERE / f"{TASKS[name].config}.yaml", overrides(TASKS[name], way, middle, seed, lr, data, steps))
    alone = LocalChannel.alone()
    if TASKS[name].module is None:
        batches = load_data(config)
        model = build_architecture(config, batches.facts)
    else:
        module = import_module(TASKS[name].module)
        model, batches = module.student(config), module.Lessons(config)
    return Engine(model, config, batches, alone, alone, torch.device("cpu"))


def train(key: Key, data: Path, keep_at: tuple[float, ...] = (), start: Path | None = None) -> dict[str, Any]:
    """One run in this process: the engine of a worker that has all layers, and the controller, as `rayllp train` runs them.

    Args:
        keep_at: shares of the steps before which the state is kept (`branch_file`).
        start: such a state, to go on from.
    """
    import torch

    name, *_, steps = key
    engine = engine_of(key, data)
    config = engine.config
    controller = Controller(config)
    curve, plain, probes, biases = [], Counter[str](), Counter[str](), []
    kept = {round(share * steps) for share in keep_at}
    first = 0
    if start is not None:
        saved = torch.load(start, weights_only=True)
        first, curve = saved["step"], [tuple(point) for point in saved["curve"]]
        plain.update(saved["solves"])
        probes.update(saved["probes"])
        for name_, value in saved["parameters"].items():
            engine.block.parameters[name_].data.copy_(value)
            engine.optimizer.set_state(engine.block.parameters[name_], saved["optimizer"][name_])
    for step in range(first, steps):
        if step in kept and start is None:
            parameters = {name_: p.detach() for name_, p in engine.block.parameters.items()}
            state = {"step": step, "curve": curve, "solves": dict(plain), "probes": dict(probes), "parameters": parameters}
            moments = {name_: engine.optimizer.state_of(p) for name_, p in engine.block.parameters.items()}
            torch.save(state | {"optimizer": moments}, branch_file(key, step))
        controller.begin(step)
        accuracy, plan = controller.accuracy_at(step), controller.plan_probe(step)
        stats = engine.train_step(step, accuracy, plan)
        if not math.isfinite(stats.loss):
            raise SystemExit(f"{key}: the loss is not finite at step {step}")
        if plan is None:
            plain[counted(accuracy, stats.sweeps)] += 1
        else:
            found = stats.findings
            better = "exact" if accuracy.serial else counted(accuracy.doubled(), stats.sweeps)
            probes[f"{counted(plan.candidate, found.sweeps)} by {better}"] += 1
            biases.append((step, shown(plan.candidate), rounded(found.bias), rounded(found.noise), rounded(found.loss_gap)))
            controller.observe(step, found)
        if (step + 1) % config.eval.every == 0 or step + 1 == steps:
            count = TASKS[name].evaluated if step + 1 == steps else config.eval.batches
            metrics = {name_: float(f"{value:.6g}") for name_, value in engine.evaluate(count).items()}
            curve.append((step + 1, metrics["loss"]))
            print(key, curve[-1], controller.rung, flush=True)
    found = {
        "loss": curve[-1][1],
        "metrics": metrics,
        "curve": curve,
        "solves": dict(plain),
        "probes": dict(probes),
        "biases": biases,
    }
    return dict(zip(("task", "way", "middle", "seed", "lr", "steps"), key, strict=True)) | found


def counted(accuracy: Accuracy, sweeps: tuple[int, int] | None) -> str:
    """A solve's name with what its time depends on: "rolling 12+10" for a rolling window's sweeps forward and backward."""
    return accuracy.name if sweeps is None else f"{accuracy.name} {sweeps[0]}+{sweeps[1]}"


def shown(accuracy: Accuracy) -> str:
    """A solve's name with a rolling window's tolerance."""
    return accuracy.name if accuracy.tolerance is None else f"{accuracy.name} {accuracy.tolerance:.2g}"


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def load(results: Path) -> list[dict[str, Any]]:
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else []


def key_of(result: dict[str, Any]) -> Key:
    return tuple(result[name] for name in ("task", "way", "middle", "seed", "lr", "steps"))  # type: ignore[return-value]


def wanted(arguments: argparse.Namespace) -> Iterator[Key]:
    """Exact training at every depth, the other ways at the largest."""
    for name in arguments.tasks:
        task = TASKS[name]
        for seed in task.seeds if arguments.seeds is None else arguments.seeds:
            for way in arguments.ways or task.ways:
                for middle in arguments.middle or (task.middle if way == "serial" else task.middle[-1:]):
                    yield from ((name, way, middle, seed, lr, arguments.steps or task.steps) for lr in arguments.lr or task.rates)


def run(arguments: argparse.Namespace) -> None:
    data = arguments.data.absolute()
    done = {key_of(result) for result in load(arguments.results)}
    missing = [key for key in wanted(arguments) if key not in done]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for future in as_completed([pool.submit(train, key, data) for key in missing]):
            result = future.result()
            keep(arguments.results, result)
            print(" ".join(map(str, key_of(result))), f"loss {result['loss']:.4f}", result["solves"], result["probes"], flush=True)


def tails(arguments: argparse.Namespace) -> None:
    """1+1 to the end, and from states on its way the same with an exact end, or a more accurate one."""
    data, (name,) = arguments.data.absolute(), arguments.tasks
    steps = arguments.steps or TASKS[name].steps
    for seed in arguments.seeds or (0,):
        for lr in arguments.lr or TASKS[name].rates:
            middle = TASKS[name].middle[-1]
            whole = name, tail(1.0), middle, seed, lr, steps
            keep(arguments.results, train(whole, data, keep_at=TAILS[:-1]))
            for way, share in [*((tail(share), share) for share in TAILS[:-1]), *((way, TAILS[0]) for way in LATE)]:
                key = name, way, middle, seed, lr, steps
                result = train(key, data, start=branch_file(key, round(share * steps)))
                keep(arguments.results, result)
                print(" ".join(map(str, key)), f"loss {result['loss']:.4f}", flush=True)


def keep(results: Path, result: dict[str, Any]) -> None:
    """Add to the file, in place of an earlier result of the same run."""
    others = [other for other in load(results) if key_of(other) != key_of(result)]
    lines = [json.dumps(r) for r in sorted([*others, result], key=key_of)]
    results.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


# What it takes ----------------------------------------------------------------------------------------------------------------


def config_of(task: Task, middle: int, way: Way) -> TrainConfig:
    """The network's shape on the way's workers, for predictions."""
    shape = [f"model.layers={middle + task.buffers}", f"workers={way.workers}"]
    return load_config(HERE / f"{task.config}.yaml", [*shape, *task.settings, *way.overrides()])


def serial_ms(task: Task, middle: int) -> float:
    """An exact step on one device."""
    return (middle + task.buffers) * 3 * LAYER_MS


def total_ms(result: dict[str, Any], *, exact_gains: bool = True) -> float:
    """Of a whole training, on the workers that its way is meant for.

    Args:
        exact_gains: exact steps leave parameter gradients to idle workers, as ours do; else they take as long as on one device.
    """
    task, way = TASKS[result["task"]], WAYS[result["way"]]
    if way.workers == 1:
        return sum(result["solves"].values()) * serial_ms(task, result["middle"])
    config = config_of(task, result["middle"], way)
    ladder = Ladder(config)
    rungs = {rung.name: rung for rung in ladder.rungs}
    # Of a version that fitted windows, and began with 1+1.
    rungs.setdefault("1+1", replace(ladder.rungs[0], tolerance=None, windows=Windows.alike(config.window_lengths)))
    for name, windows in result.get("windows", {}).items():
        if sum(length for length, *_ in windows) == result["middle"]:  # or of one whose windows had no buffers
            windows = [*[(1, 1, 1)] * config.buffers.open, *windows, *[(1, 1, 1)] * config.buffers.close]
        rungs[name] = replace(ladder.rungs[0], tolerance=None, windows=Windows.of(windows))

    def step(name: str) -> float:
        if name in ("serial", "exact") and not exact_gains:
            return serial_ms(task, result["middle"])
        if name.startswith(ROLLING):
            forward, _, backward = name.removeprefix(ROLLING).partition("+")
            return predict_step(config, rungs[ROLLING], COSTS, sweeps=(int(forward), int(backward)))
        return predict_step(config, rungs["serial" if name == "exact" else name], COSTS)

    probes = dict(result["probes"])
    total = sum(count * step(name) for name, count in result["solves"].items())
    total += probes.pop(COUPLINGS, 0) * step("serial")  # an exact step without parameters' gradients
    for probe, count in probes.items():
        name, _, better = probe.rpartition(" by " if " in " not in probe else " in ")
        doubled = predict_step(config, rungs[name].doubled(), COSTS) if better == "parallel" else step(better)
        # The better gradient is formed in two halves of the batch, each of which takes as long as the whole.
        total += count * (step(name) + 2 * doubled)
    return total


@dataclass(frozen=True)
class Row:
    """A way at a depth, over its seeds, each with its best learning rate by the exact network's loss."""

    task: str
    way: str
    middle: int
    workers: int
    lr: float
    losses: tuple[float, ...]
    gaps: tuple[float, ...]
    kept: float | None
    hours: float
    speedup: float
    strict: float
    shares: dict[str, float]

    @property
    def solves(self) -> str:
        """Share of the steps by solve, in words."""
        return ", ".join(f"{share:.0%} {name}" for name, share in sorted(self.shares.items()) if share >= 0.005)


def rows(results: list[dict[str, Any]]) -> list[Row]:
    """What the tables and the picture show."""
    found = []
    for name, task in TASKS.items():
        mine = [r for r in results if r["task"] == name]
        for way, ways in {"serial": tuple(EXACT), **{way: (way,) for way in WAYS if way not in EXACT}}.items():
            for middle in task.middle:
                lr = best_rate(mine, way, middle)
                runs = [r for r in mine if r["way"] in ways and (r["middle"], r["lr"]) == (middle, lr)]
                if runs:
                    found.append(row_of(runs, mine))
    return found


def row_of(runs: list[dict[str, Any]], results: list[dict[str, Any]]) -> Row:
    """Of one way at one depth and learning rate.

    Args:
        runs: its seeds.
        results: all of the task.
    """
    task, middle, steps = TASKS[runs[0]["task"]], runs[0]["middle"], runs[0]["steps"]
    exact, coarse = exact_losses(results, middle), exact_losses(results, task.middle[-1] // 4)
    gaps = [100 * (r["loss"] / exact[r["seed"]] - 1) for r in runs if r["seed"] in exact]
    compared = [r for r in runs if middle == task.middle[-1] and r["seed"] in exact and r["seed"] in coarse]
    gained = sum(coarse[r["seed"]] - exact[r["seed"]] for r in compared)  # by depth
    kept = 100 * sum(coarse[r["seed"]] - r["loss"] for r in compared) / gained if gained > 0 else None
    shares, sweeps = Counter[str](), Counter[str]()
    for r in runs:
        for solve, count in r["solves"].items():
            name = solve.partition(",")[0]
            if name.startswith(ROLLING):
                for way_, number in zip(("forward", "adjoint"), name.removeprefix(ROLLING).split("+"), strict=True):
                    sweeps[way_] += count * int(number)
                name = ROLLING
            cut = "" if name in (solve, ROLLING) or name.endswith(" fitted") else " cut"  # as the first version did to a ladder's
            shares[name + cut] += count / steps / len(runs)
    if sweeps:
        taken = shares.pop(ROLLING)
        shares[f"{ROLLING}, {' + '.join(f'{sweeps[w] / taken / steps / len(runs):.1f}' for w in sweeps)} sweeps"] = taken
        shares["probes"] += sum(count for kind, count in r["probes"].items() if kind != COUPLINGS) / steps / len(runs)
    ms, strict = (mean(total_ms(r, exact_gains=gains) for r in runs) for gains in (True, False))
    alone = steps * serial_ms(task, middle)
    return Row(
        task=runs[0]["task"],
        way=runs[0]["way"],
        middle=middle,
        workers=WAYS[runs[0]["way"]].workers,
        lr=runs[0]["lr"],
        losses=tuple(r["loss"] for r in runs),
        gaps=tuple(gaps),
        kept=kept,
        hours=ms / 3.6e6,
        speedup=alone / ms,
        strict=alone / strict,
        shares=dict(shares),
    )


def accounted(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """A result with what it is worth beside exact training of the same seed: workers, gap in %, speed-up, depth kept in %."""
    mine = [r for r in results if r["task"] == result["task"]]
    row = row_of([result], mine)
    figures = {
        "layers": row.middle + TASKS[row.task].buffers,
        "workers": row.workers,
        "speedup": row.speedup,
        "serial_loss": exact_losses(mine, row.middle).get(result["seed"]),
        "gap": row.gaps[0] if row.gaps else None,
        "depth_kept": row.kept,
    }
    short = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in figures.items()}
    return {**result, **short}


def exact_losses(results: list[dict[str, Any]], middle: int) -> dict[int, float]:
    """By seed, of exact training at its best learning rate. Runs that differ in rounding alone are averaged."""
    lr = best_rate(results, "serial", middle)
    losses: dict[int, list[float]] = {}
    for r in results:
        if r["way"] in EXACT and (r["middle"], r["lr"]) == (middle, lr):
            losses.setdefault(r["seed"], []).append(r["loss"])
    return {seed: mean(runs) for seed, runs in losses.items()}


def best_rate(results: list[dict[str, Any]], way: str, middle: int) -> float:
    """The learning rate of the lowest mean loss."""
    losses: dict[float, list[float]] = {}
    for r in results:
        if (r["way"], r["middle"]) == (way, middle):
            losses.setdefault(r["lr"], []).append(r["loss"])
    return min(losses, key=lambda lr: mean(losses[lr])) if losses else math.nan


# Reporting --------------------------------------------------------------------------------------------------------------------


def spread(values: tuple[float, ...], digits: int, *, sign: bool = False) -> str:
    """Mean and standard deviation; small numbers with three significant digits."""
    if not values:
        return "–"
    style = f"{'+' if sign else ''}.{digits}f" if sign or digits == 0 or abs(mean(values)) > 0.1 else ".3g"
    return f"{mean(values):{style}}" + (f" ± {stdev(values):{style.lstrip('+')}}" if len(values) > 1 else "")


def table(found: list[Row], task: str) -> str:
    heads = "way | middle layers | workers | loss | gap, % | depth kept, % | hours | speed-up | steps by solve"
    lines = ["| " + heads + " |", "|---" * 9 + "|"]
    for row in found:
        if row.task == task:
            serial = row.way == "serial"
            speed = "1" if serial else f"{row.speedup:.2f} ({row.strict:.2f})"
            cells = [
                row.way, str(row.middle), str(row.workers), spread(row.losses, 4), "" if serial else spread(row.gaps, 2, sign=True),
                f"{row.kept:.0f}" if row.kept is not None and not serial else "", f"{row.hours:.3f}", speed, "" if serial else row.solves,
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablations(results: list[dict[str, Any]]) -> str:
    """The table of what MGRIT on intervals loses, one thing changed at a time; biases are those that probes found on the way."""
    heads = "| way | loss | gap, % | bias of the gradient, and its noise, at step 499 | steps by solve |"
    lines = [heads, "|---|---|---|---|---|"]
    for result in sorted(results, key=lambda r: list(WAYS).index(r["way"])):
        if result["task"] != "intervals":
            continue
        row = row_of([result], [r for r in results if r["task"] == "intervals"])
        found = [(bias, noise) for step, _, bias, noise, *_ in result["biases"] if step == 499 and bias is not None]
        biases = next((f"{bias:.2g} ({noise:.2g})" for bias, noise in found), "")
        lines.append(f"| {row.way} | {row.losses[0]:.4f} | {spread(row.gaps, 2, sign=True)} | {biases} | {row.solves} |")
    return "\n".join(lines)


COLOURS = {
    "serial": "#1f77b4", "adaptive": "#2ca02c", "adaptive 16": "#d62728", "fitted": "#bcbd22", "fitted 16": "#ff7f0e",
    "ladder": "#98df8a", "ladder 16": "#ff9896",
}  # fmt: skip
"""Of the ways that the legend names; the others are grey: fixed solves with exact ends of several lengths."""


def draw(found: list[Row], picture: Path) -> None:
    """Loss over the time of the training, one panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    names = [name for name in TASKS if name != "intervals" and sum(row.task == name for row in found) > 1]
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure, axes = plt.subplots(down, across, figsize=(5.2 * across, 3.8 * down), layout="constrained", squeeze=False)
    for spare in axes.flat[len(names) :]:
        spare.set_axis_off()
    for name, axis in zip(names, axes.flat, strict=False):
        for way in WAYS:
            mine = sorted((row for row in found if (row.task, row.way) == (name, way)), key=lambda row: row.middle)
            if not mine:
                continue
            points = [(row.hours, mean(row.losses)) for row in mine]
            workers = WAYS[way].workers
            label = None if way not in COLOURS else "exact, one device" if workers == 1 else f"{way.removesuffix(' 16')}, {workers} workers"
            axis.plot(*zip(*points, strict=True), "o-", ms=4, lw=1.2, color=COLOURS.get(way, "#7f7f7f"), label=label)
            for row, point in zip(mine, points, strict=True):
                axis.annotate(str(row.middle), point, textcoords="offset points", xytext=(4, 4), fontsize="x-small")
        axis.set_title(TASKS[name].title, fontsize="small")
        axis.set(xlabel="hours of training (emulated layers)", ylabel="validation loss", xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(picture, dpi=130)


BEGIN, END = "<!-- tables: made by `python examples/frontier.py report` -->\n", "<!-- end of tables -->"


def report(arguments: argparse.Namespace) -> None:
    results = load(arguments.results)
    found = rows(results)
    for result in results:
        keep(arguments.results, accounted(result, results))
    page = arguments.docs / "frontier.md"
    tables = {
        name: ablations(results) if name == "intervals" else table(found, name) for name in TASKS if any(r.task == name for r in found)
    }
    made = "\n\n".join(f"**{TASKS[name].title}**\n\n{rows}" for name, rows in tables.items())
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    draw(found, arguments.docs / "images" / "frontier.png")
    print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="train what the results do not have yet")
    runs.add_argument("--data", type=Path, required=True)
    runs.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    runs.add_argument("--ways", nargs="+", choices=[way for way in WAYS if way not in (*LATE, *EARLIER)], help="default the task's")
    runs.add_argument("--middle", nargs="+", type=int, help="depths; default the task's for exact training, its largest for other ways")
    runs.add_argument("--lr", nargs="+", type=float, help="learning rates; default the task's")
    runs.add_argument("--seeds", nargs="+", type=int)
    runs.add_argument("--steps", type=int, help="default the task's")
    runs.add_argument("--jobs", type=int, default=1)
    runs.set_defaults(action=run)
    ends = commands.add_parser("tails", help="1+1 with exact ends of several lengths, and with more accurate ones")
    ends.add_argument("--data", type=Path, required=True)
    ends.add_argument("--tasks", nargs=1, default=["shakespeare"], choices=list(TASKS))
    ends.add_argument("--lr", nargs="+", type=float)
    ends.add_argument("--seeds", nargs="+", type=int)
    ends.add_argument("--steps", type=int)
    ends.set_defaults(action=tails)
    reports = commands.add_parser("report", help="write the tables and the picture")
    reports.add_argument("--docs", type=Path, default=Path("docs"))
    reports.set_defaults(action=report)
    for command in (runs, ends, reports):
        command.add_argument("--results", type=Path, default=Path("docs/frontier.json"))
    arguments = parser.parse_args()
    arguments.action(arguments)


if __name__ == "__main__":
    main()
