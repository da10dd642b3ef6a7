"""What a run is given, and what it gives back."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from rayllp.config import TrainConfig
from rayllp.data.record import DataRecord
from rayllp.hf_config import with_layers
from rayllp.models import FAMILIES, Architecture, LayerStack


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        directory: the run directory.
        steps: optimizer steps done, over all sittings of the run.
        validation_loss: mean held-out loss per token (or image, or sentence), exact forward; None if stopped early.
        metrics: what else the last evaluation found: perplexity, accuracy, bleu, by the family.
        sample: generated text; empty unless the family writes text, and for a stopped run.
        stopped: whether Ctrl-C, SIGTERM or a closed terminal ended it.
        signal: the number of the signal that did.
        stopped_early: whether evaluations became no better for `eval.patience` of them.
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
    """What the settings name: the data set, and transformers' configuration where a run goes on.

    Attributes:
        record: of the data, for the run to keep.
        changed: splits of the data that are not those that the run began with.
    """

    data: Any
    kept: dict[str, Any] | None
    record: DataRecord | None = None
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a worker needs besides settings and data to build a model that settings name.

    Attributes:
        families: where adapters are, those that the user's program registered among them.
        kept: transformers' configuration of a run that goes on.
        here: the folder that relative paths start from: the driver's. Ray's processes may be elsewhere.
    """

    families: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Any] | None = None
    here: str = field(default_factory=os.getcwd)

    def apply(self) -> None:
        """Make this process know the families, and go to the driver's folder if there is one here."""
        FAMILIES.update(self.families)
        with contextlib.suppress(OSError):
            os.chdir(self.here)

    @classmethod
    def of(cls, architecture: Architecture | None, kept: dict[str, Any] | None) -> Self:
        """Of what the driver knows; an architecture of the user's own needs no adapter."""
        return cls({} if architecture is not None else dict(FAMILIES), kept)


def whole_network(whole: TrainConfig, found: dict[str, Any] | None) -> dict[str, Any] | None:
    """transformers' configuration at the run's full depth.

    Args:
        found: a stage's.
    """
    return with_layers(found, whole.model.layers) if found is not None and whole.nested.factors else found


def network_at(
    config: TrainConfig, whole: TrainConfig, model: Architecture | None, kept: dict[str, Any] | None
) -> tuple[Architecture | None, dict[str, Any] | None]:
    """The user's own network and the kept configuration of a run that goes on, at a stage's depth.

    Args:
        config: the stage's settings.
        whole: the run's.
    """
    if not whole.nested.factors:
        return model, kept
    kept = None if kept is None else with_layers(kept, config.model.layers)
    if not isinstance(model, LayerStack):
        return model, kept
    return model.thinned(config.buffers.open, config.buffers.close, whole.middle_layers // config.middle_layers), kept
