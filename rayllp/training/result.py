"""Inputs and result of `train`: what the settings name, what a worker needs to build its layers, and `TrainResult`."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from rayllp.config import TrainConfig
from rayllp.data import Dataset
from rayllp.data.record import DataRecord
from rayllp.hf_config import with_layers
from rayllp.models import FAMILIES, Architecture, Family, LayerStack


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of `train`.

    Attributes:
        directory: the run directory.
        steps: optimizer steps done, over all sessions of the run.
        validation_loss: mean validation loss per token (or image, or sentence), with the exact forward; None if the run was stopped.
        metrics: the other metrics of the last evaluation, which depend on the family: perplexity, accuracy, bleu.
        sample: generated text; empty if the run was stopped, or the family does not generate text.
        stopped: True if Ctrl-C, SIGTERM or a closed terminal ended the run.
        signal: the number of the signal that ended it.
        stopped_early: True if the last `eval.patience` evaluations were no better than the best before them.
    """

    directory: Path
    steps: int
    validation_loss: float | None
    sample: str
    stopped: bool
    signal: int | None = None
    stopped_early: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


class Loaded(NamedTuple):
    """What was loaded because the settings name it.

    Attributes:
        data: the data set; None if the data are the user's own.
        stored_config: the transformers configuration that a resumed run has stored.
        record: describes the data, so that a resumed run can recognise them.
        changed: splits of the data that differ from those that the run began with.
    """

    data: Dataset | None
    stored_config: dict[str, Any] | None
    record: DataRecord | None = None
    changed: tuple[str, ...] = ()


class Network(NamedTuple):
    """Which network the workers build.

    Attributes:
        architecture: a network of the user's own; None: the one that the settings name.
        stored_config: the transformers configuration that a resumed run has stored; None: one is made from the settings.
    """

    architecture: Architecture | None
    stored_config: dict[str, Any] | None = None

    def at_stage(self, config: TrainConfig, run_config: TrainConfig) -> "Network":
        """Return the network at the depth of a stage of nested iteration.

        Args:
            config: settings of the stage.
            run_config: settings of the whole run, which this network is for.
        """
        if not run_config.nested.factors:
            return self
        architecture = self.architecture
        if isinstance(architecture, LayerStack):
            architecture = architecture.thinned(config.buffers.open, config.buffers.close, run_config.middle_layers // config.middle_layers)
        return Network(architecture, None if self.stored_config is None else with_layers(self.stored_config, config.model.layers))


@dataclass(frozen=True)
class BuildContext:
    """What a worker needs, besides settings and data, to build the model that the settings name.

    Attributes:
        families: the model families by name; includes those that the user's program has registered.
        stored_config: the transformers configuration that a resumed run has stored.
        working_directory: the driver's working directory, where relative paths start. Ray's worker processes may start in another one.
    """

    families: dict[str, Family | str] = field(default_factory=dict)
    stored_config: dict[str, Any] | None = None
    working_directory: str = field(default_factory=os.getcwd)

    def apply(self) -> None:
        """Register the families in this process, and change to the driver's working directory if this host has it."""
        FAMILIES.update(self.families)
        with contextlib.suppress(OSError):
            os.chdir(self.working_directory)

    @classmethod
    def of(cls, network: Network) -> Self:
        """Return the context for this network. One of the user's own needs none, so it gets no families."""
        return cls({} if network.architecture is not None else dict(FAMILIES), network.stored_config)


def at_full_depth(stored_config: dict[str, Any] | None, run_config: TrainConfig) -> dict[str, Any] | None:
    """Return the transformers configuration at the run's full depth.

    Args:
        stored_config: the configuration, which may be that of a shallower stage; None is returned as it is.
        run_config: settings of the whole run.
    """
    return with_layers(stored_config, run_config.model.layers) if stored_config is not None and run_config.nested.factors else stored_config
