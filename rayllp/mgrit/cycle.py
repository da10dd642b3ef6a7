"""The cycle: relax, restrict, solve on the coarse grid, correct (arXiv:2601.09026, section 3.2).

Iterations are counted as XBraid and the paper count them. With a skipped down-cycle, the default, the first iteration is the coarse
propagation and the last sweep; every further one adds a relaxation, a restriction and a coarse solve before that sweep.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rayllp.channel.base import Channel, MessageTag, StateSpec
from rayllp.errors import SettingsError
from rayllp.mgrit.deferred import DeferredSweeps, RunsDeferredWhileWaiting
from rayllp.mgrit.grid import Grid
from rayllp.mgrit.hierarchy import Hierarchy
from rayllp.mgrit.propagator import EvaluationCache, Propagator, coarse_operator
from rayllp.mgrit.result import MGRITResult, Status, no_residuals
from rayllp.state import State, squared_norm, subtract

Relaxation = Literal["F", "FCF"]
PhaseListener = Callable[[str, int], None]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to solve: everything that is not the problem.

    Attributes:
        iterations: fixed number, or the cap where `tolerance` is set.
        relaxation: F or FCF, by level; the last entry serves all coarser levels.
        cycle: V or F.
        coarse_step_weight: ω of the coarse operator; 1 is the paper's, 0 the identity.
        keep_states: whether F-points' values are in the result; what records graphs or checkpoints needs them no more.
        initial_guess: "coarse" (skipped down-cycle) or "constant" (every point starts as the initial state, a zero correction).
        batched: sweep a worker's intervals on the finest level side by side, a layer of each in one call.
        tolerance: stop once the residual norm is at or below it; costs one all-reduce an iteration.
    """

    iterations: int = 1
    relaxation: tuple[Relaxation, ...] = ("F", "FCF")
    cycle: Literal["V", "F"] = "V"
    coarse_step_weight: float = 1.0
    initial_guess: Literal["coarse", "constant"] = "coarse"
    tolerance: float | None = None
    keep_states: bool = True
    batched: bool = False

    @property
    def measuring(self) -> int:
        """Iterations that yield a residual, at most."""
        return self.iterations - (self.initial_guess == "coarse")

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise SettingsError(f"{self.iterations} iterations: need at least 1; for an exact solve use 1 level")
        if not self.relaxation or any(kind not in ("F", "FCF") for kind in self.relaxation):
            raise SettingsError(f"relaxation {self.relaxation}: each level takes F or FCF")


