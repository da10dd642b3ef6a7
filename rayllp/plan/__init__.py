"""Predict step times by running the actual schedule on simulated clocks, choose a mesh, and suggest buffers from a run's measurements."""

from rayllp.plan.buffers import BufferSuggestion, suggest_buffers
from rayllp.plan.cost import Prediction, predict, predict_step
from rayllp.plan.costs import Costs, Device
from rayllp.plan.planner import LayerModel, Option, Plan, make_plan

__all__ = [
    "BufferSuggestion",
    "Costs",
    "Device",
    "LayerModel",
    "Option",
    "Plan",
    "Prediction",
    "make_plan",
    "predict",
    "predict_step",
    "suggest_buffers",
]
