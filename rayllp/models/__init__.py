"""The networks that are trained: any transformer of the transformers library, and a user's own LayerStack."""

import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from rayllp.config import TrainConfig
from rayllp.config.network import ANY_ARCHITECTURE
from rayllp.data.base import DatasetFacts
from rayllp.errors import DataError, SettingsError
from rayllp.models.base import Architecture, hidden_matrices
from rayllp.models.families import FAMILIES, Family
from rayllp.models.stack import LayerStack


def refuse_unnamed_code(config: TrainConfig, folder: object, named: str | None = None) -> None:
    """Refuse to import the code that a run's own settings name, unless the caller has named it too.

    Args:
        config: the run's settings.
        folder: the run, for errors.
        named: the family as the caller gives it; None if it gives none. A family that this process has registered is always allowed.

    Raises:
        SettingsError: `model.family` is "module:Class", and the caller has not named it.
    """
    family = config.model.family
    if ":" in family and family not in FAMILIES.values() and family != named:
        raise SettingsError(
            f"the settings in {folder} name code to import, model.family {family!r}, which runs with your rights: if you know it, name it "
            f"yourself (rayllp train: --set model.family={family}; rayllp export: --family {family}; Python: rayllp.models.register)"
        )


def families() -> tuple[str, ...]:
    """Return the names that model.family takes."""
    return tuple(FAMILIES)


def register(name: str, family: Family | str) -> None:
    """Add a family, in this process and in the workers of its runs.

    Args:
        name: its name, for model.family.
        family: the family itself; or the "module:NAME" of one, or of an `Architecture` class with a `from_settings` like `Transformer`'s.
    """
    FAMILIES[name] = family


def build_architecture(config: TrainConfig, facts: DatasetFacts, stored_config: Mapping[str, Any] | None = None) -> Architecture:
    """Return the network of `config.model.family`, built for data with these facts.

    Args:
        config: the settings of the run.
        facts: what the data set says about itself.
        stored_config: transformers' configuration of a run that is resumed (RUN/model.json); its weights come from the run's checkpoint.

    Raises:
        SettingsError: there is no such family, or the settings do not fit the data.
        CheckpointError: the checkpoint of model.from_pretrained does not fit.
    """
    check_family(config)
    family = _load(config.model.family)
    if not isinstance(family, Family):
        return family.from_settings(config, facts, stored_config)
    from rayllp.models.transformer import Transformer  # not earlier, since transformers takes seconds to import

    return Transformer.from_settings(config, facts, stored_config, family)


def check_network(config: TrainConfig, facts: DatasetFacts, stored_config: Mapping[str, Any] | None = None) -> None:
    """Refuse settings from which no network can be built for data with these facts, or whose metric could not be computed.

    Raises:
        SettingsError, CheckpointError: see `build_architecture`.
        DataError: the package for the translation metric is not installed.
    """
    check_batched(config, build_architecture(config, facts, stored_config))
    if config.model.family == "mt" and (config.eval.translate or config.eval.final_translate) and find_spec("sacrebleu") is None:
        raise DataError("BLEU needs sacrebleu: pip install 'rayllp[translation]', or set eval.translate and eval.final_translate to 0")


def check_batched(config: TrainConfig, architecture: Architecture, drawing: str | None = None) -> None:
    """Refuse mgrit.batched and compile for networks that draw random numbers, and mgrit.batched for layers of different kinds.

    Dropout masks have to be keyed by layer and sample, which is not possible in vmapped and compiled layers.

    Args:
        config: the settings of the run.
        architecture: the network.
        drawing: the name of a piece that was found to draw random numbers in training, if any.
    """
    for name, chosen in (("mgrit.batched", config.mgrit.batched), ("compile", config.compile)):
        if chosen and (drawing or architecture.stochastic):
            piece = f" ({drawing})" if drawing else ""
            raise SettingsError(f"{name}=true and dropout, whose masks go by layer and sample{piece}: set model.dropout=0 or {name}=false")
    levels = config.mgrit.levels
    if config.mgrit.batched and config.mode != "serial" and min(levels.forward, levels.backward) > 1:
        _check_kinds(config, architecture)


def check_muon(config: TrainConfig, architecture: Architecture) -> None:
    """Refuse Muon for a network whose layers have no weight matrix that it could train."""
    if config.optimizer.name == "muon" and not any(hidden_matrices(architecture.layer(n)) for n in range(architecture.layers)):
        raise SettingsError(
            "optimizer.name=muon trains weights of two dimensions, and no layer of this network has one (a convolution's have four): "
            "set optimizer.name: adamw"
        )


def _check_kinds(config: TrainConfig, architecture: Architecture) -> None:
    """Refuse mgrit.batched if layers of different kinds would be called together."""
    level, offset = config.hierarchy(2).levels[0], config.buffers.open
    for rank in range(config.layer_workers):
        # Layers at the same position of their intervals are called together, except the first ones (C-points), which are called singly.
        for together in list(zip(*level.alike(level.runs(rank)), strict=True))[1:]:
            first, *others = (offset + n for n in together)
            other = next((n for n in others if architecture.kind(n) != architecture.kind(first)), None)
            if other is not None:
                raise SettingsError(
                    f"mgrit.batched=true, but layers {first} and {other} of one worker differ in more than their weights (one is the "
                    f"{architecture.kind(first)}'s, one the {architecture.kind(other)}'s): set mgrit.batched=false, or workers or "
                    "mesh.blocks so that no worker has both"
                )


def _load(name: str) -> Any:
    """Return the family of this name, or the class in its place; import it if it is a "module:NAME"."""
    found = Family() if name == ANY_ARCHITECTURE else FAMILIES.get(name, name)
    if isinstance(found, Family):
        return found
    module, _, attribute = found.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f'model.family {name!r}: {error}; give the "module:NAME" of a Family or an Architecture class that can be imported'
        ) from None


def check_family(config: TrainConfig) -> None:
    """Refuse an unknown family, and a model.head that the family does not have."""
    family = config.model.family
    if family == ANY_ARCHITECTURE:
        if config.model.architecture is None and config.model.from_pretrained is None:
            raise SettingsError("model.family=transformers without a model type: set model.architecture, or model.from_pretrained")
        return
    if family not in FAMILIES and ":" not in family:
        raise SettingsError(
            f'model.family {family!r} is not known: choose from {", ".join(families())}, or give "module:NAME" of your own; model types '
            "of transformers are for model.architecture"
        )
    head = config.model.head
    if head == "auto":
        return
    known = _load(family)
    if isinstance(known, Family) and head not in known.heads:
        others = [name for name, other in FAMILIES.items() if isinstance(other, Family) and head in other.heads]
        with_family = f"model.family {' or '.join(others)}, or with " if others else ""
        raise SettingsError(f"model.head={head} goes with {with_family}model.architecture; got family {family}, which has no such head")


__all__ = [
    "FAMILIES", "Architecture", "Family", "LayerStack", "build_architecture", "check_batched", "check_family", "check_muon",
    "check_network", "families", "refuse_unnamed_code", "register",
]  # fmt: skip
