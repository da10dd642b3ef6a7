"""Predict step times by running the actual schedule on simulated clocks, choose a mesh, and suggest buffers from a run's measurements."""

from rayllp.plan.buffers import BufferSuggestion, suggest_buffers
from rayllp.plan.costs import Costs, Device, LayerModel
from rayllp.plan.options import MGRITSolve, Option, RollingSolve, Solve, WindowSolve
from rayllp.plan.planner import Plan, make_plan
from rayllp.plan.prediction import Prediction, predict, predict_step

__all__ = [
    "BufferSuggestion",
    "Costs",
    "Device",
    "LayerModel",
    "MGRITSolve",
    "Option",
    "Plan",
    "Prediction",
    "RollingSolve",
    "Solve",
    "WindowSolve",
    "make_plan",
    "predict",
    "predict_step",
    "suggest_buffers",
]
