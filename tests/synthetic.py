"""Run directories like those that training writes, without training: written by the same classes, from made-up figures.

python -m tests.synthetic DIRECTORY STEPS     # such a run to try `rayllp report` on
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

from rayllp.config import make_config
from rayllp.report import RunDirectory
from rayllp.timeline import Span, TimedStep
from tests.conftest import merge

WORKERS = 4


def metric(step, **changes):
    """Return a line of metrics.jsonl for a layer-parallel step."""
    plain = {
        "step": step, "loss": 4.0, "mode": "parallel", "iterations_forward": 2, "iterations_backward": 1, "rho_forward": None,
        "rho_backward": None, "rho_by_point": None, "bias": None, "cosine": None, "noise": None, "loss_gap": None,
        "bias_by_layer": None,
        "bias_against": None, "consistency": None, "consistency_weight": 0.3, "lipschitz": None, "grad_norm": 1.0, "lr": 1e-3,
        "step_time_s": 0.1, "tokens": 512, "tokens_per_s": 5120.0, "mfu": None, "workers": WORKERS,
    }  # fmt: skip
    return plain | changes


def probe(step, **changes):
    """Return a line of metrics.jsonl for a probe."""
    found = {"rho_forward": 0.25, "rho_backward": 0.5, "bias": 0.05, "cosine": 0.99, "noise": 0.4, "loss_gap": -0.002}
    found |= {"bias_by_layer": [[0.05, 0.99]] * 64}
    found |= {"rho_by_point": {"forward": [[None, 0.2, 0.3], [0.6]], "backward": [[0.4, 0.5, None], [0.7]]}}
    return metric(step, **({"iterations_forward": 4, "iterations_backward": 3} | found | changes))


def timed_step(began=0.0, scale=1.0):
    """Return a worker's timed step of 0.1 s: 60 ms of computing, 10 ms of sending, 20 ms of waiting."""
    spans = (
        Span(0.0, 0.01, "compute", "forward", "coarse solve", 1, 0),
        Span(0.01, 0.02, "send", "forward", "coarse solve", 1),
        Span(0.02, 0.04, "wait", "forward", "coarse solve", 1),
        Span(0.04, 0.09, "compute", "adjoint", "last sweep", 0, 3),
    )
    return TimedStep(1000.0 + began, 0.1 * scale, tuple(span._replace(begin=span.begin * scale, end=span.end * scale) for span in spans))


def begin_run(path, **settings):
    """Create a run directory that holds its settings and nothing else."""
    base = {"steps": 100, "workers": WORKERS, "model": {"layers": 20, "width": 16, "heads": 2}}
    return RunDirectory.create(path, make_config(merge(base, settings)))


