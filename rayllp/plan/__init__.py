"""Predictions: the cycle that trains, run on logical clocks; and what a run's measurements ask for."""

from rayllp.plan.buffers import BufferSuggestion, suggest_buffers
from rayllp.plan.cost import Costs, Prediction, predict, predict_step

__all__ = ["BufferSuggestion", "Costs", "Prediction", "predict", "predict_step", "suggest_buffers"]
