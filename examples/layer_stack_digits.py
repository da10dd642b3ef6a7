"""A network of your own, layer-parallel: 32 residual convolutions read scikit-learn's handwritten digits.

    python examples/layer_stack_digits.py [--workers 2] [--steps 200]

Nothing here is a transformer. All that rayllp asks is a stack of residual layers of one shape, and batches that are a function of
(split, step).
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import rayllp
from rayllp.data import Batches

CHANNELS, LAYERS = 16, 32


class Residual(nn.Module):
    """x + conv(relu(norm(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv(torch.relu(self.norm(x_BCHW)))


class Digits(Batches):
    """1,797 images of 8 × 8; the last 360 are held out. A batch depends on the seed and the step alone."""

    def __init__(self, seed: int = 0) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.labels, self.seed = torch.tensor(labels), seed
        self.places = {"train": range(len(labels) - 360), "validation": range(len(labels) - 360, len(labels))}

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        places = self.places[split]
        if split == "validation":
            chosen = [places[(step * size + i) % len(places)] for i in range(size)]
        else:
            chosen = np.random.default_rng((self.seed, step)).choice(places, size)
        return self.images[chosen], self.labels[chosen]


def network() -> rayllp.LayerStack:
    return rayllp.LayerStack(
        embed=lambda: nn.Conv2d(1, CHANNELS, 3, padding=1),
        layers=[Residual] * LAYERS,
        head=lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * CHANNELS, 10)),
        loss=lambda outputs, labels: nn.functional.cross_entropy(outputs, labels, reduction="sum"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    config = rayllp.make_config(
        {
            "name": "digits",
            "model": {"layers": LAYERS},
            "buffers": {"open": 0, "close": 0},
            "workers": arguments.workers,
            "batch_size": 40,
            "steps": arguments.steps,
            "optimizer": {"lr": 1e-2},
            "eval": {"every": 50, "batches": 9},
            "adaptive": {"probe_every": 50},
        }
    )
    result = rayllp.train(config, model=network(), batches=Digits(), output=arguments.output)
    print(f"held-out loss {result.validation_loss:.3f} (guessing gives {np.log(10):.3f}); see {result.directory}")


if __name__ == "__main__":
    main()
