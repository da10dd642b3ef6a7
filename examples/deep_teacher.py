"""A task that needs depth: to imitate a random residual network of 64 different layers, on random vectors.

    python examples/deep_teacher.py --layers 64 --steps 500        # trains exactly, on one worker, and prints the held-out error

The teacher takes a vector through 64 layers x + TIME / 64 · (MLP of the normalised x), with random weights. A student of N layers has
layers of the same shape and a step of TIME / N, so a shallow one has neither the parameters nor the steps for the teacher's way
(docs/frontier.md has the losses). The loss is the squared error over the targets' variance: 1 for a student that says the mean. Samples are
drawn anew for each step, from the seed and the step.
"""

import argparse
import math
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import rayllp
from rayllp.config import TrainConfig
from rayllp.data import Batches

CONFIG = Path(__file__).with_suffix(".yaml")
WIDTH = 8
TEACHER_LAYERS, TIME = 64, 4.0
LOUD = 2.0
"""The scale of the teacher's first weights in each layer: its nonlinearities are well used."""


class Layer(nn.Module):
    """The feed-forward part of a pre-LN transformer layer: x plus an MLP of the normalised x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(self.first.weight, std=1 / math.sqrt(WIDTH))
        nn.init.zeros_(self.first.bias)
        nn.init.normal_(self.second.weight, std=0.3 / math.sqrt(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) to the same."""
        return x + self.second(torch.tanh(self.first(self.norm(x))))


@lru_cache(maxsize=1)
def teacher() -> list[Layer]:
    """The same layers every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [Layer() for _ in range(TEACHER_LAYERS)]
        for layer in layers:
            nn.init.normal_(layer.first.weight, std=LOUD / math.sqrt(WIDTH))
            nn.init.normal_(layer.first.bias, std=0.5)
            nn.init.normal_(layer.second.weight, std=1 / math.sqrt(WIDTH))
    return layers


def answer(x: Tensor) -> Tensor:
    """What the teacher makes of vectors."""
    with torch.no_grad():
        for layer in teacher():
            x = x + TIME / TEACHER_LAYERS * (layer(x) - x)
    return x


class Lessons(Batches):
    """Batches of vectors and what the teacher makes of them, as functions of seed, split and step."""

    def __init__(self, config: TrainConfig) -> None:
        self.seed = config.seed
        generator = torch.Generator().manual_seed(1)
        self.scale = answer(torch.randn(2048, WIDTH, generator=generator)).var(0).mean().sqrt()

    def batch(self, split: str, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both (size, width); targets have a variance of about 1."""
        held_out = split != "train"
        generator = torch.Generator().manual_seed((-1 if held_out else self.seed) % 1000 * 1_000_003 + step)
        inputs = torch.randn(size, WIDTH, generator=generator)
        return inputs, answer(inputs) / self.scale


def error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error, summed over the samples and averaged over the width."""
    return (outputs - targets).square().mean(1).sum()


def student(config: TrainConfig) -> rayllp.LayerStack:
    """A network of `config`'s depth."""
    head = partial(nn.Linear, WIDTH, WIDTH)
    return rayllp.LayerStack(embed=nn.Identity(), layers=[Layer] * config.model.layers, head=head, loss=error, stochastic=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    config = rayllp.load_config(CONFIG, [f"model.layers={arguments.layers}", f"steps={arguments.steps}"])
    found = rayllp.train(config, model=student(config), batches=Lessons(config))
    print(f"{arguments.layers} layers: held-out error {found.validation_loss:.4f} of the targets' variance")


if __name__ == "__main__":
    main()
