"""Predictions: the cycle that trains, run on logical clocks; and what a run's measurements ask for."""

from rayllp.plan.buffers import BufferSuggestion, suggest_buffers
from rayllp.plan.cost import Costs, predict_step

__all__ = ["BufferSuggestion", "Costs", "predict_step", "suggest_buffers"]
