"""The MGRIT solver: relax, restrict, solve on the coarse grid, correct (arXiv:2601.09026, section 3.2).

Iterations are counted as XBraid and the paper count them. With a skipped down-cycle, the default, the first iteration consists of the
coarse propagation and the last sweep; each further one adds a relaxation, a restriction and a coarse solve before that sweep.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rayllp.channel.base import StateSpec
from rayllp.errors import SettingsError
from rayllp.mgrit.communicator import Communicator, PhaseListener
from rayllp.mgrit.deferred import DeferredSweeps
from rayllp.mgrit.grid import Grid
from rayllp.mgrit.hierarchy import Hierarchy
from rayllp.mgrit.options import SolverOptions
from rayllp.mgrit.propagator import EvaluationCache, Propagator, coarse_operator
from rayllp.mgrit.result import ResidualShares, Solution, squared_rounding
from rayllp.state import State, squared_norm, subtract


@dataclass(frozen=True)
class Problem:
    """u_{n+1} = Φ_n(u_n) over all layers, as one worker sees it.

    Attributes:
        hierarchy: from `build_hierarchy`, or its `adjoint()`; the same on every worker.
        propagator: Φ_n of this worker's layers.
        spec: shapes and dtypes of a state.
    """

    hierarchy: Hierarchy
    propagator: Propagator
    spec: StateSpec


class MGRITSolver:
    """One solve on one worker. Every worker of the channel makes a solver with the same hierarchy and options, and calls `solve` once.

    Args:
        problem: the equations to solve, as this worker sees them.
        options: iterations, relaxation, cycle and coarse operator.
        communicator: for messages to the other workers.
        on_phase: called with the name and the level of each phase of the cycle as it begins.
    """

    def __init__(self, problem: Problem, options: SolverOptions, communicator: Communicator, on_phase: PhaseListener | None = None) -> None:
        hierarchy, spec = problem.hierarchy, problem.spec
        self.options, self.communicator, self.spec = options, communicator, spec
        cache = EvaluationCache(problem.propagator, hierarchy.coarse_layers)
        operator = coarse_operator(options.coarse_step_weight)
        batched = options.batched and len(hierarchy.levels) > 1
        self.grids = [
            Grid(level, depth, cache, operator, communicator, spec, batched=batched and depth == 0)
            for depth, level in enumerate(hierarchy.levels)
        ]
        self.transfers = [of_level.get(communicator.rank, []) for of_level in hierarchy.transfers]
        # Squared residuals by level, iteration and owned C-point. Coarse levels keep them only if there are two iterations to compare.
        self.residuals: list[dict[int, dict[int, Tensor]]] = [{} for _ in self.grids[:-1]]
        # This worker's share of the squared residual that rounding error alone would cause.
        self.squared_floor = torch.zeros((), dtype=torch.float64, device=self.spec.device)
        self.done = 0
        self.on_phase = on_phase or (lambda phase, level: None)

    def solve(self, u0: State | None, *, defer_to: DeferredSweeps | None = None) -> Solution:
        """Solve for all u_n. Each worker computes those that it owns, and returns its share of the residuals.

        Args:
            u0: the state before the first step, on the worker that takes that step; ignored on all others.
            defer_to: collects the runs of the last sweep that no other worker waits for; the caller must have them evaluated later.
                None: nothing is deferred.

        Raises:
            SettingsError: no initial state on the worker that owns the first step.
            ChannelError: a message did not arrive in time.
        """
        self.inject_initial(u0)
        if len(self.grids) > 1:
            if self.options.initial_guess == "coarse":
                self.propagate_coarsely()
                self.done = 1
            else:
                self.spread_initial()
            while self.done < self.options.iterations and not self.is_converged():
                self.cycle(0, self.options.cycle)
                self.done += 1
        self.on_phase("last sweep", 0)
        output = self.grids[0].last_sweep(defer_to)
        return Solution(output=output, residuals=self.residual_shares())

    # The cycle ----------------------------------------------------------------------------------------------------------------

    def cycle(self, depth: int, kind: str) -> None:
        """Do one V-cycle or F-cycle from level `depth` down.

        With one iteration and a coarse initial guess, no cycle is done at all: `propagate_coarsely` and the last sweep are the whole solve.
        """
        if depth == len(self.grids) - 1:
            self.solve_coarsest()
            return
        self.relax(depth)
        self.restrict(depth)
        self.cycle(depth + 1, kind)
        self.correct(depth)
        self.finish_level(depth, kind)

    def propagate_coarsely(self) -> None:
        """Compute the initial guess of a skipped down-cycle: solve the coarsest level serially, and inject its solution level by level."""
        self.solve_coarsest()
        for depth in reversed(range(len(self.grids) - 1)):
            self.correct(depth)
            self.finish_level(depth, self.options.cycle)

    def solve_coarsest(self) -> None:
        """Solve the coarsest level serially."""
        self.on_phase("coarse solve", len(self.grids) - 1)
        self.grids[-1].solve()

    def finish_level(self, depth: int, kind: str) -> None:
        """Relax a coarse level's F-points from its corrected C-points; in an F-cycle, add a V-cycle. The finest level needs neither."""
        if depth > 0:
            self.on_phase("relaxation", depth)
            self.grids[depth].f_relax()
            if kind == "F":
                self.cycle(depth, "V")

    def relax(self, depth: int) -> None:
        """Do F- or FCF-relaxation. The last interval is left out: nothing starts from its F-points before they are computed again."""
        grid = self.grids[depth]
        self.on_phase("relaxation", depth)
        grid.f_relax(but_last=True)
        if self.options.relaxation_on(depth) == "FCF":
            grid.c_relax()
            grid.f_relax(but_last=True)

    def restrict(self, depth: int) -> None:
        """Measure the residual at the C-points, inject the values there into the coarse level, and compute its FAS right-hand side."""
        self.on_phase("restriction", depth)
        fine, coarse = self.grids[depth], self.grids[depth + 1]
        arrived = fine.arrivals("restriction")
        if depth == 0 or self.options.measured_iterations > 1:
            self.measure(depth, arrived)
        for k, point, owner, coarse_owner in self.transfers[depth]:
            mine = (arrived[point], fine.values[point]) if point in fine.points else ()
            if moved := self.move(mine, owner, coarse_owner, 2, "restriction", depth):
                coarse.tau.fine_arrivals[k], coarse.values[k] = moved
        for k in coarse.points:
            if k < coarse.level.size - 1:
                coarse.tau.coarse_steps[k] = coarse.apply(k, coarse.values[k])
        if depth == 0 and self.options.measured_iterations > 1:
            self.estimate_rounding(coarse)

    def correct(self, depth: int) -> None:
        """Inject the coarse level's solution into the C-points."""
        self.on_phase("correction", depth)
        fine, coarse = self.grids[depth], self.grids[depth + 1]
        for k, point, owner, coarse_owner in self.transfers[depth]:
            mine = (coarse.values[k],) if k in coarse.points else ()
            if moved := self.move(mine, coarse_owner, owner, 1, "correction", depth):
                (fine.values[point],) = moved

    # Parts of the cycle -------------------------------------------------------------------------------------------------------

    def move(self, states: tuple[State, ...], sender: int, receiver: int, count: int, phase: str, depth: int) -> tuple[State, ...]:
        """Move `count` states from worker `sender` to worker `receiver`. Returns them there, and an empty tuple elsewhere.

        In a forward solve the two are the same. In an adjoint solve they differ for an interval that crosses workers: the C-point belongs
        to the worker of the interval's last layer, its coarse step to the worker of the interval's first layer.
        """
        rank = self.communicator.rank
        if sender == receiver:
            return states if rank == sender else ()
        if rank == sender:
            for state in states:
                self.communicator.send(state, receiver, phase, depth)
        if rank != receiver:
            return ()
        return tuple(self.communicator.receive(self.spec, sender, phase, depth) for _ in range(count))

    def inject_initial(self, u0: State | None) -> None:
        """Set point 0 of every level to the initial state."""
        fine = self.grids[0]
        if 0 in fine.points:
            if u0 is None:
                raise SettingsError("the worker that owns the first step needs the initial state; got None")
            fine.values[0] = u0
        for source, target in zip(self.grids, self.grids[1:], strict=False):
            mine = (source.values[0],) if 0 in source.points else ()
            if moved := self.move(mine, source.level.owners[0], target.level.owners[0], 1, "injection", source.depth):
                (target.values[0],) = moved

    def spread_initial(self) -> None:
        """Set every C-point of the finest level to the initial state: the constant initial guess."""
        coarse = self.grids[1]
        coarse.solve(step=lambda j: coarse.values[j], phase="initial guess")
        self.correct(0)

    def measure(self, depth: int, arrived: dict[int, State]) -> None:
        """Keep the squared residuals at a level's owned C-points.

        An F-cycle visits a level twice; the later residuals then replace the earlier ones.
        """
        values = self.grids[depth].values
        self.residuals[depth][self.done] = {c: squared_norm(subtract(state, values[c])) for c, state in arrived.items()}

    def estimate_rounding(self, coarse: Grid) -> None:
        """Estimate the squared residual that rounding error alone causes, from the coarse steps that restriction has just taken."""
        self.squared_floor.zero_()
        for k, after in coarse.tau.coarse_steps.items():
            before = coarse.values[k]
            self.squared_floor += squared_rounding(before, subtract(after, before), self.options.rounding)

    def squared_residual(self, iteration: int) -> Tensor:
        """Return this worker's share of the finest level's squared residual norm in one iteration: a float64 scalar."""
        shares = list(self.residuals[0][iteration].values())
        return torch.stack(shares).sum() if shares else torch.zeros((), dtype=torch.float64, device=self.spec.device)

    def point_residuals(self) -> tuple[Tensor, ...]:
        """Return the squared residuals of each level, zero where another worker owns the point.

        The shape is (measured iterations, C-points but the first). Empty if fewer than two iterations are measured.
        """
        if self.options.measured_iterations < 2 or not self.residuals:
            return ()
        tables = []
        for grid, found in zip(self.grids, self.residuals, strict=False):
            column = {c: k for k, c in enumerate(grid.level.c_points[1:])}
            table = torch.zeros((len(found), len(column)), dtype=torch.float64, device=self.spec.device)
            for row, squares in zip(table, found.values(), strict=True):
                if squares:
                    row[[column[c] for c in squares]] = torch.stack(list(squares.values())).to(row.dtype)
            tables.append(table)
        return tuple(tables)

    def is_converged(self) -> bool:
        """Return True if the last residual norm is at or below the tolerance. All workers get the same answer."""
        if self.options.tolerance is None or not self.residuals[0]:
            return False
        square = self.squared_residual(self.done - 1).clone()
        return float(self.communicator.sum(square, "residual")) <= self.options.tolerance**2

    def residual_shares(self) -> ResidualShares:
        """Return this worker's share of the residuals that the iterations have left."""
        squares = [self.squared_residual(iteration) for iteration in self.residuals[0]] if self.residuals else []
        return ResidualShares(
            squared=torch.stack(squares) if squares else torch.zeros(0, dtype=torch.float64),
            squared_floor=self.squared_floor,
            points=self.point_residuals(),
            informative=self.informative_residuals(),
            exact=len(self.grids) == 1 or self.done >= len(self.grids[0].level.c_points),
            tolerance=self.options.tolerance,
        )

    def informative_residuals(self) -> int:
        """Return how many residuals, from the first, are not zero by construction.

        An iteration with F-relaxation makes one more coarse interval exact, one with FCF-relaxation two (arXiv:2601.09026, section 3.2),
        and the first of the two already before its residual is measured.
        """
        unknown = len(self.grids[0].level.c_points) - 1
        return unknown // (2 if self.options.relaxation_on(0) == "FCF" else 1)
