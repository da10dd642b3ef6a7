"""What is trained: adapters over transformers' own modules, and a user's own LayerStack."""

import importlib

from rayllp.config import TrainConfig
from rayllp.data.base import Facts
from rayllp.errors import SettingsError
from rayllp.models.base import Architecture
from rayllp.models.stack import LayerStack

# Where each family's adapter is; imported when it is asked for, since transformers takes seconds to import.
FAMILIES = {
    "gpt2": "rayllp.models.gpt2:GPT2",
    "llama": "rayllp.models.llama:Llama",
    "bert": "rayllp.models.bert:BERT",
    "mc": "rayllp.models.bert:Words",
    "vit": "rayllp.models.vit:ViT",
    "mt": "rayllp.models.mt:MT",
}
SENTENCES = {"bert": "rayllp.models.bert:Sentences"}
POST_LN = {"roberta": "bert", "distilbert": "bert", "xlm": "bert", "gpt": "gpt2", "marian": "mt", "bart": "mt", "transformer": "mt"}


def families() -> tuple[str, ...]:
    """Names that model.family takes."""
    return tuple(FAMILIES)


def register(family: str, home: str) -> None:
    """Add a family: `home` is "module:Class" of its adapter."""
    FAMILIES[family] = home


def build_architecture(config: TrainConfig, facts: Facts) -> Architecture:
    """The adapter of `config.model.family` for data with these facts.

    Raises:
        SettingsError: no such family, or settings that do not fit the data.
    """
    check_family(config)
    homes = SENTENCES if config.model.head == "sentences" else FAMILIES
    module, _, name = homes[config.model.family].partition(":")
    return getattr(importlib.import_module(module), name).from_settings(config, facts)


def check_family(config: TrainConfig) -> None:
    """Refuse an unknown family."""
    family = config.model.family
    if family in POST_LN:
        raise SettingsError(
            f"model.family {family!r} is post-LN: its norms follow the residual sum, so that a layer is no step x + h·F(x) and MGRIT "
            f"does not apply. Use its pre-LN relative, model.family={POST_LN[family]}"
        )
    if family not in FAMILIES:
        raise SettingsError(f"model.family {family!r} is not known: choose from {', '.join(families())}")
    if config.model.head == "sentences" and family not in SENTENCES:
        raise SettingsError(f"model.head=sentences goes with model.family {' or '.join(SENTENCES)}; got {family}")


__all__ = ["FAMILIES", "Architecture", "LayerStack", "build_architecture", "check_family", "families", "register"]
