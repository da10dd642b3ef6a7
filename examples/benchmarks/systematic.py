"""What of a gradient's error is the same for every batch: by rolling windows, fixed ones and MGRIT.

    python examples/benchmarks/systematic.py --data DATA --task standard --lr 8e-3 --steps 500 [--adaptive]

`--task` is one of frontier.py's. The network is trained for so many steps, exactly or as `mode: adaptive` does. Then the gradients of the
next batches are formed exactly and by several solves. An error that differs from batch to batch averages out over steps, as the noise of
small batches does. What all errors have in common, the systematic part, leads training elsewhere. Squared norms of both, and of what all
exact gradients have in common (the signal), are estimated by unbiased estimators. Means over the middle layers are of squares and weighted
by the norms of their gradients, as in a probe. The last figure is by how much the variance of the gradients over the batches differs from
that of the exact ones.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rolling import layer_gradients
from torch import Tensor

from rayllp.control import Accuracy, Controller
from rayllp.engine import Engine
from rayllp.mgrit.windows import Windows

sys.path.insert(0, str(Path(__file__).parents[1]))
import frontier

TOLERANCES = (0.1, 0.05, 0.02, 0.01, 0.005)
SWEEPS = ((1, 1), (2, 1), (2, 2))
INTERVAL = "1+1"
"""The way of frontier.py that solves by MGRIT, with two levels and intervals of four layers."""


def train(engine: Engine, steps: int, *, adaptive: bool) -> None:
    controller = Controller(engine.config)
    for step in range(steps):
        if not adaptive:
            engine.train_step(step, controller.rungs[-1])
            continue
        controller.begin(step)
        plan = controller.plan_probe(step)
        stats = engine.train_step(step, controller.accuracy_at(step), plan)
        if plan is not None:
            controller.observe(step, stats.findings)
    if adaptive:
        print(f"the last step was by {controller.rung}, tolerance {controller.chosen.tolerance:.2g}", flush=True)


def common_square(samples: Tensor) -> float:
    """The squared norm of the mean of what such vectors are drawn from, without bias. Shape of the samples: (samples, numbers)."""
    return float(samples.mean(0).square().sum() - samples.var(0).sum() / len(samples))


def solves(parallel: Engine, intervals: Engine) -> Iterator[tuple[str, Engine, Accuracy]]:
    """The solves to compare, with their names and the engine that forms gradients by each."""
    config = parallel.config
    window = Controller(config).rungs[0]
    for tolerance in TOLERANCES:
        yield f"rolling, tolerance {tolerance:g}", parallel, replace(window, tolerance=tolerance)
    for forward, backward in SWEEPS:
        windows = Windows.alike(config.window_lengths, forward, backward)
        yield f"windows of {config.longest_window} by {forward}+{backward}", parallel, replace(window, tolerance=None, windows=windows)
    cycle = Controller(intervals.config).rungs[0]
    for forward, backward in SWEEPS:
        name = f"MGRIT, intervals of {intervals.config.mgrit.coarsening}, {forward}+{backward}"
        yield name, intervals, replace(cycle, iterations_forward=forward, iterations_backward=backward)


def describe(found: Sequence[list[Tensor]], exact: Sequence[list[Tensor]]) -> str:
    """What the gradients of several batches, `found` and `exact`, say about a solve."""
    weights, rows = [], []
    for layer in range(len(exact[0])):
        right = torch.stack([each[layer].double() for each in exact])
        errors = torch.stack([each[layer].double() for each in found]) - right
        square = float(right.square().sum(1).mean())
        weights.append(math.sqrt(square))
        error, systematic, signal = float(errors.square().sum(1).mean()), common_square(errors), common_square(right)
        used, noise = (float(each.var(0).sum()) for each in (right + errors, right))
        rows.append([part / square for part in (error, systematic, signal, used, noise)])
    weight = torch.tensor(weights, dtype=torch.float64)
    error, systematic, signal, used, noise = ((weight @ torch.tensor(rows, dtype=torch.float64)) / weight.sum()).tolist()
    over_signal = math.sqrt(max(systematic, 0) / signal) if signal > 0 else math.inf
    return (
        f"error {math.sqrt(error):.3f} of the gradient, {systematic / error:.0%} of its square in common; "
        f"common error {over_signal:.3f} of the common gradient; variance of the gradient {used / noise - 1:+.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="standard", choices=[name for name, task in frontier.TASKS.items() if task.module is None])
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--steps", type=int, default=500, help="of a training of as many as the task has")
    parser.add_argument("--adaptive", action="store_true", help="train as `mode: adaptive` does, not exactly")
    parser.add_argument("--batches", type=int, default=16)
    arguments = parser.parse_args()
    task = frontier.TASKS[arguments.task]
    engine, intervals = (
        frontier.engine_of((arguments.task, way, task.middle[-1], 0, arguments.lr, task.steps), arguments.data.absolute())
        for way in ("adaptive", INTERVAL)
    )
    train(engine, arguments.steps, adaptive=arguments.adaptive)
    for name, parameter in engine.block.parameters.items():
        intervals.block.parameters[name].data.copy_(parameter)
    steps = range(arguments.steps, arguments.steps + arguments.batches)
    exact = Controller(engine.config).rungs[-1]
    right = [layer_gradients(engine, exact, step)[0] for step in steps]
    for name, solver, accuracy in solves(engine, intervals):
        found = [layer_gradients(solver, accuracy, step)[0] for step in steps]
        print(f"{name}: {describe(found, right)}", flush=True)


if __name__ == "__main__":
    main()
