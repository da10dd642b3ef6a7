"""The networks that are trained: any transformer of the transformers library, and a user's own LayerStack."""

import gc
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from rayllp.config import TrainConfig
from rayllp.config.network import ANY_ARCHITECTURE
from rayllp.data.base import DatasetFacts
from rayllp.errors import DataError, SettingsError
from rayllp.models.base import Architecture, hidden_matrices
from rayllp.models.post_ln import refuse_post_ln
from rayllp.models.stack import LayerStack

# The adapter class of each family. Adapters are imported when they are needed, since transformers takes seconds to import.
FAMILIES = {
    "gpt2": "rayllp.models.presets:GPT2",
    "llama": "rayllp.models.presets:Llama",
    "bert": "rayllp.models.presets:BERT",
    "mc": "rayllp.models.presets:Words",
    "vit": "rayllp.models.presets:ViT",
    "mt": "rayllp.models.presets:MT",
}
TRANSFORMER = "rayllp.models.transformer:Transformer"
"""The adapter of any other model type (model.architecture); model.head chooses its task."""
SENTENCES = {"bert": "rayllp.models.presets:Sentences"}


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


def register(family: str, home: str) -> None:
    """Add a family; `home` is the "module:Class" of its adapter."""
    FAMILIES[family] = home


def build_architecture(config: TrainConfig, facts: DatasetFacts, stored_config: Mapping[str, Any] | None = None) -> Architecture:
    """Return the adapter of `config.model.family`, built for data with these facts.

    Args:
        config: the settings of the run.
        facts: what the data set says of itself.
        stored_config: transformers' configuration of a run that is resumed (RUN/model.json); its weights come from the run's checkpoint.

    Raises:
        SettingsError: there is no such family, or the settings do not fit the data.
        CheckpointError: the checkpoint of model.from_pretrained does not fit.
    """
    check_family(config)
    return architecture_class(config).from_settings(config, facts, stored_config)


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


def architecture_class(config: TrainConfig) -> Any:
    """Import and return the adapter class of `config.model.family`."""
    homes = {**FAMILIES, **(SENTENCES if config.model.head == "sentences" else {}), ANY_ARCHITECTURE: TRANSFORMER}
    module, _, name = homes.get(config.model.family, config.model.family).partition(":")
    try:
        with _no_collections():
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f'model.family {config.model.family!r}: {error}; give the "module:Class" of an adapter that this process can import'
        ) from None


@contextmanager
def _no_collections() -> Iterator[None]:
    """Switch off the garbage collector while modules are imported: it finds nothing, and takes 0.5 of the 4 s that transformers needs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_family(config: TrainConfig) -> None:
    """Refuse an unknown family, and a model.head that the family does not have."""
    family = config.model.family
    if family == ANY_ARCHITECTURE:
        if config.model.architecture is None and config.model.from_pretrained is None:
            raise SettingsError("model.family=transformers without a model type: set model.architecture, or model.from_pretrained")
        return
    refuse_post_ln(family, f"model.family {family!r}")
    if family not in FAMILIES and ":" not in family:
        raise SettingsError(
            f'model.family {family!r} is not known: choose from {", ".join(families())}, or give "module:Class" of your own'
        )
    head = config.model.head
    if head != "auto" and not (head == "sentences" and family in SENTENCES):
        other = f"model.family {' or '.join(SENTENCES)}, or with " if head == "sentences" else ""
        raise SettingsError(f"model.head={head} goes with {other}model.architecture; got family {family}")


__all__ = [
    "FAMILIES", "Architecture", "LayerStack", "architecture_class", "build_architecture", "check_batched", "check_family", "check_muon",
    "check_network", "families", "refuse_unnamed_code", "register",
]  # fmt: skip
