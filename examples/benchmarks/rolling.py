"""How accurate a rolling window is for its time, on a network that was trained exactly: gradient's bias by tolerance and by sweeps.

    python examples/benchmarks/rolling.py --data DATA --task standard --lr 8e-3 --steps 300

`--task` is one of frontier.py's. The network is trained exactly for so many steps. Then the gradient of the next few batches is formed by
a rolling window with several tolerances, with the layers' responses as a probe of the last batch finds them, with secants, and with
neither, and by windows of equal length, and compared with the exact one, as a probe does. Cost is in evaluations of a layer: sweeps
forward and backward, and parameter gradients (equal windows form these with the last sweep).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

import rayllp.mgrit.rolling as rolling
from rayllp.control import Accuracy, Controller
from rayllp.engine import Engine
from rayllp.engine.probe import Sums
from rayllp.mgrit.windows import Windows

sys.path.insert(0, str(Path(__file__).parents[1]))
import frontier

TOLERANCES = (0.15, 0.1, 0.05, 0.02, 0.01, 0.005)
SWEEPS = ((1, 1), (2, 1), (2, 2), (3, 3), (4, 4))
BATCHES = 4


def layer_gradients(engine: Engine, accuracy: Accuracy, step: int) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """The gradients of the middle layers, one flat tensor each, and the sweeps of a rolling window."""
    formed = engine.gradients(engine.step_batch(step, accuracy))
    config = engine.config
    layers = range(config.buffers.open, config.model.layers - config.buffers.close)
    found = [torch.cat([p.grad.flatten() for p in engine.block.layers[n].parameters() if p.grad is not None]) for n in layers]
    engine.optimizer.zero_grad()
    return found, formed.sweeps or (0, 0)


def find_responses(engine: Engine, window: Accuracy, step: int) -> None:
    """As a probe of this step does."""
    batch = engine.step_batch(step, window)
    assert engine.group.responses is not None
    with engine.group.responses.learned(engine.group.spec(batch.inputs), step):
        for tolerance in (0.01, 0.01 / 8):
            engine.gradients(batch.solved_by(replace(window, tolerance=tolerance)))
    engine.optimizer.zero_grad()


def bias(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """As probes measure it."""
    error, better = (torch.stack([g.double().square().sum() for g in each]) for each in (map(torch.sub, found, exact), exact))
    sums = Sums(error, better, better, better, error)
    return sums.mean_of(sums.biases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="standard", choices=[name for name, task in frontier.TASKS.items() if task.module is None])
    parser.add_argument("--way", default="adaptive", choices=["adaptive", "adaptive 16"])
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--steps", type=int, default=300, help="exact ones, of a training of as many as the task has")
    arguments = parser.parse_args()
    task = frontier.TASKS[arguments.task]
    key = arguments.task, arguments.way, task.middle[-1], 0, arguments.lr, task.steps
    engine = frontier.engine_of(key, arguments.data.absolute())
    config = engine.config
    controller = Controller(config)
    window, exact = controller.rungs[0], controller.rungs[-1]
    for step in range(arguments.steps):
        engine.train_step(step, exact)
    steps = range(arguments.steps, arguments.steps + BATCHES)
    right = {step: layer_gradients(engine, exact, step)[0] for step in steps}
    layers, length = len(config.solved_layers), config.longest_window
    owned = layers / length
    print(f"exact, layers in turn: cost {2 * layers + owned:.0f}; on one device {3 * layers}")
    for kind in ("with secants", "without", "with responses"):
        rolling.MOST_EXTRAPOLATION = 2.0 if kind == "with secants" else 0.0
        if kind == "with responses":
            find_responses(engine, window, arguments.steps - 1)
        for tolerance in TOLERANCES:
            found = [layer_gradients(engine, replace(window, tolerance=tolerance), step) for step in steps]
            forward, backward = (mean(sweeps[way] for _, sweeps in found) for way in (0, 1))
            off = mean(bias(gradients, right[step]) for (gradients, _), step in zip(found, steps, strict=True))
            print(f"rolling {kind}, tolerance {tolerance:g}: {forward:.1f} + {backward:.1f} sweeps, cost {forward + backward + owned:.1f}, "
                  f"bias {off:.3g}", flush=True)  # fmt: skip
    for forward, backward in SWEEPS:
        windows = Windows.alike(config.window_lengths, forward, backward)
        equal = replace(window, tolerance=None, windows=windows)
        off = mean(bias(layer_gradients(engine, equal, step)[0], right[step]) for step in steps)
        cost = sum(min(forward, n) + min(backward, n) + 1 if n > 1 else 2 + 2 / length for n in config.window_lengths)
        print(f"windows of {length} by {forward}+{backward}: cost {cost:.1f}, bias {off:.3g}", flush=True)


if __name__ == "__main__":
    main()
