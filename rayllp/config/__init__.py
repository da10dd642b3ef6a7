"""The settings of a run: immutable, and checked when they are made."""

from rayllp.config.base import Settings
from rayllp.config.blocks import default_blocks, torchbraid_blocks
from rayllp.config.data import DataSettings
from rayllp.config.files import (
    check_run,
    kind_of_setting,
    load_config,
    load_run_config,
    make_config,
    read_yaml,
    set_value,
    setting_names,
    to_yaml,
)
from rayllp.config.groups import EVALUATED, EvalSettings, OptimizerSettings, Relaxation, WorkerRange
from rayllp.config.parse import kind_in, to_text
from rayllp.config.run import MAY_DIFFER
from rayllp.config.train import TrainConfig

__all__ = [
    "EVALUATED", "MAY_DIFFER", "DataSettings", "EvalSettings", "OptimizerSettings", "Relaxation", "Settings", "TrainConfig", "WorkerRange",
    "check_run", "default_blocks", "kind_in", "kind_of_setting", "load_config", "load_run_config", "make_config", "read_yaml", "set_value",
    "setting_names", "to_text", "to_yaml", "torchbraid_blocks",
]  # fmt: skip
