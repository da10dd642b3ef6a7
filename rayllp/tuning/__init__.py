"""Sweeps by Ray Tune, whose trials train layer-parallel (`rayllp tune`)."""

from rayllp.tuning.sweep import Objective, Sweep, load_sweep

__all__ = ["Objective", "Sweep", "load_sweep"]
