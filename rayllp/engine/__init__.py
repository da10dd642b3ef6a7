"""One training step of one worker. Imports neither Ray nor a cluster: it runs over any channel."""

from rayllp.engine.engine import Engine, StepStats

__all__ = ["Engine", "StepStats"]
