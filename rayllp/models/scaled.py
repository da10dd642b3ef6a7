"""Models whose layers have step sizes Δt: transformers' own, with x + Δt·(layer(x) − x) in place of layer(x).

transformers' configurations have no Δt. An export of such a network therefore has a config.json of its own model type, and the code that
reads it: AutoModel loads it where it is allowed to run that code, and elsewhere refuses it instead of loading a different network.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from rayllp.errors import CheckpointError
from rayllp.hf_config import TASKS
from rayllp.models import modeling_rayllp
from rayllp.models.weights import find

CODE = "modeling_rayllp.py"
"""The file in an export that holds this code."""


def load_scaled(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model with step sizes, without running code of its folder, as AutoModel would.

    Args:
        folder: written by `rayllp export`, or by `save_pretrained` of a model that this function returned.
        kwargs: passed to the transformers class's own from_pretrained.

    Returns:
        An instance of the transformers class that was trained, with the same parameter names, generation and saving.

    Raises:
        CheckpointError: there is no such folder, or its model has no step sizes.
    """
    path = find(str(folder))
    name = _read_config(path)["transformers_config"]["architectures"][0]
    model_class(name)
    config, model = modeling_rayllp.classes(name)
    try:
        return model.from_pretrained(path, config=config.from_pretrained(path), **kwargs)
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: its config.json does not fit its model ({error}); export again") from None


def write_scaled(folder: Path, kept: Mapping[str, Any], task: str) -> None:
    """Turn an export into one of a model with step sizes: rewrite its config.json and add the code that loads it.

    Args:
        folder: the export.
        kept: the step sizes, the full names of the layers they belong to, and the settings they come from.
        task: the model's task, which decides its auto class.
    """
    path = folder / "config.json"
    inner = json.loads(path.read_text(encoding="utf-8"))
    module = CODE.removesuffix(".py")
    auto_map = {"AutoConfig": f"{module}.ScaledConfig", TASKS[task].auto: f"{module}.ScaledModel"}
    path.write_text(modeling_rayllp.outer(inner, {**kept, "auto_map": auto_map}), encoding="utf-8")
    code = Path(modeling_rayllp.__file__).read_text(encoding="utf-8")
    named = f'ScaledConfig, ScaledModel = classes("{inner["architectures"][0]}", __name__)\n'
    (folder / CODE).write_text(f"{code}\n\n{named}", encoding="utf-8")


def loader(folder: Path) -> tuple[str, str]:
    """Return the class that loads a folder written by `rayllp export`, and its further arguments, both as source text for the user."""
    if not (folder / "config.json").is_file():
        return "peft.AutoPeftModel", ""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if values["model_type"] == modeling_rayllp.MODEL_TYPE:
        return f"transformers.{next(name for name in values['auto_map'] if name != 'AutoConfig')}", ", trust_remote_code=True"
    return f"transformers.{values['architectures'][0]}", ""


def model_class(name: str) -> type[PreTrainedModel]:
    """Return transformers' class of this name.

    Raises:
        CheckpointError: there is none.
    """
    model = getattr(transformers, name, None)
    if model is None:
        raise CheckpointError(f"transformers {transformers.__version__} has no {name}: use the version that the model was made with")
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no config.json that can be read ({error}): give a folder written by `rayllp export`") from None
    if values.get("model_type") != modeling_rayllp.MODEL_TYPE:
        raise CheckpointError(
            f"{folder} is a plain transformers model of type {values.get('model_type')}, without step sizes: load it by AutoModel"
        )
    return values
