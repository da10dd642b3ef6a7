"""Build a whole model without its weights: large tensors are on the meta device, small ones have the values that constructors give them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from transformers import PreTrainedConfig, PreTrainedModel

from rayllp.errors import SettingsError
from rayllp.models.randomness import seeded

LARGE = 1 << 16
"""Number of elements from which a tensor is put on the meta device."""


class _LargeOnMeta(TorchFunctionMode):
    """Makes tensor constructors put large tensors on the meta device and small ones where they belong."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in _device_constructors() or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        created = function(*args, **{**kwargs, "device": "meta"})
        return function(*args, **kwargs) if isinstance(created, Tensor) and created.numel() < LARGE else created


def build_on_meta(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of this configuration without weights.

    Small tensors are kept because constructors compute values, such as scales and positions, that no initialisation rule computes again.

    Raises:
        SettingsError: there is no such model.
    """
    try:
        with seeded("outline"), _LargeOnMeta():
            return kind(config)
    except Exception as error:  # sizes that contradict each other fail wherever a model first uses them
        raise SettingsError(
            f"transformers cannot make a {kind.__name__} of these sizes ({type(error).__name__}: {error}): set model.config_overrides, or "
            "start from a checkpoint (model.from_pretrained)"
        ) from error


def allocate_empty(module: nn.Module) -> None:
    """Allocate everything that is on the meta device, and replace every parameter, so that transformers takes them for uninitialised."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                value = torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter.detach().clone()
                owner._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        fill_buffers(owner)


def fill_buffers(module: nn.Module) -> None:
    """Allocate those of this module's own buffers that are on the meta device."""
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.empty_like(buffer, device="cpu")


def initialiser(model: PreTrainedModel, path: str) -> Callable[[nn.Module], None]:
    """Return the function that initialises the module `path`: the rules of the innermost transformers model that contains it."""
    owner: PreTrainedModel = model
    place: nn.Module = model
    for name in path.split(".") if path else ():
        place = place.get_submodule(name)
        owner = place if isinstance(place, PreTrainedModel) else owner
    return owner._init_weights
