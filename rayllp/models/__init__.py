"""What is trained: adapters over transformers' own modules, and a user's own LayerStack."""

import importlib

from rayllp.config import TrainConfig
from rayllp.data.base import Facts
from rayllp.errors import SettingsError
from rayllp.models.base import Architecture
from rayllp.models.stack import LayerStack
from rayllp.sizes import model_type

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
# Post-LN models, by the names that transformers gives them, and the family that is their pre-LN relative.
POST_LN = dict.fromkeys(("roberta", "distilbert", "albert", "electra", "camembert", "xlm-roberta", "deberta", "deberta-v2"), "bert")
POST_LN |= {"openai-gpt": "gpt2", "marian": "mt", "bart": "mt", "fsmt": "mt"}


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
    family, source = config.model.family, config.model.from_pretrained
    _refuse_post_ln(family, f"model.family {family!r}")
    if source is not None:
        stored = model_type(source)
        post_ln = "bert" if stored == "bert" else POST_LN.get(stored)
        _refuse_post_ln(stored, f"model.from_pretrained {source}: {stored}", post_ln)
    if family not in FAMILIES:
        raise SettingsError(f"model.family {family!r} is not known: choose from {', '.join(families())}")
    if config.model.head == "sentences" and family not in SENTENCES:
        raise SettingsError(f"model.head=sentences goes with model.family {' or '.join(SENTENCES)}; got {family}")


def _refuse_post_ln(name: str, what: str, relative: str | None = None) -> None:
    relative = relative or POST_LN.get(name)
    if relative:
        raise SettingsError(
            f"{what} is post-LN: its norms follow the residual sum, so that a layer is no step x + h·F(x) and MGRIT does not apply. "
            f"Use its pre-LN relative, model.family={relative}"
        )


__all__ = ["FAMILIES", "Architecture", "LayerStack", "build_architecture", "check_family", "families", "register"]