def small_run(path, *, losses=(2.0, 1.5), steps=100, sample="", **settings):
    """Write a run with evaluations in its middle and at its end, a probe, a switch, a fault, a resize and two timed steps.

    Args:
        losses: validation losses of the evaluations.
    """
    run = begin_run(path, steps=steps, **settings)
    serial_from = steps * 4 // 5
    serial = {"mode": "serial", "iterations_forward": None, "iterations_backward": None, "consistency_weight": None}
    for step in range(steps):
        loss = 4 * math.exp(-step / steps)
        if step == steps // 4:
            run.metric(probe(step, loss=loss))
            continue
        workers = WORKERS if step < steps // 2 else 2
        run.metric(metric(step, loss=loss, workers=workers, **(serial if step >= serial_from else {})))
    for number, loss in enumerate(losses, 1):
        run.evaluation(steps * number // len(losses), "validation", loss, perplexity=math.exp(loss))
    run.event(steps // 4, "fault", reason="worker 1 was lost", ranks=[1])
    run.event(steps // 4, "restore", source="memory", ranks=[1], seconds=2.5, steps_lost=3)
    run.event(steps // 2, "resize", workers_before=WORKERS, workers=2, blocks=[8, 8], seconds=1.25)
    run.event(serial_from, "switch", to="serial", rung="serial", reason="adaptive.switch_at")
    run.event(steps, "checkpoint", path=str(run.path / "checkpoints"))
    parallel = {"mode": "parallel", "iterations_forward": 2, "iterations_backward": 1}
    run.timeline(steps // 3, parallel, [(timed_step(0.001 * rank), (2**30 + rank, None)) for rank in range(WORKERS)], spans=True)
    run.timeline(steps - 1, parallel | serial, [(timed_step(0.0, 2.0), (2**30 + 2**20 * rank, None)) for rank in range(2)], spans=True)
    if sample:
        run.write_text("sample.txt", sample)
    return run


def long_run(path, steps=20_000, workers=8, **settings):
    """Write a run as long as real ones, with everything that a run can have, to measure the size of its page."""
    config = {
        "steps": steps,
        "workers": workers,
        "model": {"layers": 68, "width": 64, "heads": 4},
        "solver": "mgrit",
        "mgrit": {"coarsening": 8},
    }
    run = begin_run(path, **merge(config, settings))
    noise, serial_from, lines = np.random.default_rng(0), steps * 4 // 5, []
    serial = {"mode": "serial", "iterations_forward": None, "iterations_backward": None}
    random = noise.standard_normal((steps, 3)).tolist()
    for step, (one, two, three) in enumerate(random):
        share = step / steps
        values = {"loss": 40.0 if step == steps // 3 else 2 + 2 * math.exp(-8 * share) + 0.1 * one, "grad_norm": math.exp(two)}
        values |= {"lr": 1e-3 * (1 - share), "step_time_s": 0.1 * math.exp(0.2 * three), "workers": workers}
        if (step + 1) % 150 == 0 and step < serial_from:
            growth = 10 ** (2 * share - 1.5)
            found = {"rho_forward": growth, "rho_backward": 2 * growth, "bias": growth, "noise": 0.5 + share}
            found |= {"rho_by_point": {way: [[growth] * 7] for way in ("forward", "backward")}}
            found |= {"lipschitz": (1 + noise.random(68)).tolist(), "bias_by_layer": [[growth, 0.99]] * 64}
            lines.append(probe(step, **values, **found))
        else:
            lines.append(metric(step, **values, **(serial if step >= serial_from else {})))
        if step % 50 == 25:
            kind = serial if step >= serial_from else {"mode": "parallel", "iterations_forward": 2, "iterations_backward": 1}
            kept = step < 150 or step > steps - 150
            timed = [(_busy(rank, 400 if kept else 20), (2**30, 2**31)) for rank in range(workers)]
            run.timeline(step, kind, timed, spans=kept)
        if (step + 1) % 500 == 0:
            run.evaluation(step + 1, "validation", 2 + 2 * math.exp(-8 * share), perplexity=9.0)
            run.event(step + 1, "checkpoint", path="somewhere")
        if step % 2500 == 1200:
            run.event(step, "fault", reason="worker 1 was lost", ranks=[1])
            run.event(step, "restore", source="memory", ranks=[1], seconds=2.0, steps_lost=1)
    run.event(serial_from, "switch", to="serial", rung="serial", reason="adaptive.switch_at")
    run.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))  # at once: run.metric opens the file each time
    run.write_text("sample.txt", "To be, or not to be\n" * 10)
    return run


def _busy(rank, count):
    """Return a timed step with this many spans."""
    length = 0.04 / count
    solves = ["forward"] * (count // 2) + ["adjoint"] * (count // 2)
    spans = [Span(length * n, length * (n + 0.8), "compute", solve, "last sweep", 0, n) for n, solve in enumerate(solves)]
    return TimedStep(1000.0 + 0.001 * rank, 0.045, tuple(spans))


if __name__ == "__main__":
    long_run(Path(sys.argv[1]), int(sys.argv[2]))