class Solver:
    """One solve on one worker. All workers of the channel build one from the same hierarchy and method and call `solve`."""

    def __init__(
        self,
        hierarchy: Hierarchy,
        method: Method,
        propagator: Propagator,
        channel: Channel,
        spec: StateSpec,
        tag: MessageTag,
        on_phase: PhaseListener | None = None,
    ) -> None:
        operator = coarse_operator(method.coarse_step_weight)
        steps = EvaluationCache(propagator, hierarchy.coarse_layers)
        self.method, self.channel, self.tag, self.spec = method, channel, tag, spec
        batched = method.batched and len(hierarchy.levels) > 1
        self.grids = [
            Grid(level, depth, steps, operator, channel, spec, tag, batched=batched and depth == 0)
            for depth, level in enumerate(hierarchy.levels)
        ]
        self.transfers = [of_level.get(channel.rank, []) for of_level in hierarchy.transfers]
        # By level and iteration: the squared residual at each C-point owned here. On coarse levels only where they can be compared.
        self.residuals: list[dict[int, dict[int, Tensor]]] = [{} for _ in self.grids[:-1]]
        self.done = 0
        self.enter = on_phase or (lambda phase, level: None)

    def solve(self, initial: State | None, deferred: DeferredSweeps | None = None) -> MGRITResult:
        """Solve from `initial`, given on the worker that owns the first step and ignored elsewhere.

        Args:
            deferred: takes what of the last sweep need not be done now.
        """
        self.inject_initial(initial)
        if len(self.grids) > 1:
            if self.method.initial_guess == "coarse":
                self.propagate_coarsely()
                self.done = 1
            else:
                self.spread_initial()
            while self.done < self.method.iterations and not self.is_converged():
                self.cycle(0, self.method.cycle)
                self.done += 1
        self.enter("last sweep", 0)
        output = self.grids[0].last_sweep(self.method.keep_states, deferred)
        return self.result(output, max(self.done, 1))

    # The cycle ----------------------------------------------------------------------------------------------------------------

    def cycle(self, depth: int, kind: str) -> None:
        """One V- or F-cycle from level `depth` down."""
        if depth == len(self.grids) - 1:
            self.solve_coarsest()
            return
        self.relax(depth)
        self.restrict(depth)
        self.cycle(depth + 1, kind)
        self.correct(depth)
        self.finish_level(depth, kind)

    def propagate_coarsely(self) -> None:
        """The initial guess: the skipped down-cycle, a serial solve on the coarsest level carried up."""
        self.solve_coarsest()
        for depth in reversed(range(len(self.grids) - 1)):
            self.correct(depth)
            self.finish_level(depth, self.method.cycle)

    def solve_coarsest(self) -> None:
        """The serial solve."""
        self.enter("coarse solve", len(self.grids) - 1)
        self.grids[-1].solve()

    def finish_level(self, depth: int, kind: str) -> None:
        """F-points of a coarse level from its corrected C-points, and the F-cycle's extra V-cycle; the finest level does without."""
        if depth > 0:
            self.enter("relaxation", depth)
            self.grids[depth].f_relax()
            if kind == "F":
                self.cycle(depth, "V")

    def relax(self, depth: int) -> None:
        """F- or FCF-relaxation. The last interval's F-points are nobody's start: what comes after the correction makes them anew."""
        kinds, grid = self.method.relaxation, self.grids[depth]
        self.enter("relaxation", depth)
        grid.f_relax(but_last=True)
        if kinds[min(depth, len(kinds) - 1)] == "FCF":
            grid.c_relax()
            grid.f_relax(but_last=True)

    def restrict(self, depth: int) -> None:
        """Residual at the C-points, and the coarse level's FAS problem, by injection."""
        self.enter("restriction", depth)
        fine, coarse = self.grids[depth], self.grids[depth + 1]
        arrived = fine.arrivals("restriction")
        if depth == 0 or self.method.measuring > 1:
            self.measure(depth, arrived)
        for k, point, owner, coarse_owner in self.transfers[depth]:
            mine = (arrived[point], fine.values[point]) if point in fine.points else ()
            if moved := self.move(mine, owner, coarse_owner, 2, "restriction", depth):
                coarse.rhs[k], coarse.values[k] = moved
        for k in coarse.points:
            if k < coarse.level.size - 1:
                coarse.offsets[k] = coarse.apply(k, coarse.values[k])

    def correct(self, depth: int) -> None:
        """The coarse solution, injected at the C-points."""
        self.enter("correction", depth)
        fine, coarse = self.grids[depth], self.grids[depth + 1]
        for k, point, owner, coarse_owner in self.transfers[depth]:
            mine = (coarse.values[k],) if k in coarse.points else ()
            if moved := self.move(mine, coarse_owner, owner, 1, "correction", depth):
                (fine.values[point],) = moved

    # Its parts ----------------------------------------------------------------------------------------------------------------

    def move(self, states: tuple[State, ...], sender: int, receiver: int, count: int, phase: str, depth: int) -> tuple[State, ...]:
        """Carry `count` states from `sender` to `receiver`; empty on every other worker.

        In a forward solve both are one worker. In an adjoint solve whose interval crosses workers they are not: the C-point
        belongs to the worker of the interval's last layer, its coarse step to that of the interval's first.
        """
        rank, tag = self.channel.rank, self.tag.at(phase, depth)
        if sender == receiver:
            return states if rank == sender else ()
        if rank == sender:
            for state in states:
                self.channel.send(state, receiver, tag)
        return tuple(self.channel.receive(self.spec, sender, tag) for _ in range(count)) if rank == receiver else ()

    def inject_initial(self, initial: State | None) -> None:
        """The initial state to point 0 of every level."""
        fine = self.grids[0]
        if 0 in fine.points:
            if initial is None:
                raise SettingsError("the worker that owns the first step needs the initial state; got None")
            fine.values[0] = initial
        for source, target in zip(self.grids, self.grids[1:], strict=False):
            mine = (source.values[0],) if 0 in source.points else ()
            if moved := self.move(mine, source.level.owners[0], target.level.owners[0], 1, "injection", source.depth):
                (target.values[0],) = moved

    def spread_initial(self) -> None:
        """The zero-correction guess: every C-point starts as the initial state."""
        coarse = self.grids[1]
        coarse.solve(step=lambda j: coarse.values[j], phase="initial guess")
        self.correct(0)

    def measure(self, depth: int, arrived: dict[int, State]) -> None:
        """Keep the squared residuals of a level's owned C-points; of a level that an F-cycle visits twice, the later ones."""
        values = self.grids[depth].values
        self.residuals[depth][self.done] = {c: squared_norm(subtract(state, values[c])) for c, state in arrived.items()}

    def squared_residual(self, iteration: int) -> Tensor:
        """This worker's share of the squared residual norm of the finest level."""
        shares = list(self.residuals[0][iteration].values())
        return torch.stack(shares).sum() if shares else torch.zeros((), dtype=torch.float64, device=self.spec.device)

    def point_residuals(self) -> tuple[Tensor, ...]:
        """By level, of all iterations that measured: the squared residuals at its C-points but the first, zero where another owns them."""
        if self.method.measuring < 2 or not self.residuals:
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
        """Whether the last residual is at or below the tolerance; the same answer on every worker."""
        if self.method.tolerance is None or not self.residuals[0]:
            return False
        square = self.squared_residual(self.done - 1).clone()
        return float(self.channel.all_reduce(square, self.tag.at("residual", 0))) <= self.method.tolerance**2

    def result(self, output: State | None, iterations: int) -> MGRITResult:
        """What the solve has come to, from this worker's view; residuals are its share."""
        fine = self.grids[0].level
        exact = len(self.grids) == 1 or iterations >= len(fine.c_points)
        squares = [self.squared_residual(iteration) for iteration in self.residuals[0]] if self.residuals else []
        status = Status.EXACT if exact else Status.UNMEASURED
        return MGRITResult(
            output=output,
            states=self.grids[0].values,
            iterations=iterations,
            squared_residuals=torch.stack(squares) if squares else no_residuals(),
            point_residuals=self.point_residuals(),
            status=status,
            tolerance=self.method.tolerance,
            exact=exact,
            informative=self.informative_residuals(),
        )

    def informative_residuals(self) -> int:
        """How many residuals, from the first, are not zero by construction.

        An iteration with F-relaxation makes one more coarse interval exact, one with FCF-relaxation two (section 3.2), the first of
        them before its residual is taken.
        """
        unknown = len(self.grids[0].level.c_points) - 1
        return unknown // (2 if self.method.relaxation[0] == "FCF" else 1)


