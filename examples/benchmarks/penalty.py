"""What the consistency penalty adds to a layer-parallel step, and what probes add to a run.

    python examples/benchmarks/penalty.py [--rounds 40]

One worker on one core, 64 middle layers, c_f = 4, 1+1 iterations; steps with and without the penalty (or with something else) take
turns on the same weights, and the median of their ratios is given with its quartiles.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from step import make_engine

import rayllp
from rayllp.channel import LocalChannel
from rayllp.config import TrainConfig
from rayllp.control import Controller
from rayllp.engine import Engine

torch.set_num_threads(1)


def settings(width: int, **adaptive: object) -> TrainConfig:
    return rayllp.make_config(
        {
            "model": {"layers": 68, "width": width, "heads": 4},
            "workers": 1,
            "sequence_length": 64,
            "batch_size": 8,
            "solver": "mgrit",
            "mgrit": {"iterations": {"forward": 1, "backward": 1}},
            "adaptive": adaptive,
        }
    )


def ratio(engine: Engine, variants: tuple, rounds: int) -> tuple[float, float, float]:
    """Quartiles of the second variant's time over the first's."""
    ratios = []
    for step in range(rounds + 3):
        times = []
        for variant in variants if step % 2 else variants[::-1]:
            started = time.perf_counter()
            engine.train_step(step, *variant)
            times.append(time.perf_counter() - started)
        times = times if step % 2 else times[::-1]
        if step >= 3:
            ratios.append(times[1] / times[0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


def shown(name: str, found: tuple[float, float, float]) -> None:
    low, middle, high = found
    print(f"  {name}: {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    arguments = parser.parse_args()
    for width in arguments.widths:
        print(f"width {width}: time of a step over that of a plain layer-parallel step, median (quartiles)")
        config = settings(width)
        engine, plain = make_engine(config, LocalChannel.alone()), Controller(config).chosen
        shown("itself", ratio(engine, ((plain,), (plain,)), arguments.rounds))
        shown("with the consistency penalty", ratio(engine, ((plain,), (replace(plain, consistency=3.0),)), arguments.rounds))
        for rule, exact in (("convergence", 0), ("bias", 0), ("bias", 1)):
            control = Controller(settings(width, rule=rule, exact_every=exact))
            every = control.settings.probe_every
            _, middle, _ = ratio(engine, ((plain,), (plain, control.plan_probe(every - 1))), max(8, arguments.rounds // 4))
            cost = (middle - 1) / every
            print(f"  a probe, rule {rule}{', exact' if exact else ''}: {middle:.2f} steps; every {every} steps {cost:.1%} of the time")


if __name__ == "__main__":
    main()
