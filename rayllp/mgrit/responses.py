"""How a layer's increment responds to a change of its input: a linear map of low rank, fitted to what sweeps have shown.

Where a sweep changes a layer's input by e, its increment would change, too, and so would the inputs of all layers behind it. A sweep that
adds up increments alone sees none of that, and a chain of layers that depend strongly on each other converges by one layer a sweep. With a
map A_n for each layer,

    u_{n+1} = u_n + d_n + α A_n (change of u_n),

a change goes through the whole window at once. This is a quasi-Newton method: with A_n = ∂d_n/∂u_n it would be Newton's, which solves the
layers' recurrence in parallel as well (DEER, arXiv:2309.12252). A_n acts on each token by itself and is the same for all of them. How
strongly a token responds differs: α is what explains best how its increment has changed from the sweep before to this one, and 1 in a
layer's first sweep. A rank of 8 is enough: on networks of width 64 a full matrix saved no more sweeps.

A map is fitted to pairs of changes (Δu, Δd) from one sweep of a layer to the next, where each token counts alike: by ridge regression on
the directions in which inputs change most, cut to the rank that explains most of Δd.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllp.state import State, add, combine, like, subtract, tensors

RANK = 8
"""Rank of a map, at most."""
DIRECTIONS = 16
"""Number of directions of the input's change that a fit looks at."""
MOST_SCALED = 1.5
"""Bound of α."""
RIDGE = 0.1
"""Weight of the ridge over the mean square of the changes in these directions."""


@dataclass(frozen=True)
class Response:
    """The map of one layer.

    Attributes:
        maps: for each tensor of the state, of width d, two factors of the map: shapes (d, rank) and (rank, d).
    """

    maps: tuple[tuple[Tensor, Tensor], ...]

    def follow(self, increment: State, error: State, shown: tuple[State, State] | None = None) -> State:
        """Return an increment at a state that is off by `error` from where it was evaluated.

        Args:
            increment: as evaluated.
            error: by how much the state is off.
            shown: the latest change of the state, and how the increment has changed with it; None in a layer's first sweep.
        """
        moved = self._of(error)
        if shown is not None:
            moved = combine(_scaled, moved, self._of(shown[0]), shown[1])
        return add(increment, moved)

    def _of(self, change: State) -> State:
        parts = zip(tensors(change), self.maps, strict=True)
        return like(change, tuple((_rows(part) @ down @ up).view_as(part) for part, (down, up) in parts))


def _scaled(moved: Tensor, expected: Tensor, change: Tensor) -> Tensor:
    """Return what the map says of each token, times α: what `change` is of `expected`, the same of an earlier change."""
    squares = (expected * expected).sum(-1, keepdim=True) + torch.finfo(expected.dtype).tiny
    return moved * ((change * expected).sum(-1, keepdim=True) / squares).clamp(0.0, MOST_SCALED)


class ResponseFit:
    """Fits the response of one layer to what its sweeps show, over one solve or several."""

    def __init__(self) -> None:
        self._last: tuple[State, State] | None = None
        self._fits: list[_Fit] = []

    def begin_solve(self) -> None:
        """The next input is that of another solve: it makes no pair with the last one."""
        self._last = None

    def observe(self, state: State, increment: State) -> None:
        """Take note of a layer's increment at a state."""
        if self._last is not None:
            steps, changes = tensors(subtract(state, self._last[0])), tensors(subtract(increment, self._last[1]))
            self._fits = self._fits or [_Fit(_width(step.shape)) for step in steps]
            for fit, step, change in zip(self._fits, steps, changes, strict=True):
                fit.add(step, change)
        self._last = state, increment

    def factors(self) -> list[Tensor]:
        """Return the map's two factors for each tensor of the state, one pair after the other, float32; none if nothing was shown."""
        return [factor for fit in self._fits for factor in fit.factors()]


class _Fit:
    """Ridge regression of one tensor's changes of the increment on those of the input.

    Args:
        width: d, the tensor's last dimension.
    """

    def __init__(self, width: int) -> None:
        self._rank, self._count = _rank(width), min(width, DIRECTIONS)
        self._basis: Tensor | None = None  # the directions, shape (d, count)
        self._squares = self._products = torch.zeros(())

    def add(self, step: Tensor, change: Tensor) -> None:
        """Add the changes of all tokens, each divided by the norm of its input's."""
        x, y = _rows(step.detach()).float(), _rows(change.detach()).float()
        norms = x.norm(dim=-1, keepdim=True)
        scale = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
        x, y = x * scale, y * scale
        if self._basis is None:
            self._basis = self._directions(x)
        reduced = (x @ self._basis).double()
        self._squares = self._squares.to(reduced) + reduced.T @ reduced
        self._products = self._products.to(reduced) + reduced.T @ y.double()

    def _directions(self, x: Tensor) -> Tensor:
        """Return an orthonormal basis of the directions in which these rows are largest, by two subspace iterations."""
        seeded = torch.Generator().manual_seed(0)
        basis = torch.randn(x.shape[1], self._count, generator=seeded).to(x)
        for _ in range(2):
            basis = torch.linalg.qr(x.T @ (x @ basis)).Q
        return basis

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the map of rank RANK, at most, that explains most of the changes."""
        assert self._basis is not None
        width, rank = self._basis.shape[0], self._rank
        size = self._squares.diagonal().mean()
        if not (size > 0 and size.isfinite() and self._products.isfinite().all()):
            nothing = torch.zeros(width, rank, device=self._basis.device)
            return nothing, nothing.T.clone()
        lower = torch.linalg.cholesky(self._squares + RIDGE * size * torch.eye(self._count).to(self._squares))
        # With G = L Lᵀ the fit is G⁻¹ H = L⁻ᵀ (L⁻¹ H), and the singular values of L⁻¹ H say what each direction explains.
        left, values, right = torch.linalg.svd(torch.linalg.solve_triangular(lower, self._products, upper=False), full_matrices=False)
        down = torch.linalg.solve_triangular(lower.T, left[:, :rank] * values[:rank], upper=True)
        return self._basis @ down.float(), right[:rank].float()


def factor_shapes(shapes: Sequence[torch.Size]) -> list[torch.Size]:
    """Return the shapes of a layer's factors, in the order of `ResponseFit.factors`, for a state of these shapes."""
    widths = [_width(shape) for shape in shapes]
    return [torch.Size(each) for width in widths for each in ((width, _rank(width)), (_rank(width), width))]


def _width(shape: torch.Size) -> int:
    return shape[-1] if shape else 1


def _rank(width: int) -> int:
    return min(width, RANK)


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor's values as rows of its width; shape (rows, d)."""
    return tensor.reshape(tensor.shape[:-1].numel(), _width(tensor.shape))
