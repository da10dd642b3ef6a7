"""rayllp: train very deep transformers in parallel over their layers, on Ray.

import rayllp
result = rayllp.train(rayllp.make_config({"model": {"layers": 36}, "workers": 4}))
"""

from typing import TYPE_CHECKING, Any

from rayllp.version import __version__

if TYPE_CHECKING:
    from rayllp.checkpoint.export import export
    from rayllp.cluster.session import keep_workers, train
    from rayllp.cluster.trainer import LayerParallelTrainer
    from rayllp.config import TrainConfig, load_config, make_config
    from rayllp.models.stack import LayerStack
    from rayllp.report.journal import Listener
    from rayllp.training.result import TrainResult
    from rayllp.tuning.run import tune

__all__ = [
    "LayerParallelTrainer",
    "LayerStack",
    "Listener",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "export",
    "keep_workers",
    "load_config",
    "make_config",
    "train",
    "tune",
]

_HOMES = {
    "export": "rayllp.checkpoint.export",
    "keep_workers": "rayllp.cluster.session",
    "train": "rayllp.cluster.session",
    "LayerParallelTrainer": "rayllp.cluster.trainer",
    "TrainResult": "rayllp.training.result",
    "TrainConfig": "rayllp.config",
    "load_config": "rayllp.config",
    "make_config": "rayllp.config",
    "LayerStack": "rayllp.models.stack",
    "Listener": "rayllp.report.journal",
    "tune": "rayllp.tuning.run",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the solver and the engine import without Ray, and the command line answers at once.
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'rayllp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
