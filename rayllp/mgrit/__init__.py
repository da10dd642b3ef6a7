"""MGRIT over layers. Knows no model, no Ray and no torch.distributed; see `cycle.py` for the algorithm."""

from rayllp.mgrit.cycle import Method, solve
from rayllp.mgrit.deferred import DeferredSweeps
from rayllp.mgrit.hierarchy import Hierarchy, Level, build_hierarchy, split_evenly
from rayllp.mgrit.propagator import CoarseOperator, Identity, Propagator, Rediscretised, coarse_operator
from rayllp.mgrit.result import MGRITResult, Status, convergence_factor, judge
from rayllp.state import State

__all__ = [
    "CoarseOperator",
    "DeferredSweeps",
    "Hierarchy",
    "Identity",
    "Level",
    "MGRITResult",
    "Method",
    "Propagator",
    "Rediscretised",
    "State",
    "Status",
    "build_hierarchy",
    "coarse_operator",
    "convergence_factor",
    "judge",
    "solve",
    "split_evenly",
]
