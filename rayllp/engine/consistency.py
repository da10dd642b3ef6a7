"""The consistency penalty, which teaches the layers of a coarse interval to do what the coarse step over it predicts.

R = Σ_k mean_b ‖Φ_fine(C_k) − Φ_c(C_k)‖² / ‖C_k‖² over coarse intervals k and samples b. Here Φ_fine goes through an interval's layers, and
Φ_c(C) = C + ω·c_f·(Φ(C) − C) is its coarse step. All that R needs is at hand when the adjoint arrives at the interval: C, the output of the
C-point's layer, and the interval's end. So R costs no layer evaluation and no message. Its gradient enters as *seeds*, which are added to
the adjoint as it passes through the interval. In a solve of several levels the last adjoint sweep of an interval ends at its C-point, so R
changes the interval's own layers only. In an exact solve the seeds travel on to earlier layers: C counts as variable in R's numerator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rayllp.state import State, combine, like, tensors


@dataclass(frozen=True)
class Interval:
    """One coarse interval.

    Attributes:
        start: its first layer, the C-point's.
        stop: the layer after its last one.
        weight: ω of the coarse operator.
    """

    start: int
    stop: int
    weight: float

    @property
    def length(self) -> int:
        """The number of its layers."""
        return self.stop - self.start

    @property
    def ratio(self) -> float:
        """The factor in Φ_c(C) = C + ratio·(Φ(C) − C): ω times the coarse step's length in fine steps."""
        return self.weight * self.length


@dataclass
class Consistency:
    """The penalty within one computation of gradients on one worker.

    Args:
        weight: μ over the number of samples in the global batch, so that parts and replicas add up to the mean.
        intervals: this worker's coarse intervals, by first layer. Layers are counted from the first middle layer.
        value: this worker's share of R, times the number of samples: a float64 scalar, to which each interval adds its part.
    """

    weight: float
    intervals: Mapping[int, Interval]
    value: Tensor
    _seeds: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_last = {interval.stop - 1: interval for interval in self.intervals.values()}

    def seed(self, interval: Interval, begin: State, first: State, end: State, *, counted: bool = True) -> State:
        """Return the penalty's gradient at the interval's end, 2μ r_k / ‖C_k‖², and add the interval's part of R to `value`.

        Args:
            begin: the state C at the C-point.
            first: the state after the C-point's layer.
            end: the state at the interval's end.
            counted: False leaves `value` as it is.
        """
        with torch.no_grad():
            gaps = [e - torch.lerp(c, f, interval.ratio) for c, f, e in zip(*map(tensors, (begin, first, end)), strict=True)]
            inverse_B = _inverse_squares(tensors(begin), tensors(end))
            if counted:
                self.value += (_squares(gaps) * inverse_B).sum().double()
            scale_B = 2 * self.weight * inverse_B
            return like(end, tuple(gap * scale_B.view(-1, *[1] * (gap.ndim - 1)) for gap in gaps))

    def add(self, other: "Consistency") -> None:
        """Add the value that was found for another part of the batch."""
        self.value += other.value

    # For an adjoint solve that goes layer by layer ------------------------------------------------------------------------------

    def ends_with(self, layer: int) -> Interval | None:
        """Return the interval whose last layer this is, if any."""
        return self._by_last.get(layer)

    def keep(self, interval: Interval, seed: State) -> None:
        """Keep an interval's seed until the adjoint arrives at its C-point."""
        self._seeds[interval.start] = seed

    def into(self, layer: int, lam: State) -> State:
        """Return λ at the output of a C-point's layer, with the coarse step's seed added. At other layers λ is unchanged."""
        return lam if layer not in self._seeds else _add(lam, self._seeds[layer], -self.intervals[layer].ratio)

    def out_of(self, layer: int, lam: State) -> State:
        """Return λ at a C-point, with the seed of the coarse step's identity part added. At other layers λ is unchanged."""
        return lam if layer not in self._seeds else _add(lam, self._seeds.pop(layer), self.intervals[layer].ratio - 1)

    # For plain autograd -------------------------------------------------------------------------------------------------------------

    def hooks(self, start: int) -> "PenaltyHooks":
        """Return hooks for one forward pass through the interval that begins with layer `start`."""
        return PenaltyHooks(self, self.intervals[start])


class PenaltyHooks:
    """Adds an interval's seeds in plain autograd: states pass through unchanged, and their gradients get the seeds on the way back."""

    def __init__(self, penalty: Consistency, interval: Interval) -> None:
        self.penalty, self.interval = penalty, interval
        self._begin: State | None = None
        self._first: State | None = None
        self._seed: State | None = None

    def begin(self, state: State) -> State:
        """Pass on the C-point's state. Its gradient gets the seed of the coarse step's identity part."""
        self._begin = state
        return self._pass(state, self.interval.ratio - 1)

    def first(self, state: State) -> State:
        """Pass on the state after the C-point's layer. Its gradient gets the coarse step's seed."""
        self._first = state
        return self._pass(state, -self.interval.ratio)

    def end(self, state: State) -> State:
        """Pass on the interval's end, and compute the penalty's seed there."""
        assert self._begin is not None
        assert self._first is not None
        # With recomputation the interval comes here twice, and counts once.
        self._seed = self.penalty.seed(self.interval, self._begin, self._first, state, counted=self._seed is None)
        self._begin = self._first = None
        return self._pass(state, 1.0)

    def _pass(self, state: State, factor: float) -> State:
        return like(state, tuple(_Seeded.apply(part, self, index, factor) for index, part in enumerate(tensors(state))))

    def part(self, index: int) -> Tensor:
        """Return tensor number `index` of the seed."""
        assert self._seed is not None
        return tensors(self._seed)[index]


class _Seeded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, hooks: PenaltyHooks, index: int, factor: float) -> Tensor:
        ctx.hooks, ctx.index, ctx.factor = hooks, index, factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return torch.add(gradient, ctx.hooks.part(ctx.index), alpha=ctx.factor), None, None, None


def _squares(parts: Sequence[Tensor]) -> Tensor:
    """Return the squared norm of each sample, shape (samples,)."""
    return torch.stack([part.square().flatten(1).sum(1) for part in parts]).sum(0)


def _inverse_squares(begin: Sequence[Tensor], end: Sequence[Tensor]) -> Tensor:
    """Return 1 / ‖C‖² of each sample.

    Where C is zero, or negligible compared with the interval's end, the norm of the end takes its place; the result is 0 where that is
    zero, too.
    """
    begins_B, ends_B = _squares(begin), _squares(end)
    sizes_B = torch.where(begins_B > torch.finfo(begins_B.dtype).eps * ends_B, begins_B, ends_B)
    return torch.where(sizes_B > 0, 1 / sizes_B, 0)


def _add(lam: State, seed: State, factor: float) -> State:
    return combine(lambda a, b: torch.add(a, b, alpha=factor), lam, like(lam, tensors(seed)))
