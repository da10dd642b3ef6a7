"""Levels, C-points and F-points, and which worker owns which of them (arXiv:2601.09026, section 3.2).

The unknowns of a level are its *points*. On the finest level point n is the input of layer n, so the worker that owns a layer also owns its
input; the network's output is what the last sweep computes from the last point. Point k of level l + 1 stands for the k-th C-point of
level l, and step k of level l + 1 stands for the coarse interval that begins there.

Nothing has to divide evenly: blocks may differ in size, the last interval may be short, and a worker may own no C-point at all.
The adjoint runs on the same intervals in reverse: `Hierarchy.adjoint()` mirrors every level.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

from rayllp.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level. Points and steps are numbered in the order in which the steps are taken ("time").

    Attributes:
        layers: by step, the layer whose operator the step evaluates.
        owners: by step, the worker that owns this layer, and with it the point where the step begins.
        ratios: by step, its length over that of a fine step: the number of layers that it goes over (1 on the finest level).
        c_points: the points that begin coarse intervals, of which the first is 0. On the coarsest level only point 0.
    """

    layers: tuple[int, ...]
    owners: tuple[int, ...]
    ratios: tuple[float, ...]
    c_points: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of steps on this level, which is also the number of points: the state after the last step is no point."""
        return len(self.layers)

    @cached_property
    def is_c_point(self) -> frozenset[int]:
        """The C-points as a set, for membership tests."""
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
        """Return the points that worker `rank` owns: a contiguous range, perhaps an empty one."""
        return self._owned.get(rank, range(0))

    def runs(self, rank: int) -> list[range]:
        """Return the points that worker `rank` owns, cut before each C-point: one range for each coarse interval that it owns part of."""
        points = self.local(rank)
        inside = self.c_points[bisect_right(self.c_points, points.start) : bisect_left(self.c_points, points.stop)]
        cuts = [points.start, *inside, points.stop]
        return [range(a, b) for a, b in pairwise(cuts)] if points else []

    def alike(self, runs: Sequence[range]) -> list[range]:
        """Return those of the runs that are whole intervals of the greatest length, if there are at least two; otherwise none."""
        found = [run for run in runs if run.start in self.is_c_point and (run.stop in self.is_c_point or run.stop == self.size)]
        found = [run for run in found if len(run) == max(map(len, found))]
        return found if len(found) > 1 else []

    def mirrored(self) -> "Level":
        """Return the level of the adjoint solve: the same intervals with time reversed."""
        ends = (*self.c_points[1:], self.size)
        return Level(
            layers=self.layers[::-1],
            owners=self.owners[::-1],
            ratios=self.ratios[::-1],
            c_points=tuple(self.size - end for end in reversed(ends)),
        )


class Transfer(NamedTuple):
    """A C-point on its two levels, and who owns it there.

    Attributes:
        coarse: its number on the coarse level.
        point: its number on the fine level.
        owner: the worker that owns it on the fine level.
        coarse_owner: the worker that owns it on the coarse level.
    """

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
        """By fine level and worker: the C-points that the worker owns on that level or on the next coarser one.

        Point 0 is left out, since its value is given.
        """
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
        """The layers that coarse levels evaluate: those at the finest level's C-points."""
        return frozenset(layer for level in self.levels[1:2] for layer in level.layers)

    def adjoint(self) -> "Hierarchy":
        """Return the hierarchy of the adjoint solve: the same intervals and the same layers at the C-points, last layer first.

        A coarse adjoint step is thus the exact transpose of the coarse forward step over the same interval. It reads the graph that the
        forward sweep recorded at that interval's C-point.
        """
        return self._mirrored

    @cached_property
    def _mirrored(self) -> "Hierarchy":
        return Hierarchy(tuple(level.mirrored() for level in self.levels))


def split_evenly(layers: int, workers: int) -> tuple[int, ...]:
    """Return block sizes that differ by at most one, larger blocks first."""
    return tuple(layers // workers + (p < layers % workers) for p in range(workers))


def build_hierarchy(*, blocks: Sequence[int], levels: int, coarsening: int | Sequence[int]) -> Hierarchy:
    """Build the forward hierarchy over `sum(blocks)` layers.

    Args:
        blocks: number of layers of each worker, in the order of the layers; zeros are allowed.
        levels: number of levels, 1 for the serial solve.
        coarsening: the coarsening factor c_f, one for all levels or one for each coarse level.

    Raises:
        SettingsError: fewer than one layer or level, a factor below 2, or a level that would be left with one step.
    """
    factors = (coarsening,) * (levels - 1) if isinstance(coarsening, int) else tuple(coarsening)[: levels - 1]
    return _build(tuple(blocks), levels, factors)


@lru_cache(maxsize=64)  # checking settings builds a hierarchy, and the planner asks for the same one many times
def _build(blocks: tuple[int, ...], levels: int, factors: tuple[int, ...]) -> Hierarchy:
    """Build the hierarchy for `build_hierarchy`, from arguments that are hashable, as `lru_cache` needs them."""
    layers = sum(blocks)
    _check(layers, blocks, levels, factors)

    owner_of_layer = [rank for rank, block in enumerate(blocks) for _ in range(block)]
    firsts, built = range(layers), []  # the first layer that each step goes over
    for level in range(levels):
        factor = factors[level] if level < levels - 1 else len(firsts)
        built.append(
            Level(
                layers=tuple(firsts),
                owners=tuple(owner_of_layer[n] for n in firsts),
                ratios=tuple(float(after - first) for first, after in pairwise((*firsts, layers))),
                c_points=tuple(range(0, len(firsts), factor)),
            )
        )
        firsts = firsts[::factor]
        if level < levels - 1 and len(firsts) < 2:
            raise SettingsError(
                f"coarsening {list(factors[: level + 1])} of {layers} layers leaves one coarse step on level {level + 1}, so nothing "
                f"would run in parallel: use a smaller mgrit.coarsening, fewer mgrit.levels than {levels}, or more layers"
            )
    return Hierarchy(tuple(built))


def _check(layers: int, blocks: Sequence[int], levels: int, factors: Sequence[int]) -> None:
    """Refuse arguments from which no hierarchy can be built."""
    if layers < 1 or any(block < 0 for block in blocks):
        raise SettingsError(f"blocks {tuple(blocks)}: need at least one layer and no negative block")
    if levels < 1:
        raise SettingsError(f"{levels} levels: need at least 1 (1 is the serial solve)")
    if len(factors) != levels - 1:
        raise SettingsError(f"coarsening {list(factors)} names {len(factors)} factors, but {levels} levels need {levels - 1}")
    if any(factor < 2 for factor in factors):
        raise SettingsError(f"coarsening {list(factors)}: every factor must be at least 2")
