"""Predictions: the cycle that trains, run on logical clocks."""

from rayllp.plan.cost import Costs, predict_step

__all__ = ["Costs", "predict_step"]
