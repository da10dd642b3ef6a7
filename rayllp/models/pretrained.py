"""Architectures cut out of transformers' own models: an adapter names the pieces and says how to call them.

The model itself exists on the meta device only, as a plan without weights. A piece is copied out of it, given memory, and initialised by
the model's own rules, or by a checkpoint; nothing else is ever built.
"""

import copy
import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation

from rayllp.config import TrainConfig
from rayllp.data.base import IGNORE, Facts
from rayllp.errors import SettingsError
from rayllp.hf_config import LISTED, count_layers, layer_sources, read_config, transformers_config, with_layers
from rayllp.models.base import Architecture
from rayllp.models.layer_lists import layer_paths
from rayllp.models.lora import add_adapters, check_targets
from rayllp.models.outline import initialiser, outline, without_values
from rayllp.models.weights import PretrainedWeights


class Piece(nn.Module):
    """Modules of a model under their full names; `piece[path]` is one of them."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for path, module in modules.items():
            *parents, leaf = path.split(".")
            place: nn.Module = self
            for name in parents:
                if name not in dict(place.named_children()):
                    place.add_module(name, nn.Module())
                place = place.get_submodule(name)
            place.add_module(leaf, module)

    def __getitem__(self, path: str) -> nn.Module:
        return self.get_submodule(path)


class PretrainedArchitecture(Architecture):
    """The pieces of a model; what calls them is in `transformer.py`.

    Attributes:
        model_class: the whole model, as transformers has it.
        embed_paths, head_paths, common_paths: modules of the embedding, of the head, and those that several layers use.
        outputs: within a layer, the projections that write into the residual stream (model.initialisation = scaled).
        inner: within a layer, further MLP weights, and value projections, that the deep initialisation scales too.
    """

    model_class: type[PreTrainedModel]
    embed_paths: tuple[str, ...]
    head_paths: tuple[str, ...]
    common_paths: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()

    def __init__(self, config: PreTrainedConfig, layers: int, settings: TrainConfig, facts: Facts, pretrained: str | None = None) -> None:
        self.config, self.layers, self.settings, self.facts = config, layers, settings, facts
        self.model = _outline(self.model_class, config)
        self.same = _parameters_that_are_one(self.model)
        self.stochastic = settings.model.dropout > 0
        self.weights = self._open_weights(pretrained)
        self.paths = self.find_pieces()
        self.tied = tuple(self._ties_between(self.embed_paths, self.head_paths))
        self._check_trained()

    def _open_weights(self, source: str | None) -> PretrainedWeights:
        """A checkpoint, whose layers may be fewer or more than this model's."""
        stored = {} if source is None else transformers_config(read_config(source))
        there, buffers = count_layers(stored), self.settings.buffers
        if there in (None, self.layers):
            return PretrainedWeights.open(source, self.model)
        sources = layer_sources(self.layers, there, buffers.open, buffers.close)
        whole = {name: stored[name] for name in LISTED if name in stored}
        model = outline(self.model_class, type(self.config).from_dict({**with_layers(self.config.to_dict(), there), **whole}))
        weights, paths = PretrainedWeights.open(source, model), layer_paths(model)[0]
        weights.moved = {here: paths[n] for here, n in zip(layer_paths(self.model)[0], sources, strict=True)}
        return weights

    def _check_trained(self) -> None:
        """Refuse patterns and targets that match nothing."""
        model = self.settings.model
        if model.lora is not None:
            check_targets([self.model.get_submodule(path) for path in self.paths], model.lora)
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        for pattern in model.train or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                some = [
                    next(name for name in names if is_within(name, (path,)))
                    for path in (*self.embed_paths, self.paths[0], *self.head_paths)
                ]
                raise SettingsError(
                    f"model.train has {pattern!r}, which matches no parameter: there are {', '.join(dict.fromkeys(some))}, …"
                )

    @abstractmethod
    def find_pieces(self) -> list[str]:
        """Full names of the layers; sets those of the other pieces."""

    def transformers_config(self) -> dict[str, Any]:
        """The whole configuration, defaults included, and the class that reads it."""
        return {**json.loads(self.config.to_json_string(use_diff=False)), "architectures": [self.model_class.__name__]}

    # Pieces -------------------------------------------------------------------------------------------------------------------

    def path_of(self, index: int) -> str:
        """Full name of a layer's module."""
        return self.paths[index]

    def embed(self) -> nn.Module:
        """A copy of its modules, with memory of their own."""
        return self.make(self.embed_paths)

    def layer(self, index: int) -> nn.Module:
        """Likewise; rescaled by `model.initialisation` where no checkpoint has it."""
        piece = self.make((self.path_of(index),))
        path, lora = self.path_of(index), self.settings.model.lora
        if not self.weights.has(path):
            self.rescale(piece[path])
        if lora is not None:
            add_adapters(piece[path], path, lora)
        return piece[path]

    def head(self) -> nn.Module:
        """Likewise."""
        return self.make(self.head_paths)

    def common(self) -> nn.Module | None:
        """Likewise, where the family has some."""
        return self.make(self.common_paths) if self.common_paths else None

    def make(self, paths: Sequence[str], *, pretrained: bool = True) -> Piece:
        """A piece with memory, initialised by the model's rules, and overwritten by pretrained weights where there are any."""
        piece = Piece({path: self.copy_of(path) for path in paths})
        _use_one_operation_gelu(piece)
        without_values(piece)
        names = {id(module): name for name, module in piece.named_modules()}
        with torch.no_grad():
            piece.apply(lambda module: initialiser(self.model, names[id(module)])(module))
        for group in self._groups_within(piece):
            _make_one(piece, group)
        if pretrained:
            self.weights.fill(piece)
        return piece

    def copy_of(self, path: str) -> nn.Module:
        """A module of the model, on the meta device still."""
        return copy.deepcopy(self.model.get_submodule(path))

    def rescale(self, layer: nn.Module) -> None:
        """model.initialisation, on top of transformers' own."""
        kind = self.settings.model.initialisation
        if kind == "default":
            return
        factor = math.sqrt(math.log(2 * self.layers)) if kind == "deep" else 1 / math.sqrt(2 * self.layers)
        for name in (*self.outputs, *(self.inner if kind == "deep" else ())):
            self.weight_of(layer, name).data.mul_(factor)

    def weight_of(self, layer: nn.Module, name: str) -> Tensor:
        """The weight of the layer's module `name`."""
        return layer.get_submodule(name).get_parameter("weight")

    def _ties_between(self, first: Iterable[str], last: Iterable[str]) -> Iterable[tuple[str, str]]:
        for group in self.same:
            ends = [[name for name in group if is_within(name, paths)] for paths in (first, last)]
            if ends[0] and ends[1]:
                yield ends[0][0], ends[1][0]

    def _groups_within(self, piece: Piece) -> list[list[str]]:
        names = {name for name, _ in piece.named_parameters(remove_duplicate=False)}
        return [found for group in self.same if len(found := [name for name in group if name in names]) > 1]

    # Loss ---------------------------------------------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, summed over targets that count."""
        return self._cross_entropy(outputs, targets, 0.0)

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The same with label smoothing."""
        return self._cross_entropy(outputs, targets, self.settings.model.label_smoothing)

    def _cross_entropy(self, outputs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        logits = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
        return nn.functional.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
        )

    def count(self, targets: Tensor) -> int:
        """Targets that are not IGNORE."""
        return int((targets != IGNORE).sum())

    # Names: pieces carry full names already -----------------------------------------------------------------------------------

    def embed_prefix(self) -> str:
        """None: paths are the whole model's."""
        return ""

    def layer_prefix(self, index: int) -> str:
        """The layer's path in the whole model."""
        return self.path_of(index) + "."

    def head_prefix(self) -> str:
        """None."""
        return ""

    def common_prefix(self) -> str:
        """None."""
        return ""


def _outline(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return outline(kind, config)
    except Exception as error:  # sizes that do not go together fail wherever a model first needs them
        raise SettingsError(
            f"transformers cannot make a {kind.__name__} of these sizes ({type(error).__name__}: {error}): set model.config_overrides, or "
            "start from a checkpoint (model.from_pretrained)"
        ) from error


def _parameters_that_are_one(model: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _make_one(piece: Piece, names: list[str]) -> None:
    kept = piece.get_parameter(names[0])
    for name in names[1:]:
        parent, _, leaf = name.rpartition(".")
        setattr(piece.get_submodule(parent), leaf, kept)


def _use_one_operation_gelu(piece: nn.Module) -> None:
    """The tanh form of GELU, GPT-2's, is eight operations in transformers; torch has it as one, and a layer takes a fifth less time."""
    for parent in piece.modules():
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))


def is_within(name: str, paths: Iterable[str]) -> bool:
    """Whether a full name is one of these modules', or inside one."""
    return any(name == path or name.startswith(path + ".") for path in paths)
