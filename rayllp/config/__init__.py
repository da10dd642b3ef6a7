"""Settings: frozen, checked where they are made."""

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
from rayllp.config.groups import EVALUATED, DataSettings, EvalSettings, OptimizerSettings, Relaxation, Settings, WorkerRange
from rayllp.config.parse import kind_in, to_text
from rayllp.config.train import MAY_DIFFER, TrainConfig, default_blocks, torchbraid_blocks

__all__ = [
    "EVALUATED", "MAY_DIFFER", "DataSettings", "EvalSettings", "OptimizerSettings", "Relaxation", "Settings", "TrainConfig", "WorkerRange",
    "check_run", "default_blocks", "kind_in", "kind_of_setting", "load_config", "load_run_config", "make_config", "read_yaml", "set_value",
    "setting_names", "to_text", "to_yaml", "torchbraid_blocks",
]  # fmt: skip
