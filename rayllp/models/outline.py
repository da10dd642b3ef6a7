"""A whole model without its weights: what is large is on the meta device, the rest has the values that its constructors give it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from transformers import PreTrainedConfig, PreTrainedModel

from rayllp.models.randomness import seeded

LARGE = 1 << 16
"""Elements from which a tensor is not made."""


class _LargeOnMeta(TorchFunctionMode):
    """Constructors of tensors make small ones, and of large ones their shape."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in _device_constructors() or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        made = function(*args, **{**kwargs, "device": "meta"})
        return function(*args, **kwargs) if isinstance(made, Tensor) and made.numel() < LARGE else made


def outline(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model of this configuration. Many constructors give values that no rule of initialisation gives again: scales, positions."""
    with seeded("outline"), _LargeOnMeta():
        return kind(config)


def without_values(module: nn.Module) -> None:
    """Give memory to what is on the meta device, and make every parameter a new one, which transformers takes for not initialised."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                value = torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter.detach().clone()
                owner._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        fill_buffers(owner)


def fill_buffers(module: nn.Module) -> None:
    """Give memory to this module's buffers that are on the meta device."""
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.empty_like(buffer, device="cpu")


def initialiser(model: PreTrainedModel, path: str) -> Callable[[nn.Module], None]:
    """What initialises the module `path`: the rules of the innermost transformers model that it is in."""
    owner: PreTrainedModel = model
    place: nn.Module = model
    for name in path.split(".") if path else ():
        place = place.get_submodule(name)
        owner = place if isinstance(place, PreTrainedModel) else owner
    return owner._init_weights
