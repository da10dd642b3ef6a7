"""The optimizer Muon, with Newton–Schulz iterations that take all matrices of one shape in one call.

torch's Muon takes one matrix after the other, in about 80 small operations per transformer layer. In narrow layers their overhead exceeds
the arithmetic, all the more on a GPU, where each is a kernel launch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CALL_BYTES = 4 * 2**20
"""The most bytes of matrices in one call, which needs a few times as much memory. Larger matrices keep a device busy one by one."""


class Muon(torch.optim.Muon):
    """torch's Muon (arXiv:2502.16982) with updates as large as AdamW's, so that one learning rate and weight decay serve both.

    An update is the gradient's Nesterov momentum, orthogonalised, times 0.2 √max(rows, columns) ("match_rms_adamw"). The factor is the
    same for a matrix and its transpose, so it does not matter which of them a module keeps.

    In bfloat16 the results are those of `torch.optim.Muon`; on the CPUs that were tried, to the last bit.

    Args:
        matrices: the parameters to update.
        precision: dtype of the Newton–Schulz iteration. In bfloat16 the last digits of a gradient, which depend on the number of workers,
            may change an update by half a per cent; in the weights' own precision they change its last digits only.
        settings: other settings of `torch.optim.Muon`.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], *, precision: torch.dtype, **settings: Any) -> None:
        super().__init__(matrices, adjust_lr_fn="match_rms_adamw", **settings)
        self.precision = precision

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # there is no closure to evaluate again
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            found = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if found:
                matrices, gradients = zip(*found, strict=True)
                self._update(matrices, gradients, group)

    def _update(self, matrices: tuple[nn.Parameter, ...], gradients: tuple[Tensor, ...], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        averages = [self._average(p) for p in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, averages, momentum)
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        for places in _calls(updates, self.precision):
            whole = orthogonalise(torch.stack([_wide(updates[n]) for n in places]).to(self.precision), group)
            rows = [row.T if _is_tall(updates[n]) else row for n, row in zip(places, whole.to(updates[0].dtype), strict=True)]
            torch._foreach_add_([matrices[n] for n in places], rows, alpha=-lr * 0.2 * max(rows[0].shape) ** 0.5)

    def _average(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def orthogonalise(wide: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the matrices with singular values near 1 (0.7 to 1.2) in place of their own, by quintic Newton–Schulz iterations.

    Args:
        wide: shape (matrices, rows, columns), no more rows than columns.
        group: the optimizer's settings for these matrices.
    """
    a, b, c = group["ns_coefficients"]
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide


def _calls(matrices: Sequence[Tensor], precision: torch.dtype) -> Iterator[list[int]]:
    """Yield the positions of matrices that are taken in one call: of one shape or its transpose, and together at most CALL_BYTES."""
    places: dict[tuple[int, ...], list[int]] = {}
    for n, matrix in enumerate(matrices):
        places.setdefault(tuple(_wide(matrix).shape), []).append(n)
    for shape, same in places.items():
        count = max(1, CALL_BYTES // (shape[0] * shape[1] * precision.itemsize))
        yield from (same[start : start + count] for start in range(0, len(same), count))


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if _is_tall(matrix) else matrix