def solve(
    hierarchy: Hierarchy,
    method: Method,
    propagator: Propagator,
    channel: Channel,
    *,
    initial: State | None,
    spec: StateSpec | None = None,
    tag: MessageTag | None = None,
    reduce: bool = True,
    on_phase: PhaseListener | None = None,
    deferred: DeferredSweeps | None = None,
    while_waiting: DeferredSweeps | None = None,
) -> MGRITResult:
    """Solve u_{n+1} = Φ_n(u_n) over all layers of `hierarchy`, each worker its own block.

    Args:
        hierarchy: from `build_hierarchy`, or its `adjoint()`.
        method: iterations, relaxation, cycle, coarse operator.
        propagator: this worker's layers.
        channel: to the other workers; `LocalChannel.alone()` for one.
        initial: the state before the first step, on the worker that takes it.
        spec: shapes of a state; taken from `initial` when there is one worker.
        tag: what to call this solve in errors.
        reduce: sum the residuals over all workers now; False leaves that to the caller (one message a step instead of one a solve).
        on_phase: is told of each phase of the cycle as it begins, and of its level.
        deferred: takes the pieces of the last sweep that nobody else waits for; the caller sees to it that they are made.
        while_waiting: such pieces of an earlier solve, made while this one would wait for messages.

    Raises:
        SettingsError: no initial state or no spec where one is needed.
        ChannelError: a message did not arrive in time.
    """
    if spec is None:
        if initial is None:
            raise SettingsError("spec is needed on a worker that has no initial state")
        spec = StateSpec.of(initial)
    tag = tag or MessageTag(step=0, solve="forward")
    if while_waiting is not None:
        channel = RunsDeferredWhileWaiting(channel, while_waiting)
    result = Solver(hierarchy, method, propagator, channel, spec, tag, on_phase).solve(initial, deferred)
    if not reduce:
        return result
    shares = result.shares
    return result.measured(channel.all_reduce(shares, tag.at("residual", 0)) if len(shares) else shares)
