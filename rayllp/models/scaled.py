"""Models whose residual layers have a step size Δt: transformers' own, with x + Δt·(layer(x) − x) for every layer(x).

transformers' configurations have no Δt, so an export of such a network has a config.json of its own type, which AutoModel refuses
instead of loading another network.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayllp.errors import CheckpointError
from rayllp.models.weights import find
from rayllp.sizes import SCALED
from rayllp.state import State, interpolate

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
        kept = {name: values[name] for name in ("step_sizes", "layers", "steps")}
        scaled: Any = type(base.__name__, (_Scaled, base), {"kept": kept, "__module__": base.__module__})
        return scaled.from_pretrained(path, config=base.config_class.from_dict(inner), **kwargs)


class _Scaled(_Mixed):
    """What is mixed into a transformers class: step sizes on its layers, and a config.json that says so when it is saved."""

    kept: ClassVar[dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sizes, layers = self.kept["step_sizes"], self.kept["layers"]
        if len(layers) != len(sizes):
            raise CheckpointError(f"config.json has {len(sizes)} step_sizes for {len(layers)} layers: it was altered; export again")
        for path, size in zip(layers, sizes, strict=True):
            try:
                layer = self.get_submodule(path)
            except AttributeError:
                raise CheckpointError(f"{type(self).__name__} has no module {path}: config.json was altered; export again") from None
            if size != 1:
                layer.register_forward_hook(partial(_step, size), with_kwargs=True)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        path.write_text(scaled_config(json.loads(path.read_text(encoding="utf-8")), self.kept), encoding="utf-8")


def scaled_config(inner: dict[str, Any], kept: Mapping[str, Any]) -> str:
    """The config.json around transformers' configuration: step sizes, the full names of the layers that have them, and the settings."""
    return json.dumps({"model_type": SCALED, **kept, "transformers_config": inner}, indent=2) + "\n"


def loader(folder: Path) -> str:
    """What loads a folder that `rayllp export` wrote."""
    if not (folder / "config.json").is_file():
        return "peft.AutoPeftModel"
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "rayllp.models.scaled.ScaledModel" if values["model_type"] == SCALED else f"transformers.{values['architectures'][0]}"


def model_class(name: str) -> type[PreTrainedModel]:
    """transformers' class of this name.

    Raises:
        CheckpointError: there is none.
    """
    found = getattr(transformers, name, None)
    if found is None:
        raise CheckpointError(f"transformers {transformers.__version__} has no {name}: use the version that the model was made with")
    return found


def _step(size: float, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], after: Tensor) -> State:
    before = args[0] if args else kwargs["hidden_states"]
    return interpolate(before, after, size)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no config.json that can be read ({error}): give a folder written by `rayllp export`") from None
    if values.get("model_type") != SCALED:
        raise CheckpointError(
            f"{folder} is a plain transformers model of type {values.get('model_type')}, without step sizes: load it by AutoModel"
        )
    return values
