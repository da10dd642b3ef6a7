"""Models whose residual layers have a step size Δt: transformers' own, with x + Δt·(layer(x) − x) for every layer(x).

transformers' configurations have no Δt, so an export of such a network has a config.json of its own type, and the code that reads it:
AutoModel loads it where it may run that code, and refuses it elsewhere instead of loading another network.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from rayllp.errors import CheckpointError
from rayllp.hf_config import SCALED
from rayllp.models import step_sizes
from rayllp.models.weights import find

CODE = "modeling_rayllp.py"
"""The file in an export that transformers loads such a model by."""
AUTO = {
    "causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "words": "AutoModelForTokenClassification",
    "sentences": "AutoModelForSequenceClassification", "images": "AutoModelForImageClassification", "translation": "AutoModelForSeq2SeqLM",
}  # fmt: skip
"""transformers' class that loads a model of each task."""


class ScaledModel:
    """Loads what `rayllp export` writes of a run whose step sizes are not all 1, without running code of the folder."""

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
        name = _read_config(path)["transformers_config"]["architectures"][0]
        model_class(name)
        config, model = step_sizes.classes(name)
        try:
            return model.from_pretrained(path, config=config.from_pretrained(path), **kwargs)
        except (AttributeError, ValueError) as error:
            raise CheckpointError(f"{path}: its config.json does not fit its model ({error}); export again") from None


def write_scaled(folder: Path, kept: Mapping[str, Any], task: str) -> None:
    """Make an export one of a model with step sizes: its config.json, and the code that loads it.

    Args:
        kept: step sizes, the full names of the layers that have them, and the settings.
    """
    path = folder / "config.json"
    inner = json.loads(path.read_text(encoding="utf-8"))
    module = CODE.removesuffix(".py")
    auto_map = {"AutoConfig": f"{module}.ScaledConfig", AUTO[task]: f"{module}.ScaledModel"}
    path.write_text(step_sizes.outer(inner, {**kept, "auto_map": auto_map}), encoding="utf-8")
    code = Path(step_sizes.__file__).read_text(encoding="utf-8")
    named = f'ScaledConfig, ScaledModel = classes("{inner["architectures"][0]}", __name__)\n'
    (folder / CODE).write_text(f"{code}\n\n{named}", encoding="utf-8")


def loader(folder: Path) -> tuple[str, str]:
    """What loads a folder that `rayllp export` wrote: a class, and what it is given beside the folder."""
    if not (folder / "config.json").is_file():
        return "peft.AutoPeftModel", ""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if values["model_type"] == SCALED:
        return f"transformers.{next(name for name in values['auto_map'] if name != 'AutoConfig')}", ", trust_remote_code=True"
    return f"transformers.{values['architectures'][0]}", ""


def model_class(name: str) -> type[PreTrainedModel]:
    """transformers' class of this name.

    Raises:
        CheckpointError: there is none.
    """
    found = getattr(transformers, name, None)
    if found is None:
        raise CheckpointError(f"transformers {transformers.__version__} has no {name}: use the version that the model was made with")
    return found


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
