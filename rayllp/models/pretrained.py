"""Architectures cut out of transformers' own models: an adapter names the pieces and says how to call them.

The model itself exists on the meta device only, as a plan without weights. A piece is copied out of it, given memory, and initialised by
the model's own rules, or by a checkpoint; nothing else is ever built.
"""

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.masking_utils import create_causal_mask

from rayllp.channel.base import StateSpec
from rayllp.config import TrainConfig
from rayllp.data.base import IGNORE, Facts, Inputs
from rayllp.errors import CheckpointError, SettingsError
from rayllp.models.base import Architecture
from rayllp.models.kinds import check_model_type
from rayllp.models.lora import add_adapters, check_targets
from rayllp.models.model_types import MOST_UNUSED
from rayllp.models.outline import outline, without_values
from rayllp.models.replay import initialiser
from rayllp.models.weights import PretrainedWeights
from rayllp.sizes import read_config, transformers_config
from rayllp.state import tensors

OURS = frozenset(
    "vocab_size id2label label2id pad_token_id bos_token_id eos_token_id decoder_start_token_id forced_eos_token_id use_cache".split()
)
"""What a configuration has from this run rather than from the checkpoint that it starts from."""


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
    """Base of the adapters. A subclass sets the class attributes and overrides `config_of` and the calls that differ.

    Attributes:
        model_class: the whole model, as transformers has it.
        embed_paths, head_paths, common_paths: modules of the embedding, of the head, and those that several layers use.
        layer_path: a layer's module, with {} for its number.
        outputs: within a layer, the projections that write into the residual stream (model.initialisation = scaled).
        inner: within a layer, further MLP weights, and value projections, that the deep initialisation scales too.
    """

    model_class: type[PreTrainedModel]
    embed_paths: tuple[str, ...]
    layer_path: str
    head_paths: tuple[str, ...]
    common_paths: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()

    def __init__(self, config: PreTrainedConfig, layers: int, settings: TrainConfig, facts: Facts, pretrained: str | None = None) -> None:
        self.config, self.layers, self.settings, self.facts = config, layers, settings, facts
        self.model = _outline(self.model_class, config)
        self.same = _parameters_that_are_one(self.model)
        self.stochastic = settings.model.dropout > 0
        self.weights = PretrainedWeights.open(pretrained, self.model)
        self.paths = self.find_pieces()
        self.tied = tuple(self._ties_between(self.embed_paths, self.head_paths))
        self._check_trained()

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

    def find_pieces(self) -> list[str]:
        """Full names of the layers; a family that does not name its pieces finds them in the model."""
        return self.layer_paths(self.config, self.layers)

    def transformers_config(self) -> dict[str, Any]:
        """The whole configuration, defaults included, and the class that reads it."""
        return {**json.loads(self.config.to_json_string(use_diff=False)), "architectures": [self.model_class.__name__]}

    @classmethod
    def from_settings(cls, settings: TrainConfig, facts: Facts, kept: Mapping[str, Any] | None = None) -> "PretrainedArchitecture":
        """The adapter for these settings and this data; `kept` is the configuration of a run that goes on."""
        config, source = cls.config_of(settings, facts), settings.model.from_pretrained
        if kept is not None:
            config, source = _with_ours(type(config).from_dict(dict(kept)), config), None
        elif source is not None:
            config = cls._as_pretrained(config, source)
        cls.check_sizes(config, settings)
        config._attn_implementation = "sdpa"
        return cls(config, settings.model.layers, settings, facts, source)

    @classmethod
    def _as_pretrained(cls, config: PreTrainedConfig, source: str) -> PreTrainedConfig:
        """The checkpoint's own configuration, with what this run's data and settings say of vocabulary, labels, ids and dropout."""
        stored = transformers_config(read_config(source))
        check_model_type(str(stored.get("model_type", "")), config.model_type, source)
        return _with_ours(type(config).from_dict(stored), config)

    @classmethod
    def check_sizes(cls, config: PreTrainedConfig, settings: TrainConfig) -> None:
        """Refuse what a checkpoint's configuration does not allow."""
        room = cls.positions(config)
        has = {"layers": cls.count_layers(config), "width": config.hidden_size, "heads": config.num_attention_heads}
        for name, there in has.items():
            here = getattr(settings.model, name)
            if here != there:
                raise CheckpointError(f"the checkpoint has {name} {there}, but model.{name} is {here}: leave the setting out, or match it")
        if settings.sequence_length > room:
            raise SettingsError(f"sequence_length {settings.sequence_length} is more than the {room} positions of the checkpoint: lower it")

    @classmethod
    def count_layers(cls, config: PreTrainedConfig) -> int:
        """Layers of the model, an encoder's and a decoder's together."""
        return int(config.num_hidden_layers)

    @classmethod
    def positions(cls, config: PreTrainedConfig) -> float:
        """Longest sequence."""
        return getattr(config, "max_position_embeddings", math.inf)

    @classmethod
    def layer_paths(cls, config: PreTrainedConfig, layers: int) -> list[str]:
        """Full names of all layers' modules, in order."""
        return [cls.layer_path.format(n) for n in range(layers)]

    @classmethod
    def config_of(cls, settings: TrainConfig, facts: Facts) -> PreTrainedConfig:
        """transformers' configuration."""
        raise NotImplementedError

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

    def make(self, paths: Sequence[str]) -> Piece:
        """A piece with memory, initialised by the model's rules, and overwritten by pretrained weights where there are any."""
        piece = Piece({path: self.copy_of(path) for path in paths})
        _use_one_operation_gelu(piece)
        without_values(piece)
        names = {id(module): name for name, module in piece.named_modules()}
        with torch.no_grad():
            piece.apply(lambda module: initialiser(self.model, names[id(module)])(module))
        for group in self._groups_within(piece):
            _make_one(piece, group)
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

    # Calls --------------------------------------------------------------------------------------------------------------------

    def state_spec(self, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> StateSpec:
        """(batch, time, width)."""
        shape = torch.Size((*tensors(inputs)[0].shape[:2], self.settings.model.width))
        return StateSpec((shape,), (dtype,), device)

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


def positions_like(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """What transformers' mask functions read shape, dtype and device from: (batch, time, 0)."""
    return torch.empty((*inputs.shape, 0), dtype=dtype, device=inputs.device)


def _outline(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return outline(kind, config)
    except Exception as error:  # sizes that do not go together fail wherever a model first needs them
        raise SettingsError(
            f"transformers cannot make a {kind.__name__} of these sizes ({type(error).__name__}: {error}): set model.config_overrides, or "
            "start from a checkpoint (model.from_pretrained)"
        ) from error


def ids_and_positions(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and their positions: (1, T), or (B, T) where they begin anew with every text that is packed into a row."""
    if isinstance(inputs, Tensor):
        return inputs, torch.arange(inputs.shape[1], device=inputs.device)[None]
    ids, positions = inputs
    return ids, positions


def packed_mask(config: PreTrainedConfig, inputs: Inputs, dtype: torch.dtype) -> Tensor | None:
    """The mask that keeps the texts of a row from each other; None where each row is one text, and attention plainly causal."""
    if isinstance(inputs, Tensor):
        return None
    ids, positions = inputs
    return create_causal_mask(config, positions_like(ids, dtype), None, None, position_ids=positions)


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


def _with_ours(merged: PreTrainedConfig, config: PreTrainedConfig) -> PreTrainedConfig:
    """`merged`, with what `config` says of vocabulary, labels, ids and dropout: the run's data and settings have the last word there.

    A table that is somewhat larger than the tokenizer keeps its size: many checkpoints fill theirs up to a number that suits the hardware.
    """
    rows, tokens = getattr(merged, "vocab_size", 0), getattr(config, "vocab_size", 0)
    for name in vars(config):
        if "drop" in name or name in OURS:
            setattr(merged, name, getattr(config, name))
    if 0 < rows - tokens < max(MOST_UNUSED, rows // 20):
        merged.vocab_size = rows
    return merged
