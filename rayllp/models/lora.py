"""LoRA (arXiv:2106.09685) by peft: low-rank adapters on the linear maps of layers, with everything else frozen."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rayllp.config.network import LoRASettings
from rayllp.errors import CheckpointError, SettingsError, nearest_name

ADAPTER = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix of a module's full name in adapters as peft stores them."""
NAME = "default"
"""The name that peft gives to an adapter by default; it does not appear in stored names."""


def linear_maps(layer: nn.Module) -> list[str]:
    """Return the names, within the layer, of the modules that can have adapters."""
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def add_adapters(layer: nn.Module, path: str, settings: LoRASettings) -> None:
    """Put adapters on a layer's linear maps. Which parameters are trained is decided elsewhere (`ModelSettings.trains`).

    Args:
        layer: the layer, which is changed in place.
        path: full name of the layer, under which stored adapters are found.
        settings: rank, targets and so on.

    Raises:
        SettingsError: peft is not installed, or no layer has a target.
        CheckpointError: the stored adapters do not fit.
    """
    from peft import inject_adapter_in_model

    targets = _targets(layer, settings)
    if targets:  # a layer of another kind may have none of the targets
        inject_adapter_in_model(_peft_config(settings, targets, layer), layer, NAME)
        layer.requires_grad_()  # undo that peft has frozen everything but the adapters
    if settings.from_pretrained is not None:
        _fill(layer, path, Path(settings.from_pretrained))


def check_targets(layers: Sequence[nn.Module], settings: LoRASettings) -> None:
    """Refuse adapters if peft is not installed, and targets that match nothing in any of these layers."""
    if find_spec("peft") is None:
        raise SettingsError("model.lora needs peft: pip install 'rayllp[lora]', or leave model.lora out")
    names = sorted({_leaf(name) for layer in layers for name in linear_maps(layer)})
    for target in settings.targets or ():
        if target not in names:
            near = nearest_name(target, names)
            raise SettingsError(
                f"model.lora.targets has {target!r}, which is no linear map of any layer: choose from {', '.join(names)}"
                + (f" ({near}?)" if near else "")
            )


def _targets(layer: nn.Module, settings: LoRASettings) -> list[str]:
    """Return the names, within a layer, of the linear maps that get adapters."""
    return [name for name in linear_maps(layer) if settings.targets is None or _leaf(name) in settings.targets]


def _peft_config(settings: LoRASettings, targets: list[str], layer: nn.Module) -> Any:
    from peft import LoraConfig

    transposed = any(isinstance(layer.get_submodule(name), Conv1D) for name in targets)
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets, fan_in_fan_out=transposed
    )


def stored_name(name: str) -> str | None:
    """Return a parameter's name as peft stores it; None if it does not belong to an adapter."""
    return PREFIX + name.replace(f".{NAME}.", ".") if f".{NAME}." in name and "lora_" in name else None


def _fill(layer: nn.Module, path: str, folder: Path) -> None:
    """Load stored adapters into a layer."""
    try:
        with safe_open(folder / ADAPTER, framework="pt") as file:
            known = set(file.keys())
            for name, parameter in layer.named_parameters():
                stored = stored_name(f"{path}.{name}")
                if stored is None:
                    continue
                if stored not in known:
                    raise CheckpointError(
                        f"model.lora.from_pretrained {folder} has no {stored}: it is of another model or has other targets; set "
                        "model.lora.targets to match"
                    )
                value = file.get_tensor(stored)
                if value.shape != parameter.shape:
                    raise CheckpointError(
                        f"model.lora.from_pretrained {folder}: {stored} is {tuple(value.shape)} there and {tuple(parameter.shape)} here: "
                        "set model.lora.rank to match"
                    )
                with torch.no_grad():
                    parameter.copy_(value)
    except OSError as error:
        raise CheckpointError(f"model.lora.from_pretrained {folder}: no {ADAPTER} there that could be read ({error})") from None


def save_adapter(
    folder: Path, tensors: Mapping[str, Tensor], settings: LoRASettings, layer: nn.Module, base: str, task: str | None
) -> None:
    """Write adapters in peft's format.

    Args:
        folder: where to write.
        tensors: the adapters' parameters by full name.
        settings: rank, targets and so on.
        layer: a layer that has the targets, without adapters.
        base: the model that the adapters belong to (`model.from_pretrained`).
        task: peft's name for the model's task, such as CAUSAL_LM.
    """
    targets = _targets(layer, settings)
    config = _peft_config(settings, targets, layer)
    config.target_modules = {_leaf(name) for name in targets}
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, task, True
    config.save_pretrained(folder)
    save_file({stored_name(name) or name: value for name, value in tensors.items()}, folder / ADAPTER, metadata={"format": "pt"})


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
