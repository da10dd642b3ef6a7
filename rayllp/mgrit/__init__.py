"""Solvers that iterate over a network's layers in parallel: MGRIT (`solver.py`) and windows (`windows.py`).

This package knows no model, no Ray and no torch.distributed: a model appears here as a `Propagator`, the other workers as a `Channel`.
"""

from rayllp.mgrit.communicator import Communicator, PhaseListener
from rayllp.mgrit.deferred import DeferredRun, DeferredSweeps
from rayllp.mgrit.hierarchy import Hierarchy, Level, build_hierarchy, split_evenly
from rayllp.mgrit.options import SolverOptions
from rayllp.mgrit.propagator import CoarseOperator, Identity, Propagator, Rediscretised, coarse_operator
from rayllp.mgrit.result import Convergence, ResidualShares, Solution, Status, convergence_factor, judge
from rayllp.mgrit.solver import MGRITSolver, Problem
from rayllp.state import State

__all__ = [
    "CoarseOperator",
    "Communicator",
    "Convergence",
    "DeferredRun",
    "DeferredSweeps",
    "Hierarchy",
    "Identity",
    "Level",
    "MGRITSolver",
    "PhaseListener",
    "Problem",
    "Propagator",
    "Rediscretised",
    "ResidualShares",
    "Solution",
    "SolverOptions",
    "State",
    "Status",
    "build_hierarchy",
    "coarse_operator",
    "convergence_factor",
    "judge",
    "split_evenly",
]
