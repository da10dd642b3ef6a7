"""Gradient norms of a 128-layer BERT at initialisation, layer by layer, for each model.initialisation.

    python examples/gradients_at_initialisation.py [--layers 128] [--picture gradients.png]

h = 1, exact gradients of the masked-language-modelling loss of one batch of the standard library's text.
"""

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import rayllp
from rayllp.channel import LocalChannel
from rayllp.control import Controller
from rayllp.data import load_data
from rayllp.engine import Engine
from rayllp.models import build_architecture


def norms(initialisation: str, layers: int) -> list[float]:
    """Gradient norm of each layer's parameters."""
    config = rayllp.make_config(
        {
            "model": {"family": "bert", "layers": layers, "width": 64, "heads": 4, "initialisation": initialisation},
            "data": {"max_bytes": 1_000_000}, "buffers": {"open": 0, "close": 0}, "step": {"middle": 1.0}, "workers": 1,
            "mode": "serial", "sequence_length": 64, "batch_size": 8,
        }
    )  # fmt: skip
    data = load_data(config)
    architecture = build_architecture(config, data.facts)
    engine = Engine(architecture, config, data, LocalChannel.alone(), LocalChannel.alone(), torch.device("cpu"))
    engine.gradients(engine.step_batch(0, Controller(config).chosen))
    squares = [0.0] * layers
    for n, layer in engine.block.layers.items():
        squares[n] = sum(float(p.grad.square().sum()) for p in layer.parameters() if p.grad is not None)
    return [math.sqrt(value) for value in squares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    print("| initialisation | smallest | largest | of layers | largest over smallest |\n|---|---|---|---|---|")
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for initialisation in ("default", "deep", "scaled"):
        found = norms(initialisation, arguments.layers)
        places = f"{found.index(min(found))} and {found.index(max(found))}"
        print(f"| {initialisation} | {min(found):.2e} | {max(found):.2e} | {places} | {max(found) / min(found):.1f} |")
        axes.plot(found, label=initialisation)
    axes.set(xlabel="layer", ylabel="gradient norm", yscale="log", title=f"A {arguments.layers}-layer BERT at initialisation, h = 1")
    axes.legend(frameon=False)
    if arguments.picture:
        figure.savefig(arguments.picture, dpi=130)


if __name__ == "__main__":
    main()
