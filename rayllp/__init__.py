"""rayllp: train very deep transformers in parallel over their layers, on Ray.

import rayllp
result = rayllp.train(rayllp.make_config({"model": {"layers": 36}, "workers": 4}))
"""

from typing import TYPE_CHECKING, Any

from rayllp.version import __version__

if TYPE_CHECKING:
    from rayllp.checkpoint.export import export as export
    from rayllp.cluster.session import keep_workers as keep_workers
    from rayllp.cluster.session import train as train
    from rayllp.cluster.trainer import LayerParallelTrainer as LayerParallelTrainer
    from rayllp.config import TrainConfig as TrainConfig
    from rayllp.config import load_config as load_config
    from rayllp.config import make_config as make_config
    from rayllp.models.stack import LayerStack as LayerStack
    from rayllp.report.journal import Listener as Listener
    from rayllp.training.result import TrainResult as TrainResult
    from rayllp.tuning.run import tune as tune

_HOMES = {
    "LayerParallelTrainer": "rayllp.cluster.trainer",
    "LayerStack": "rayllp.models.stack",
    "Listener": "rayllp.report.journal",
    "TrainConfig": "rayllp.config",
    "TrainResult": "rayllp.training.result",
    "export": "rayllp.checkpoint.export",
    "keep_workers": "rayllp.cluster.session",
    "load_config": "rayllp.config",
    "make_config": "rayllp.config",
    "train": "rayllp.cluster.session",
    "tune": "rayllp.tuning.run",
}
"""The module that each public name is imported from. Type checkers read the imports above instead."""
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    # Lazy, so that the solver and the engine import without Ray, and the command line answers at once.
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'rayllp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
