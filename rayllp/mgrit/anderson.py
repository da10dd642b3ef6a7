"""Anderson acceleration of the C-point values (Walker and Ni 2011): a cycle is a fixed-point map of them.

Needs two cycles before it can mix, so three iterations where the first is the coarse propagation. Each mixing costs one all-reduce of at
most window·(window + 1) numbers.
"""

from collections import deque

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag
from rayllp.state import State, combine, subtract, tensors

Values = dict[int, State]


class Anderson:
    """Mixes what cycles make of this worker's C-points.

    Args:
        window: how many differences of earlier cycles are used, at least 1.
    """

    def __init__(self, window: int, channel: Channel, tag: MessageTag) -> None:
        self.channel, self.tag = channel, tag
        self._steps: deque[Values] = deque(maxlen=window)  # differences of residuals
        self._moves: deque[Values] = deque(maxlen=window)  # differences of new values
        self._last: tuple[Values, Values] | None = None

    def mix(self, before: Values, after: Values) -> Values:
        """C-points to go on with, from their values before and after a cycle."""
        residual = {point: subtract(after[point], before[point]) for point in after}
        if self._last is not None:
            self._steps.append(_difference(residual, self._last[0]))
            self._moves.append(_difference(after, self._last[1]))
        self._last = residual, after
        if not self._steps:
            return after
        weights = self._weights(residual).tolist()
        mixed = dict(after)
        for weight, move in zip(weights, self._moves, strict=True):
            mixed = {point: combine(lambda x, d, w=weight: x - w * d, mixed[point], move[point]) for point in mixed}
        return mixed

    def _weights(self, residual: Values) -> Tensor:
        """Least squares over all workers: the combination of earlier differences that leaves the smallest residual."""
        device = _device(residual)
        rows = [torch.stack([_dot(a, b, device) for b in (*self._steps, residual)]) for a in self._steps]
        gram = self.channel.all_reduce(torch.stack(rows), self.tag.at("Anderson", 0)).cpu()
        return torch.linalg.lstsq(gram[:, :-1], gram[:, -1:], driver="gelsd").solution.flatten()


def _difference(a: Values, b: Values) -> Values:
    return {point: subtract(a[point], b[point]) for point in a}


def _device(values: Values) -> torch.device:
    return next((part.device for state in values.values() for part in tensors(state)), torch.device("cpu"))


def _dot(a: Values, b: Values, device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for point in a:
        for x, y in zip(tensors(a[point]), tensors(b[point]), strict=True):
            total += (x.double() * y.double()).sum()
    return total
