"""Models whose residual layers have a step size Δt: transformers' own, with x + Δt·(layer(x) − x) for every layer(x).

transformers' configurations have no Δt, so an export of such a network has a config.json of its own type, which AutoModel refuses
instead of loading another network.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayllp.errors import CheckpointError
from rayllp.models.weights import find
from rayllp.state import State, interpolate

MODEL_TYPE = "rayllp_scaled"
# Where the residual layers are, in the order of their step sizes.
LAYERS = {
    "GPT2LMHeadModel": ("transformer.h",),
    "LlamaForCausalLM": ("model.layers",),
    "RobertaPreLayerNormForMaskedLM": ("roberta_prelayernorm.encoder.layer",),
    "RobertaPreLayerNormForTokenClassification": ("roberta_prelayernorm.encoder.layer",),
    "RobertaPreLayerNormForSequenceClassification": ("roberta_prelayernorm.encoder.layer",),
    "ViTForImageClassification": ("vit.layers",),
    "MBartForConditionalGeneration": ("model.encoder.layers", "model.decoder.layers"),
}

# A mixin's super() is whatever model class it is mixed into; mypy is told that it is any.
_Mixed: Any = PreTrainedModel if TYPE_CHECKING else object


class ScaledModel:
    """Loads what `rayllp export` writes of a run whose step sizes are not all 1."""

    @staticmethod
    def from_pretrained(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
        """The model: an instance of the transformers class it was trained as, with the same parameter names; it generates and saves.

        Args:
            folder: written by `rayllp export`, or by `save_pretrained` of a model that this returned.
            kwargs: for the transformers class's own from_pretrained.

        Raises:
            CheckpointError: no such folder, or a model without step sizes.
        """
        path = find(str(folder))
        values = _read_config(path)
        inner = values["transformers_config"]
        base = model_class(inner["architectures"][0])
        scaled: Any = type(base.__name__, (_Scaled, base), {"step_sizes": tuple(values["step_sizes"]), "__module__": base.__module__})
        return scaled.from_pretrained(path, config=base.config_class.from_dict(inner), **kwargs)


class _Scaled(_Mixed):
    """What is mixed into a transformers class: step sizes on its layers, and a config.json that says so when it is saved."""

    step_sizes: ClassVar[tuple[float, ...]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = list(residual_layers(self))
        if len(layers) != len(self.step_sizes):
            raise CheckpointError(
                f"config.json has {len(self.step_sizes)} step_sizes for {len(layers)} layers: it was altered; export again"
            )
        for layer, size in zip(layers, self.step_sizes, strict=True):
            if size != 1:
                layer.register_forward_hook(partial(_step, size), with_kwargs=True)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        path.write_text(scaled_config(json.loads(path.read_text()), self.step_sizes))


def scaled_config(inner: dict[str, Any], step_sizes: Sequence[float]) -> str:
    """The config.json of a model with these step sizes around transformers' configuration."""
    return json.dumps({"model_type": MODEL_TYPE, "step_sizes": list(step_sizes), "transformers_config": inner}, indent=2) + "\n"


def loader(folder: Path) -> str:
    """What loads a folder that `rayllp export` wrote."""
    values = json.loads((folder / "config.json").read_text())
    return "rayllp.models.scaled.ScaledModel" if values["model_type"] == MODEL_TYPE else f"transformers.{values['architectures'][0]}"


def model_class(name: str) -> type[PreTrainedModel]:
    """transformers' class of this name.

    Raises:
        CheckpointError: where its layers are is not known.
    """
    if name not in LAYERS:
        raise CheckpointError(f"the layers of {name} are not known: step sizes can be given to {', '.join(LAYERS)}")
    return getattr(transformers, name)


def residual_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The residual layers in the order of their step sizes."""
    name = next(kind.__name__ for kind in type(model).__mro__ if kind.__name__ in LAYERS)
    for path in LAYERS[name]:
        yield from model.get_submodule(path).children()


def _step(size: float, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], after: Tensor) -> State:
    before = args[0] if args else kwargs["hidden_states"]
    return interpolate(before, after, size)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no config.json that can be read ({error}): give a folder written by `rayllp export`") from None
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder} is a plain transformers model of type {values.get('model_type')}, without step sizes: load it by AutoModel"
        )
    return values
