"""Cut transformers' own models into pieces with weights; what calls the pieces is in `transformer.py`.

The whole model exists only on the meta device, as a plan without weights. A piece is copied out of it, allocated, and initialised by the
model's own rules or from a checkpoint; nothing else is ever allocated.
"""

import copy
import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation

from rayllp.config import TrainConfig
from rayllp.data.base import IGNORE, DatasetFacts
from rayllp.errors import SettingsError
from rayllp.hf_config import LISTED, count_layers, layer_sources, with_layers
from rayllp.models.base import Architecture
from rayllp.models.layer_lists import layer_paths
from rayllp.models.lora import add_adapters, check_targets
from rayllp.models.outline import initialiser, outline, without_values
from rayllp.models.weights import PretrainedWeights


class Piece(nn.Module):
    """Some modules of a model under their full names; `piece[path]` is one of them."""

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
    """A model of transformers, divided into pieces; what calls them is in `transformer.py`.

    Args:
        config: transformers' configuration of the model.
        settings: the settings of the run.
        facts: what the data set says of itself.
        pretrained: the configuration of the checkpoint whose weights the model starts from (model.from_pretrained); None if from none.

    Attributes:
        model_class: transformers' class of the whole model.
        embed_paths, head_paths, common_paths: full names of the modules of the embedding, of the head, and of those that several layers
            use.
        aliases: groups of full names that denote the same parameter.
        outputs: names, within a layer, of the projections that write into the residual stream (scaled by model.initialisation=scaled).
        inner: names, within a layer, of the MLP and value projections that model.initialisation=deep scales as well.
    """

    model_class: type[PreTrainedModel]
    embed_paths: tuple[str, ...]
    head_paths: tuple[str, ...]
    common_paths: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()

    def __init__(
        self, config: PreTrainedConfig, settings: TrainConfig, facts: DatasetFacts, pretrained: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.layers, self.settings, self.facts = config, settings.model.layers, settings, facts
        config._attn_implementation = "sdpa" if self.model_class._supports_sdpa else "eager"
        if settings.dtype == "float64":
            config._experts_implementation = "eager"  # the grouped implementation does not support float64
        self.model = _outline(self.model_class, config)
        self.aliases = _find_aliases(self.model)
        self.stochastic = settings.model.dropout > 0
        self.weights = self._open_weights(pretrained)
        self.paths = self.find_pieces()
        self.tied = tuple(self._ties_between(self.embed_paths, self.head_paths))
        self._check_trained()

    def _open_weights(self, stored: Mapping[str, Any] | None) -> PretrainedWeights:
        """Open a checkpoint, which may have fewer or more layers than this model; its layers are then assigned to the model's.

        Args:
            stored: the checkpoint's configuration; None: there is no checkpoint.
        """
        if stored is None:
            return PretrainedWeights.open(None, self.model)
        source, stored_layers, buffers = self.settings.model.from_pretrained, count_layers(stored), self.settings.buffers
        if stored_layers in (None, self.layers):
            return PretrainedWeights.open(source, self.model)
        sources = layer_sources(self.layers, stored_layers, buffers.open, buffers.close)
        whole = {name: stored[name] for name in LISTED if name in stored}
        model = outline(self.model_class, type(self.config).from_dict({**with_layers(self.config.to_dict(), stored_layers), **whole}))
        weights, paths = PretrainedWeights.open(source, model), layer_paths(model)[0]
        weights.moved = {path: paths[n] for path, n in zip(layer_paths(self.model)[0], sources, strict=True)}
        return weights

    def _check_trained(self) -> None:
        """Refuse patterns of model.train and targets of model.lora that match nothing."""
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
        """Return the full names of the layers, and set those of the other pieces."""

    def transformers_config(self) -> dict[str, Any]:
        """Return the whole configuration, defaults included, and the class that reads it."""
        return {**json.loads(self.config.to_json_string(use_diff=False)), "architectures": [self.model_class.__name__]}

    # Pieces -------------------------------------------------------------------------------------------------------------------

    def embed(self) -> nn.Module:
        """Build the embedding from copies of its modules."""
        return self.make(self.embed_paths)

    def layer(self, index: int) -> nn.Module:
        """Build a layer from a copy of its module, with adapters if LoRA is set.

        Unless a checkpoint has the layer, its weights are rescaled by `model.initialisation`.
        """
        path, lora = self.paths[index], self.settings.model.lora
        piece = self.make((path,))
        if not self.weights.has(path):
            self.rescale(piece[path])
        if lora is not None:
            add_adapters(piece[path], path, lora)
        return piece[path]

    def head(self) -> nn.Module:
        """Build the head from copies of its modules."""
        return self.make(self.head_paths)

    def common(self) -> nn.Module | None:
        """Build the modules that several layers use from copies; None if there are none."""
        return self.make(self.common_paths) if self.common_paths else None

    def make(self, paths: Sequence[str], *, pretrained: bool = True) -> Piece:
        """Allocate and initialise a piece by the model's rules, and load pretrained weights where there are any."""
        piece = Piece({path: self.copy_of(path) for path in paths})
        _use_one_operation_gelu(piece)
        without_values(piece)
        names = {id(module): name for name, module in piece.named_modules()}
        with torch.no_grad():
            piece.apply(lambda module: initialiser(self.model, names[id(module)])(module))
        for group in self._aliases_within(piece):
            _tie(piece, group)
        if pretrained:
            self.weights.fill(piece)
        return piece

    def copy_of(self, path: str) -> nn.Module:
        """Return a copy of one of the model's modules, still on the meta device."""
        return copy.deepcopy(self.model.get_submodule(path))

    def rescale(self, layer: nn.Module) -> None:
        """Apply model.initialisation to a layer that transformers' own rules have initialised."""
        kind = self.settings.model.initialisation
        if kind == "default":
            return
        factor = math.sqrt(math.log(2 * self.layers)) if kind == "deep" else 1 / math.sqrt(2 * self.layers)
        for name in (*self.outputs, *(self.inner if kind == "deep" else ())):
            self.weight_of(layer, name).data.mul_(factor)

    def weight_of(self, layer: nn.Module, name: str) -> Tensor:
        """Return the weight of the layer's module `name`."""
        return layer.get_submodule(name).get_parameter("weight")

    def _ties_between(self, first: Iterable[str], last: Iterable[str]) -> Iterable[tuple[str, str]]:
        """Yield, for each parameter that is in two pieces, its name in the first and in the last."""
        for group in self.aliases:
            ends = [[name for name in group if is_within(name, paths)] for paths in (first, last)]
            if ends[0] and ends[1]:
                yield ends[0][0], ends[1][0]

    def _aliases_within(self, piece: Piece) -> list[list[str]]:
        """Return the groups of names in a piece that denote the same parameter."""
        names = {name for name, _ in piece.named_parameters(remove_duplicate=False)}
        return [shared for group in self.aliases if len(shared := [name for name in group if name in names]) > 1]

    # Loss ---------------------------------------------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, summed over all targets but IGNORE."""
        return self._cross_entropy(outputs, targets, 0.0)

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy with label smoothing, summed over all targets but IGNORE."""
        return self._cross_entropy(outputs, targets, self.settings.model.label_smoothing)

    def _cross_entropy(self, outputs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        logits = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
        return nn.functional.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
        )

    def count(self, targets: Tensor) -> int:
        """Return the number of targets that are not IGNORE."""
        return int((targets != IGNORE).sum())

    def prefix(self, piece: int | str) -> str:
        """Return a layer's path in the whole model; an empty prefix for other pieces, whose parameters carry full names already."""
        return f"{self.paths[piece]}." if isinstance(piece, int) else ""


def _outline(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return outline(kind, config)
    except Exception as error:  # sizes that contradict each other fail wherever a model first uses them
        raise SettingsError(
            f"transformers cannot make a {kind.__name__} of these sizes ({type(error).__name__}: {error}): set model.config_overrides, or "
            "start from a checkpoint (model.from_pretrained)"
        ) from error


def _find_aliases(model: nn.Module) -> list[list[str]]:
    """Return groups of names that denote the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _tie(piece: Piece, names: list[str]) -> None:
    """Make all these names of a piece denote the first one's parameter."""
    kept = piece.get_parameter(names[0])
    for name in names[1:]:
        parent, _, leaf = name.rpartition(".")
        setattr(piece.get_submodule(parent), leaf, kept)


def _use_one_operation_gelu(piece: nn.Module) -> None:
    """Replace transformers' tanh GELU (GPT-2's), which takes eight operations, by torch's single one: a layer takes a fifth less time."""
    for parent in piece.modules():
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))


def is_within(name: str, paths: Iterable[str]) -> bool:
    """True if a full name denotes one of these modules or something inside one."""
    return any(name == path or name.startswith(path + ".") for path in paths)
