"""Layers that take a fixed time, as if a device computed them, so that many workers can run at once on a machine with few cores.

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
from rayllp.data.base import Batches, Inputs
from rayllp.errors import SettingsError
from rayllp.models import LayerStack
from rayllp.plan import Costs
from rayllp.quantities import TIMES, quantity


@dataclass(frozen=True)
class Emulation:
    """Seconds that the parts of a layer take for one batch."""

    forward: float
    input_gradient: float
    weight_gradient: float

    @staticmethod
    def parse(text: str) -> "Emulation":
        """Read times from text: `10ms` for each part, or `10ms,8ms,6ms` for forward, input gradient and weight gradient.

        Raises:
            SettingsError: the text is neither of these.
        """
        times = [quantity(part.strip(), "--emulate", TIMES, zero=True) for part in text.split(",")]
        if len(times) not in (1, 3):
            raise SettingsError(f"--emulate {text}: give one time for all (10ms), or three: forward, input gradient, weight gradient")
        return Emulation(*(times * 3)[:3])

    @property
    def serial(self) -> float:
        """Seconds of a layer in an exact step."""
        return self.forward + self.input_gradient + self.weight_gradient

    def scaled(self, factor: float) -> "Emulation":
        """Return times that are `factor` times as long, as for another batch size."""
        return Emulation(self.forward * factor, self.input_gradient * factor, self.weight_gradient * factor)

    def costs(self, message: float = 0.0) -> Costs:
        """Return these times as the costs of a prediction; messages take `message` seconds."""
        full = self.input_gradient + self.weight_gradient
        return Costs(forward=self.forward, record=self.forward, input_gradient=self.input_gradient, full_gradient=full, message=message)


class Wait:
    """When called, sleeps until `seconds` have passed since it was made."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def __call__(self) -> None:
        left = self.end - time.perf_counter() - _oversleep_s()
        if left > 0:
            time.sleep(left)


@cache
def _oversleep_s() -> float:
    """Return how much longer than asked the system sleeps. It is subtracted, since a timer causes it and not the emulated device."""
    excess = []
    for _ in range(15):
        started = time.perf_counter()
        time.sleep(2e-3)
        excess.append(time.perf_counter() - started - 2e-3)
    return median(excess)


class _Through(torch.autograd.Function):
    """Clamps x to [-1, 1]; its gradient takes the emulated time of an input gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: Emulation) -> Tensor:
        ctx.times, y = times, x.clamp(-1, 1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        wait = Wait(ctx.times.input_gradient)
        (y,) = ctx.saved_tensors
        input_gradient = gradients[0] * (y.abs() < 1)
        wait()
        return input_gradient, None


class _Weight(torch.autograd.Function):
    """Broadcasts a bias; its gradient, if needed, takes the emulated time of a weight gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, times: Emulation) -> Tensor:
        ctx.times = times
        return bias.expand_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        wait = Wait(ctx.times.weight_gradient)
        bias_gradient = gradients[0].flatten(0, -2).sum(0)
        wait()
        return None, bias_gradient, None


class EmulatedLayer(nn.Module):
    """Computes x + clamp(x, -1, 1) + bias in the emulated time. The increment is bounded, so that states grow slowly.

    Args:
        width: size of the last dimension.
        times: the emulated times.
        batch: number of samples to which the times apply, others taking a proportional time; None: they apply to any number.
    """

    def __init__(self, width: int, times: Emulation, batch: int | None = None) -> None:
        super().__init__()
        self.bias, self.times, self.batch = nn.Parameter(torch.zeros(width)), times, batch

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the increment once the forward's time has passed; gradients take their times later."""
        times = self.times if self.batch is None else self.times.scaled(len(x) / self.batch)
        wait = Wait(times.forward)
        y = _Through.apply(x, times)
        z = x + y + _Weight.apply(y.detach(), self.bias, times)  # type: ignore[no-untyped-call]
        wait()
        return z  # type: ignore[no-any-return]


class RandomBatches(Batches):
    """Random first states and targets of the settings' shapes."""

    def __init__(self, config: TrainConfig) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        shape = config.batch_size, config.sequence_length, config.model.width
        self._inputs, self._targets = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    def batch(self, split: str, step: int, size: int) -> tuple[Inputs, Tensor]:
        """Return the first `size` samples, the same at every step."""
        return self._inputs[:size], self._targets[:size]


def emulated_stack(config: TrainConfig, times: Emulation, *, batch: int | None = None) -> LayerStack:
    """Return a network of `config`'s depth and shapes whose layers take these times; its embedding and head take none.

    Args:
        config: the settings.
        times: the emulated times.
        batch: as for `EmulatedLayer`.
    """
    layer = partial(EmulatedLayer, config.model.width, times, batch)
    loss = partial(functional.mse_loss, reduction="sum")
    return LayerStack(embed=nn.Identity(), layers=[layer] * config.model.layers, head=nn.Identity(), loss=loss, stochastic=False)
