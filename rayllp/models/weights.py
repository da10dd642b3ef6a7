"""Pretrained weights: a block's own layers, read out of a transformers checkpoint's safetensors and nothing more."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from rayllp.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class PretrainedWeights:
    """Names of a checkpoint's tensors and the files they are in; empty where nothing is loaded.

    Args:
        files: tensor name -> file.
        prefix: the model's own prefix for its base model ("transformer."), with or without which a checkpoint may be written.
    """

    def __init__(self, files: dict[str, Path], prefix: str, source: str = "") -> None:
        self.files, self.prefix, self.source = files, prefix, source

    @classmethod
    def open(cls, source: str | None, model: PreTrainedModel) -> "PretrainedWeights":
        """The checkpoint `source`, a folder or a name that the Hugging Face cache or hub knows.

        Raises:
            CheckpointError: no safetensors there, or tensors of another architecture.
        """
        prefix = model.base_model_prefix + "."
        if source is None:
            return cls({}, prefix)
        folder = find(source)
        weights = cls(_names(folder), prefix, source)
        wanted = [name for name, _ in model.named_parameters()]
        base = [name for name in wanted if name.startswith(prefix)]
        found = [name for name in base if weights.stored_name(name)]
        if len(found) < len(base):
            missing = next(name for name in base if not weights.stored_name(name))
            raise CheckpointError(
                f"model.from_pretrained {source} has {len(found)} of the {len(base)} tensors that {type(model).__name__} needs; {missing} "
                "is not there: it is a checkpoint of another architecture or of fewer layers. Set model.family and model.layers to match"
            )
        return weights

    def stored_name(self, name: str) -> str | None:
        """What the checkpoint calls the parameter `name`."""
        candidates = (name, name.removeprefix(self.prefix), self.prefix + name)
        return next((candidate for candidate in candidates if candidate in self.files), None)

    def has(self, path: str) -> bool:
        """Whether the module `path` is in the checkpoint."""
        starts = (path + ".", path.removeprefix(self.prefix) + ".")
        return any(name.startswith(starts) for name in self.files)

    def fill(self, piece: nn.Module) -> None:
        """Overwrite the piece's parameters that the checkpoint has.

        Raises:
            CheckpointError: a tensor of another shape, or a damaged file.
        """
        for name, parameter in piece.named_parameters():
            stored = self.stored_name(name)
            if stored is None:
                continue
            try:
                with safe_open(self.files[stored], framework="pt") as file:
                    value = file.get_tensor(stored)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.files[stored]} cannot be read ({error}); fetch the checkpoint again") from None
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"model.from_pretrained {self.source}: {name} is {tuple(value.shape)} there and {tuple(parameter.shape)} in this model: "
                    "set model.width, model.feed_forward, sequence_length and data.tokenizer to match the checkpoint"
                )
            with torch.no_grad():
                parameter.copy_(value)


def find(source: str) -> Path:
    """The folder of a checkpoint: `source` itself, or what the hub's cache has (fetched where there is a network)."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:
        raise CheckpointError(
            f"model.from_pretrained {source} is neither a folder nor a model that could be fetched ({type(error).__name__}): give a folder "
            "written by `rayllp export` or save_pretrained"
        ) from None


def _names(folder: Path) -> dict[str, Path]:
    try:
        if (folder / INDEX).is_file():
            table = json.loads((folder / INDEX).read_text())["weight_map"]
            return {name: folder / file for name, file in table.items()}
        if (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), folder / SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"model.from_pretrained {folder}: its safetensors cannot be read ({error})") from None
    raise CheckpointError(
        f"model.from_pretrained {folder} has no {SINGLE}: pickled weights are not read; save the model with save_pretrained "
        "(safe serialization) first"
    )
