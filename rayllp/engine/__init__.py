"""One training step of one worker. Imports neither Ray nor a cluster: it runs over any channel."""

from rayllp.engine.engine import Engine
from rayllp.engine.statistics import StepStats

__all__ = ["Engine", "StepStats"]
