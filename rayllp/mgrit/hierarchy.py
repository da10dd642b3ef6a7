"""Levels, C- and F-points and blocks of layers: who owns what, on which level (arXiv:2601.09026, section 3.2).

The unknowns of level l are its *points*. On the finest level point n is the input of layer n, so the worker that owns a layer
owns its input; the network's output is what the last sweep produces from the last point. Point k of level l + 1 stands for
the k-th C-point of level l, and step k of level l + 1 stands for the interval that begins there.

No rule asks that anything divides: blocks may be uneven, the last interval may be short, a worker may own no C-point.
The adjoint runs on the same intervals in reverse: `Hierarchy.adjoint()` mirrors every level.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from rayllp.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level, in the order in which its steps are taken ("time").

    Attributes:
        layers: the layer whose operator step j evaluates.
        owners: the worker that owns that layer, hence point j.
        ratios: length of step j over that layer's own step (1 on the finest level).
        c_points: the points that begin coarse intervals, the first being 0. On the coarsest level only point 0.
    """

    layers: tuple[int, ...]
    owners: tuple[int, ...]
    ratios: tuple[float, ...]
    c_points: tuple[int, ...]

    @property
    def size(self) -> int:
        """Steps on this level, as many as points."""
        return len(self.layers)

    @cached_property
    def is_c_point(self) -> frozenset[int]:
        """The C-points, for asking whether a point is one."""
        return frozenset(self.c_points)

    @cached_property
    def _owned(self) -> dict[int, range]:
        found, start = {}, 0
        for rank, points in groupby(self.owners):
            stop = start + len(list(points))
            found[rank] = range(start, stop)
            start = stop
        return found

    def local(self, rank: int) -> range:
        """The points that `rank` owns: contiguous, perhaps none."""
        return self._owned.get(rank, range(0))

    def runs(self, rank: int) -> list[range]:
        """The owned points, cut before each C-point: the pieces of intervals that lie on `rank`."""
        points = self.local(rank)
        inside = self.c_points[bisect_right(self.c_points, points.start) : bisect_left(self.c_points, points.stop)]
        cuts = [points.start, *inside, points.stop]
        return [range(a, b) for a, b in pairwise(cuts)] if points else []

    def alike(self, runs: Sequence[range]) -> list[range]:
        """Of these runs, the whole intervals of the greatest length, if there are several."""
        found = [run for run in runs if run.start in self.is_c_point and (run.stop in self.is_c_point or run.stop == self.size)]
        found = [run for run in found if len(run) == max(map(len, found))]
        return found if len(found) > 1 else []

    def mirrored(self) -> "Level":
        """The same intervals with time reversed."""
        ends = (*self.c_points[1:], self.size)
        return Level(
            layers=self.layers[::-1],
            owners=self.owners[::-1],
            ratios=self.ratios[::-1],
            c_points=tuple(self.size - end for end in reversed(ends)),
        )


class Transfer(NamedTuple):
    """A C-point between its level and the next: point `point` there is point `coarse` here, and these workers own them."""

    coarse: int
    point: int
    owner: int
    coarse_owner: int


@dataclass(frozen=True)
class Hierarchy:
    """All levels of one solve, finest first."""

    levels: tuple[Level, ...]

    @cached_property
    def transfers(self) -> tuple[dict[int, list[Transfer]], ...]:
        """By level and worker: the C-points that the worker owns on that level or the next, but for the first, which is given."""
        found = []
        for fine, coarse in pairwise(self.levels):
            mine: dict[int, list[Transfer]] = {}
            for k, point in list(enumerate(fine.c_points))[1:]:
                transfer = Transfer(k, point, fine.owners[point], coarse.owners[k])
                for rank in {transfer.owner, transfer.coarse_owner}:
                    mine.setdefault(rank, []).append(transfer)
            found.append(mine)
        return tuple(found)

    @cached_property
    def coarse_layers(self) -> frozenset[int]:
        """The layers that coarse levels evaluate."""
        return frozenset(layer for level in self.levels[1:2] for layer in level.layers)

    def adjoint(self) -> "Hierarchy":
        """The hierarchy of the adjoint solve: the same intervals, the same layers at the C-points, last layer first.

        A coarse adjoint step is thus the exact transpose of the coarse forward step over the same interval, and reads the graph
        that the forward sweep recorded at that interval's C-point.
        """
        return self._mirrored

    @cached_property
    def _mirrored(self) -> "Hierarchy":
        return Hierarchy(tuple(level.mirrored() for level in self.levels))


