"""The inputs of training: a run's network and data, and what a worker needs to build its layers."""

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayllp.config import TrainConfig
from rayllp.data import Batches, Dataset
from rayllp.data.record import DataRecord
from rayllp.hf_config import with_layers
from rayllp.models import FAMILIES, Architecture, Family, LayerStack


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
class TrainingInputs:
    """What a run trains, and on which data.

    Attributes:
        network: the network, at the run's full depth.
        batches: the data: the set that the settings name, or the user's own.
        record: describes the data, so that a resumed run can recognise them; None for data of the user's own.
        changed: splits of the data that differ from those that the run began with.
    """

    network: Network
    batches: Batches
    record: DataRecord | None = None
    changed: tuple[str, ...] = ()

    @property
    def data_set(self) -> Dataset | None:
        """The data set that the settings name; None for data of the user's own."""
        return self.batches if isinstance(self.batches, Dataset) else None


@dataclass(frozen=True)
class BuildContext:
    """What a worker needs, besides settings and data, to build its layers.

    Attributes:
        network: the network.
        families: the model families by name; includes those that the user's program has registered. A network
            of the user's own needs none.
        working_directory: the driver's working directory, where relative paths start. Ray's worker processes may start in another one.
    """

    network: Network
    families: dict[str, Family | str] = field(default_factory=dict)
    working_directory: str = field(default_factory=os.getcwd)

    def apply(self) -> None:
        """Register the families in this process, and change to the driver's working directory if this host has it."""
        FAMILIES.update(self.families)
        with contextlib.suppress(OSError):
            os.chdir(self.working_directory)

    @classmethod
    def of(cls, network: Network) -> "BuildContext":
        """Return the context for this network in this process."""
        return cls(network, {} if network.architecture is not None else dict(FAMILIES))


def at_full_depth(stored_config: dict[str, Any] | None, run_config: TrainConfig) -> dict[str, Any] | None:
    """Return the transformers configuration at the run's full depth.

    Args:
        stored_config: the configuration, which may be that of a shallower stage; None is returned as it is.
        run_config: settings of the whole run.
    """
    return with_layers(stored_config, run_config.model.layers) if stored_config is not None and run_config.nested.factors else stored_config
