"""What is trained: adapters over transformers' own modules, and a user's own LayerStack."""

from rayllp.config import TrainConfig
from rayllp.errors import SettingsError
from rayllp.models.base import Architecture
from rayllp.models.stack import LayerStack


def families() -> tuple[str, ...]:
    """Names that model.family takes."""
    return ("gpt2",)


def build_architecture(config: TrainConfig, vocabulary: int) -> Architecture:
    """The adapter of `config.model.family`.

    Raises:
        SettingsError: no such family.
    """
    check_family(config)
    from rayllp.models.gpt2 import GPT2  # transformers takes seconds to import: only where a model is built

    return GPT2.from_settings(config, vocabulary)


def check_family(config: TrainConfig) -> None:
    """Refuse an unknown family."""
    if config.model.family not in families():
        raise SettingsError(f"model.family {config.model.family!r} is not known: choose from {', '.join(families())}")


__all__ = ["Architecture", "LayerStack", "build_architecture", "check_family", "families"]
