"""Pretrained weights: read a worker's own layers, and nothing more, from the safetensors of a transformers checkpoint."""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from rayllp.config import TrainConfig
from rayllp.errors import CheckpointError
from rayllp.hf_config import LISTED, count_layers, layer_sources, with_layers
from rayllp.models.layer_lists import layer_paths
from rayllp.models.meta_device import build_on_meta

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Place(NamedTuple):
    """Where a tensor is stored: a file, and the tensor's name in it."""

    file: Path
    key: str


class Converted(NamedTuple):
    """Parameters that transformers makes from other tensors when it loads a model, such as one of all experts from one tensor for each.

    Attributes:
        converter: transformers' rule.
        first: full name of the first parameter that the rule makes.
        parts: the tensors that it takes, each with the pattern of the rule that it matches.
    """

    converter: WeightConverter
    first: str
    parts: list[tuple[Place, str]]

    def make(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the parameters by full name."""
        converter = copy.deepcopy(self.converter)
        for place, pattern in self.parts:
            (value,) = _read(place.file, [place.key])
            converter.add_tensor(self.first, place.key, pattern, value.clone())
        parameters = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in parameters.items()}


class PretrainedWeights:
    """The tensors of a checkpoint and where they are stored; empty if nothing is loaded.

    Args:
        places: where each tensor is stored, by the name that the model has for it.
        prefix: the model's prefix for its base model ("transformer."); a checkpoint may be written with or without it.
        source: the checkpoint, for errors.
        tied: for each name of a parameter with several names, all of them.

    Attributes:
        converted: parameters that are made from several tensors, or cut out of one, by full name in the checkpoint's model.
        model: the checkpoint's model, without weights; None if nothing is loaded.
        moved: for each layer of the model, the checkpoint's layer that it is read from, both by full name; empty if the depths agree.
    """

    def __init__(self, places: Mapping[str, Place], prefix: str, source: str = "", tied: Mapping[str, list[str]] | None = None) -> None:
        self.places, self.prefix, self.source, self.tied = places, prefix, source, tied or {}
        self.converted: dict[str, Converted] = {}
        self.model: PreTrainedModel | None = None
        self.moved: dict[str, str] = {}

    @classmethod
    def open(cls, source: str | None, model: PreTrainedModel) -> "PretrainedWeights":
        """Open the checkpoint `source`: a folder, or a name in the Hugging Face cache or on the hub.

        Only the base model's tensors have to be there: the head may be new.

        Raises:
            CheckpointError: there are no safetensors, or they are of another architecture or number of layers.
        """
        prefix = model.base_model_prefix + "."
        if source is None:
            return cls({}, prefix)
        places, converted = _by_model_names(_places(find(source)), model)
        weights = cls(places, prefix, source, names_of_tied(model))
        weights.converted, weights.model = converted, model
        base = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
        missing = [name for name in base if weights.place(name) is None and name not in converted]
        if missing:
            raise CheckpointError(
                f"model.from_pretrained {source} has {len(base) - len(missing)} of the {len(base)} tensors that {type(model).__name__} "
                f"needs; {missing[0]} is not there: it is a checkpoint of another architecture or of fewer layers. Set model.family and "
                "model.layers to match"
            )
        weights.refuse_more_layers(base)
        weights.refuse_other_shapes(model)
        return weights

    def refuse_more_layers(self, names: Iterable[str]) -> None:
        """Refuse tensors that differ from a known one only in the number of the layer: those layers would silently be left out."""
        known = set(names)
        forms = {NUMBER.sub("#", name) for name in known}
        for name in self.places:
            full = name if name.startswith(self.prefix) else self.prefix + name
            if full not in known and NUMBER.sub("#", full) in forms:
                raise CheckpointError(
                    f"model.from_pretrained {self.source} has {full}, a layer beyond this model's: set model.layers (mt: and "
                    "model.encoder_layers) to match the checkpoint"
                )

    def refuse_other_shapes(self, model: nn.Module) -> None:
        """Refuse a tensor whose shape is not the model's; only the files' headers are read."""
        wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in wanted:
            place = self.place(name)
            if place is not None:
                by_file.setdefault(place.file, []).append((place.key, name))
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                for key, name in names:
                    self._check_shape(name, tuple(file.get_slice(key).get_shape()), wanted[name])

    def _check_shape(self, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if stored != wanted:
            raise CheckpointError(
                f"model.from_pretrained {self.source}: {name} is {stored} there and {wanted} in this model: set model.width, "
                "model.feed_forward and data.tokenizer to match the checkpoint; a head for other classes needs a checkpoint without one"
            )

    def _stored_name(self, name: str) -> str:
        """Return the checkpoint's name of a module or a parameter."""
        if not self.moved:
            return name
        parts = name.split(".")
        length = next(iter(self.moved)).count(".") + 1
        layer = ".".join(parts[:length])
        return ".".join((self.moved.get(layer, layer), *parts[length:]))

    def place(self, name: str) -> Place | None:
        """Return where the parameter `name` is stored, under that name or another that it has; None if it is not."""
        name = self._stored_name(name)
        for known in (name, *self.tied.get(name, ())):
            for candidate in (known, known.removeprefix(self.prefix), self.prefix + known):
                if candidate in self.places:
                    return self.places[candidate]
        return None

    def has(self, path: str) -> bool:
        """True if the module `path` is in the checkpoint."""
        path = self._stored_name(path)
        starts = (path + ".", path.removeprefix(self.prefix) + ".")
        return any(name.startswith(starts) for name in (*self.places, *self.converted))

    def fill(self, piece: nn.Module) -> None:
        """Overwrite the piece's parameters that the checkpoint has, in the more precise of the two dtypes.

        Raises:
            CheckpointError: a tensor has another shape, or a file is damaged.
        """
        by_file: dict[Path, list[tuple[str, str, nn.Parameter]]] = {}
        converted: dict[str, Tensor] = {}
        for name, parameter in piece.named_parameters():
            place, stored = self.place(name), self._stored_name(name)
            if stored in self.converted and place is None:
                assert self.model is not None
                if stored not in converted:
                    converted |= self.converted[stored].make(self.model)
                self._overwrite(name, parameter, converted[stored])
            elif place is not None:
                by_file.setdefault(place.file, []).append((place.key, name, parameter))
        for path, wanted in by_file.items():
            values = _read(path, [key for key, _, _ in wanted])
            for (_, name, parameter), value in zip(wanted, values, strict=True):
                self._overwrite(name, parameter, value)

    def _overwrite(self, name: str, parameter: nn.Parameter, value: Tensor) -> None:
        self._check_shape(name, tuple(value.shape), tuple(parameter.shape))
        # Copy, since the value is a view of the file.
        parameter.data = value.to(torch.promote_types(value.dtype, parameter.dtype), copy=True)


def open_weights(model: PreTrainedModel, stored: Mapping[str, Any] | None, settings: TrainConfig) -> PretrainedWeights:
    """Open the checkpoint that a run starts from, which may have fewer or more layers than the model.

    Args:
        model: the model, without weights.
        stored: the checkpoint's configuration; None: there is no checkpoint.
        settings: the run's.
    """
    if stored is None:
        return PretrainedWeights.open(None, model)
    source, layers, stored_layers, buffers = settings.model.from_pretrained, settings.model.layers, count_layers(stored), settings.buffers
    if stored_layers in (None, layers):
        return PretrainedWeights.open(source, model)
    sources = layer_sources(layers, stored_layers, buffers.open, buffers.close)
    whole = {name: stored[name] for name in LISTED if name in stored}
    there = build_on_meta(type(model), type(model.config).from_dict({**with_layers(model.config.to_dict(), stored_layers), **whole}))
    weights, paths = PretrainedWeights.open(source, there), layer_paths(there)[0]
    weights.moved = {path: paths[n] for path, n in zip(layer_paths(model)[0], sources, strict=True)}
    return weights


def find(source: str) -> Path:
    """Return the folder of a checkpoint: `source` itself, or its copy in the hub's cache (downloaded if the network allows)."""
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


def names_of_tied(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return, for each name of a parameter with several names, all of them; the first is the one that transformers saves it under."""
    groups: dict[str, list[str]] = {}
    for other, name in model.all_tied_weights_keys.items():
        groups.setdefault(name, [name]).append(other)
    return {name: group for group in groups.values() for name in group}


def _by_model_names(places: Mapping[str, Place], model: PreTrainedModel) -> tuple[dict[str, Place], dict[str, Converted]]:
    """Return the stored tensors by the names that the current model has for them, as transformers' own loading finds them."""
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    plain, converted = {}, dict[str, Converted]()
    for key, place in places.items():
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = key, None
        if pattern is None:
            plain[name] = place
            continue
        converter = of_pattern[pattern]
        first, *others = converter.target_patterns
        group = converted.setdefault(name, Converted(converter, name, []))
        group.parts.append((place, pattern))
        converted |= {name.replace(first, other): group for other in others}
    return plain, converted


def _places(folder: Path) -> dict[str, Place]:
    """Return where each tensor of a checkpoint folder is stored, by the tensor's name."""
    try:
        if (folder / INDEX).is_file():
            table = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: Place(folder / file, name) for name, file in table.items()}
        if (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, framework="pt") as file:
                return {name: Place(folder / SINGLE, name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"model.from_pretrained {folder}: its safetensors cannot be read ({error}); fetch or export it again"
        ) from None
    raise CheckpointError(
        f"model.from_pretrained {folder} has no {SINGLE}: pickled weights are not read; save the model with save_pretrained "
        "(safe serialization) first"
    )


def _read(path: Path, keys: list[str]) -> list[Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(key) for key in keys]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch the checkpoint again") from None
