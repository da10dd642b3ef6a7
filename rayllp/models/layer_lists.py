"""Find the residual layers in a model of transformers."""

from torch import nn
from transformers import PreTrainedModel

from rayllp.models.replay import UnsupportedModelError

Lists = nn.ModuleList | nn.Sequential


def layer_paths(model: PreTrainedModel) -> tuple[list[str], int]:
    """Return the full names of all layers in order, and how many of them belong to an encoder.

    The layers are the largest outermost list of modules, counted in parameters; an encoder–decoder has one such list in each half.

    Raises:
        UnsupportedModelError: there is no such list.
    """
    if model.config.is_encoder_decoder:
        halves = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in ("encoder", "decoder")}
        encoder = next((name for name in halves if name.endswith("encoder")), None)
        decoder = next((name for name in halves if name.endswith("decoder")), None)
        if encoder is None or decoder is None:
            raise UnsupportedModelError("it is an encoder–decoder, and has no modules of these names")
        first, last = (_largest(halves[name], name + ".") for name in (encoder, decoder))
        return first + last, len(first)
    return _largest(model, ""), 0


def _largest(model: nn.Module, prefix: str) -> list[str]:
    """Return the names of the layers in the largest outermost list of modules."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, Lists) and len(module)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(other + ".") for other, _ in lists)]
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in outer}
    if not sizes or not max(sizes.values()):
        raise UnsupportedModelError("it has no list of layers")
    name = max(sizes, key=lambda each: sizes[each])
    return [f"{prefix}{name}.{n}" for n in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]
