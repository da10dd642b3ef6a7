"""A transformers model whose layers have step sizes: x + size·(layer(x) − x) in place of layer(x).

`rayllp export` puts a copy of this file beside the weights of such a model, so that transformers alone can load it:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

MODEL_TYPE = "rayllp_scaled"
"""Model type in config.json, which holds the model's usual configuration as "transformers_config"."""
KEPT = ("step_sizes", "layers", "steps", "auto_map")
"""Further fields of config.json: the layers' step sizes and full names, the settings they come from, and the classes that load them."""


def outer(inner: dict[str, Any], kept: dict[str, Any]) -> str:
    """Return the config.json of a model with step sizes."""
    return json.dumps({"model_type": MODEL_TYPE, **kept, "transformers_config": inner}, indent=2) + "\n"


def classes(name: str, module: str = __name__) -> tuple[type[Any], type[Any]]:
    """Make a configuration class and a model class with step sizes from transformers' class `name`; both get `module` as their module."""
    base: Any = getattr(transformers, name)

    class ScaledConfig(base.config_class):
        @classmethod
        def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            values, unused = super().get_config_dict(*args, **kwargs)
            if "transformers_config" not in values:
                return values, unused
            kept = {name: values[name] for name in KEPT if name in values}
            return {**values["transformers_config"], "auto_map": kept.get("auto_map"), "scaled": kept}, unused

    class ScaledModel(base):
        config_class = ScaledConfig

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            sizes, paths = config.scaled["step_sizes"], config.scaled["layers"]
            if len(sizes) != len(paths):
                raise ValueError(f"config.json has {len(sizes)} step_sizes for {len(paths)} layers: it was altered; export again")
            for path, size in zip(paths, sizes, strict=True):
                if size != 1:
                    self.get_submodule(path).register_forward_hook(partial(_step, size), with_kwargs=True)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            super().save_pretrained(save_directory, *args, **kwargs)
            path = Path(save_directory) / "config.json"
            inner = json.loads(path.read_text(encoding="utf-8"))
            kept = inner.pop("scaled")
            inner.pop("auto_map", None)
            path.write_text(outer(inner, kept), encoding="utf-8")

    ScaledModel.__name__ = ScaledModel.__qualname__ = name
    ScaledModel.__module__ = ScaledConfig.__module__ = module
    return ScaledConfig, ScaledModel


def _step(size: float, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], after: Any) -> Any:
    before = args[0] if args else kwargs["hidden_states"]
    if isinstance(after, tuple):
        return (torch.lerp(before, after[0], size), *after[1:])
    return torch.lerp(before, after, size)
