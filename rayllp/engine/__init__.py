"""One training step of one worker. This package runs over any channel, and imports neither Ray nor the cluster."""

from rayllp.engine.engine import Engine
from rayllp.engine.statistics import StepStats

__all__ = ["Engine", "StepStats"]
