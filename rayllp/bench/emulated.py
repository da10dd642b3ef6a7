"""Layers that take a fixed time, as if a device computed them: many workers then run at once on a machine of few cores.

A layer's forward, its input gradient and its weight gradient each do a little real tensor work and sleep for the rest of their time.
"""

import time
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayllp.config import TrainConfig
from rayllp.data.base import Inputs
from rayllp.errors import SettingsError
from rayllp.models import LayerStack
from rayllp.plan import Costs
from rayllp.quantities import TIMES, quantity


@dataclass(frozen=True)
class Emulation:
    """Seconds that a layer takes for a batch."""

    forward: float
    input_gradient: float
    weight_gradient: float

    @staticmethod
    def parse(text: str) -> "Emulation":
        """`10ms`: each; `10ms,8ms,6ms`: forward, input gradient, weight gradient.

        Raises:
            SettingsError: neither of these.
        """
        times = [quantity(part.strip(), "--emulate", TIMES, zero=True) for part in text.split(",")]
        if len(times) not in (1, 3):
            raise SettingsError(f"--emulate {text}: give one time for all (10ms), or three: forward, input gradient, weight gradient")
        return Emulation(*(times * 3)[:3])

    @property
    def serial(self) -> float:
        """A layer's time in an exact step."""
        return self.forward + self.input_gradient + self.weight_gradient

    def scaled(self, factor: float) -> "Emulation":
        """Layers that take so many times as long, as for another batch."""
        return Emulation(self.forward * factor, self.input_gradient * factor, self.weight_gradient * factor)

    def costs(self, message: float = 0.0) -> Costs:
        """For predictions."""
        full = self.input_gradient + self.weight_gradient
        return Costs(forward=self.forward, record=self.forward, input_gradient=self.input_gradient, full_gradient=full, message=message)


class Wait:
    """Until `seconds` have passed since it was made."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def __call__(self) -> None:
        left = self.end - time.perf_counter() - _oversleep_s()
        if left > 0:
            time.sleep(left)


@cache
def _oversleep_s() -> float:
    """What the system sleeps longer than it is asked to: a timer's doing, not a device's."""
    found = []
    for _ in range(15):
        started = time.perf_counter()
        time.sleep(2e-3)
        found.append(time.perf_counter() - started - 2e-3)
    return median(found)


class _Through(torch.autograd.Function):
    """x between -1 and 1, whose gradient takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: Emulation) -> Tensor:
        ctx.times, y = times, x.clamp(-1, 1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        wait = Wait(ctx.times.input_gradient)
        (y,) = ctx.saved_tensors
        found = gradients[0] * (y.abs() < 1)
        wait()
        return found, None


class _Weight(torch.autograd.Function):
    """A bias, whose gradient takes its time, where it is asked for."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, times: Emulation) -> Tensor:
        ctx.times = times
        return bias.expand_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        wait = Wait(ctx.times.weight_gradient)
        found = gradients[0].flatten(0, -2).sum(0)
        wait()
        return None, found, None


class EmulatedLayer(nn.Module):
    """x + (x between -1 and 1) + bias, slowly: it grows, but not much.

    Args:
        batch: samples that take the times, of which a part takes its share; None: any number of samples takes them.
    """

    def __init__(self, width: int, times: Emulation, batch: int | None = None) -> None:
        super().__init__()
        self.bias, self.times, self.batch = nn.Parameter(torch.zeros(width)), times, batch

    def forward(self, x: Tensor) -> Tensor:
        """x plus a little real arithmetic, after the forward's time; its gradients take theirs."""
        times = self.times if self.batch is None else self.times.scaled(len(x) / self.batch)
        wait = Wait(times.forward)
        y = _Through.apply(x, times)
        z = x + y + _Weight.apply(y.detach(), self.bias, times)  # type: ignore[no-untyped-call]
        wait()
        return z  # type: ignore[no-any-return]


class RandomBatches:
    """States to begin with, and targets, of the settings' shapes."""

    def __init__(self, config: TrainConfig) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        shape = config.batch_size, config.sequence_length, config.model.width
        self._inputs, self._targets = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    def batch(self, split: str, step: int, size: int) -> tuple[Inputs, Tensor]:
        """The same each time."""
        return self._inputs[:size], self._targets[:size]


def emulated_stack(config: TrainConfig, times: Emulation, *, batch: int | None = None) -> LayerStack:
    """A network of `config`'s depth and shapes whose layers take these times; its embedding and head take none.

    Args:
        batch: as of `EmulatedLayer`.
    """
    layer = partial(EmulatedLayer, config.model.width, times, batch)
    loss = partial(functional.mse_loss, reduction="sum")
    return LayerStack(embed=nn.Identity(), layers=[layer] * config.model.layers, head=nn.Identity(), loss=loss, stochastic=False)