def split_evenly(layers: int, workers: int) -> tuple[int, ...]:
    """Block sizes that differ by at most one, larger blocks first."""
    return tuple(layers // workers + (p < layers % workers) for p in range(workers))


def build_hierarchy(
    *,
    blocks: Sequence[int],
    levels: int,
    coarsening: int | Sequence[int],
    step_sizes: Sequence[float] | None = None,
) -> Hierarchy:
    """The forward hierarchy over `sum(blocks)` layers.

    Args:
        blocks: layers per worker, in order of the layers; zeros are allowed.
        levels: number of levels, 1 for the serial solve.
        coarsening: c_f, one for all levels or one per coarse level.
        step_sizes: Δt of each layer (all 1 if None); only their ratios matter.

    Raises:
        SettingsError: fewer than one layer or level, a factor below 2, or a level that would be left with one step.
    """
    factors = (coarsening,) * (levels - 1) if isinstance(coarsening, int) else tuple(coarsening)[: levels - 1]
    return _build(tuple(blocks), levels, factors, None if step_sizes is None else tuple(step_sizes))


@lru_cache(maxsize=64)  # settings are checked by building one, and a planner asks for the same many times
def _build(blocks: tuple[int, ...], levels: int, factors: tuple[int, ...], step_sizes: tuple[float, ...] | None) -> Hierarchy:
    layers = sum(blocks)
    sizes = list(step_sizes) if step_sizes is not None else [1.0] * layers
    _check(layers, blocks, levels, factors, sizes)

    layer_of, length, built = list(range(layers)), sizes, []
    owner_of_layer = [rank for rank, block in enumerate(blocks) for _ in range(block)]
    for level in range(levels):
        points = len(layer_of)
        factor = factors[level] if level < levels - 1 else points
        c_points = tuple(range(0, points, factor))
        built.append(
            Level(
                layers=tuple(layer_of),
                owners=tuple(owner_of_layer[n] for n in layer_of),
                ratios=tuple(dt / sizes[n] for dt, n in zip(length, layer_of, strict=True)),
                c_points=c_points,
            )
        )
        cumulative = [0.0, *accumulate(length)]
        ends = (*c_points[1:], points)
        length = [cumulative[end] - cumulative[start] for start, end in zip(c_points, ends, strict=True)]
        layer_of = [layer_of[start] for start in c_points]
        if level < levels - 1 and len(layer_of) < 2:
            raise SettingsError(
                f"coarsening {list(factors[: level + 1])} of {layers} layers leaves one coarse step on level {level + 1}, so nothing "
                f"would run in parallel: use a smaller mgrit.coarsening, fewer mgrit.levels than {levels}, or more layers"
            )
    return Hierarchy(tuple(built))


def _check(layers: int, blocks: Sequence[int], levels: int, factors: Sequence[int], sizes: list[float]) -> None:
    if layers < 1 or any(block < 0 for block in blocks):
        raise SettingsError(f"blocks {tuple(blocks)}: need at least one layer and no negative block")
    if levels < 1:
        raise SettingsError(f"{levels} levels: need at least 1 (1 is the serial solve)")
    if len(factors) != levels - 1:
        raise SettingsError(f"coarsening {list(factors)} names {len(factors)} factors, but {levels} levels need {levels - 1}")
    if any(factor < 2 for factor in factors):
        raise SettingsError(f"coarsening {list(factors)}: every factor must be at least 2")
    if len(sizes) != layers or any(size <= 0 for size in sizes):
        raise SettingsError(f"step sizes must be {layers} positive numbers, one a layer; got {sizes}")
