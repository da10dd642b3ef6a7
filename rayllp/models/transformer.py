"""Any residual transformer of the transformers library: its own forward runs around the layers, and its layers run on the workers.

Nothing about the model is known beforehand. One run on a few samples (`examination.py`, by way of `replay.py`) shows which parameters the
first state and the outputs depend on, how each layer is called, and whether the model can be cut into layers at all. What a worker owns of
it is built by `pieces.py`.
"""

import inspect
import json
import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rayllp.channel.base import StateSpec
from rayllp.config import TrainConfig
from rayllp.data.base import IGNORE, DatasetFacts, Inputs
from rayllp.errors import SettingsError
from rayllp.hf_config import read_config, transformers_config
from rayllp.models import model_types
from rayllp.models.base import Architecture
from rayllp.models.examination import examine
from rayllp.models.families import Family
from rayllp.models.generation_cache import GenerationCache
from rayllp.models.layer_lists import layer_paths
from rayllp.models.lora import add_adapters
from rayllp.models.meta_device import build_on_meta
from rayllp.models.metrics import Metric, metric_of
from rayllp.models.pieces import Piece, build_piece, check_trained, cover, find_aliases, find_ties, is_within, refuse_shared
from rayllp.models.randomness import seeded
from rayllp.models.replay import Call, EncoderOutput, ExtraOutput, Replay, UnsupportedModelError, state_of
from rayllp.models.shared_bias import TABLE, SharedBias
from rayllp.models.weights import open_weights
from rayllp.state import State, like, tensors

CACHE = ("cache", "past_key_values")
SAMPLES, TOKENS = 2, 8
"""Samples, and tokens in each, that a model is examined with."""


@dataclass(frozen=True)
class Context:
    """What layers need besides the state: how the model calls each of them for the batch's inputs, and the cache of generation."""

    inputs: Inputs
    calls: list[Call]
    past: GenerationCache | None = None


class Transformer(Architecture):
    """A model of transformers, cut into pieces.

    Args:
        config: transformers' configuration of the model.
        settings: the settings of the run.
        facts: what the data set says about itself.
        pretrained: the configuration of the checkpoint whose weights the model starts from (model.from_pretrained); None if from none.
        family: what is known of the model type; None: the class's own.

    Attributes:
        model_class: transformers' class of the whole model.
        paths: full names of the layers in order.
        embed_paths, head_paths, common_paths: full names of the modules of the embedding, of the head, and of those that several layers
            use.
        bare: those modules of embedding and head that are taken without their submodules, which belong to other pieces.
        aliases: groups of full names that denote the same parameter.

    Raises:
        UnsupportedModelError: the model cannot be cut into layers; the message says why.
    """

    family = Family()

    def __init__(
        self,
        config: PreTrainedConfig,
        settings: TrainConfig,
        facts: DatasetFacts,
        pretrained: Mapping[str, Any] | None = None,
        family: Family | None = None,
    ) -> None:
        self.config, self.layers, self.settings, self.facts = config, settings.model.layers, settings, facts
        self.family = family or self.family
        self.model_class = model_types.model_class(config.model_type, settings.model.task)
        config._attn_implementation = "sdpa" if self.model_class._supports_sdpa else "eager"
        if settings.dtype == "float64":
            config._experts_implementation = "eager"  # the grouped implementation does not support float64
        self.model = build_on_meta(self.model_class, config)
        self.aliases = find_aliases(self.model)
        self.stochastic = True if settings.model.dropout > 0 else None  # None: find out, as types may draw more than dropout
        self.weights = open_weights(self.model, pretrained, settings)
        self.bare = frozenset[str]()
        self.paths = self._find_pieces()
        self.tied = tuple(find_ties(self.aliases, self.embed_paths, self.head_paths))
        check_trained(self.model, [*self.embed_paths, self.paths[0], *self.head_paths], self.paths, settings.model)

    @classmethod
    def from_settings(
        cls, settings: TrainConfig, facts: DatasetFacts, stored_config: Mapping[str, Any] | None = None, family: Family | None = None
    ) -> Self:
        """Return the network for these settings and data.

        Args:
            settings: the settings of the run.
            facts: what the data set says about itself.
            stored_config: transformers' configuration of a run that is resumed.
            family: what is known of the model type; None: the class's own.
        """
        source = settings.model.from_pretrained if stored_config is None else None  # a resumed run has weights of its own
        pretrained = None if source is None else transformers_config(read_config(source))
        config = model_types.configuration(settings, facts, stored_config, pretrained, family or cls.family)
        return cls(config, settings, facts, pretrained, family)

    @cached_property
    def metric(self) -> Metric:  # type: ignore[override]
        """What an evaluation of the task reports besides the loss; a family may set another metric."""
        return metric_of(self.settings.model.task, len(self.facts.classes))

    def transformers_config(self) -> dict[str, Any]:
        """Return the whole configuration, defaults included, and the class that reads it."""
        return {**json.loads(self.config.to_json_string(use_diff=False)), "architectures": [self.model_class.__name__]}

    # Cutting the model --------------------------------------------------------------------------------------------------------

    def _find_pieces(self) -> list[str]:
        """Examine the model: return the layers' full names, and set those of the pieces around them."""
        name = f"{self.config.model_type} ({type(self.model).__name__})"
        try:
            return self._examine()
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"model {name} cannot be cut into layers: {error}; choose another model.architecture") from None
        except SettingsError:
            raise
        except Exception as error:  # a model that needs other inputs may raise anything
            raise UnsupportedModelError(
                f"model {name} could not be run on {self.settings.model.task} inputs ({type(error).__name__}: {error}): choose another "
                "model.architecture or model.head"
            ) from error

    def _examine(self) -> list[str]:
        paths, self.encoder_layers = layer_paths(self.model)
        if len(paths) != self.layers:
            raise UnsupportedModelError(f"its list has {len(paths)} layers, and model.layers is {self.layers}")
        self.replay = Replay(self.model, paths, self.encoder_layers, self.arguments)
        with seeded("examine"):
            self.analysis = analysis = examine(self.replay, self._some_inputs(), lambda n: self._trial_layer(paths[n]), torch.float32)
        self.biases = self._shared_biases(paths)
        if not analysis.residual:
            self._refuse_steps()
        both = analysis.embed & analysis.head
        if both:
            raise UnsupportedModelError(f"its embedding and its head both read {', '.join(sorted(both))}")
        refuse_shared(self.aliases, paths)
        self.common_paths = (
            *(self.replay.encoder_output_modules if analysis.encoder_output else ()),
            *(bias.table for _, bias in self.biases),
        )
        # Parameters that nothing depends on, or that are not trained, go with a piece too, so that exports have them.
        elsewhere = (*paths, *self.common_paths)
        rest = {name for name, _ in self.model.named_parameters() if not is_within(name, elsewhere)}
        rest = {name for name in rest if not self._names_of(name) & (analysis.embed | analysis.head)}
        owners = {name.rpartition(".")[0] for name in analysis.embed}
        beside = {name for name in rest if name.rpartition(".")[0] in owners}
        self.embed_paths, bare_embed = cover(self.model, analysis.embed | beside, elsewhere)
        self.head_paths, bare_head = cover(self.model, analysis.head | (rest - beside), elsewhere)
        self.bare = bare_embed | bare_head
        if split := set(self.embed_paths) & set(self.head_paths):
            raise UnsupportedModelError(f"its embedding and its head both read parameters of {', '.join(sorted(split))}")
        return paths

    def _names_of(self, name: str) -> set[str]:
        """Return all names of a parameter."""
        return next((set(group) for group in self.aliases if name in group), {name})

    def _shared_biases(self, paths: list[str]) -> list[tuple[range, SharedBias]]:
        """Return the bias that the layers of each list share, with the range of these layers' numbers."""
        calls, biases = self.analysis.extra_arguments, []
        for part in (range(self.encoder_layers), range(self.encoder_layers, len(paths))):
            if not any(isinstance(value, ExtraOutput) for n in part for _, value in calls[n].values()):
                continue
            bias = SharedBias.find(self.model, [paths[n] for n in part], [calls[n] for n in part])
            if bias is None:
                raise UnsupportedModelError("a layer reads what an earlier one makes besides the state")
            biases.append((part, bias))
        return biases

    def _trial_layer(self, path: str) -> nn.Module:
        return self._build((path,))[path].eval()  # it may be another worker's, whose weights are not read

    def _refuse_steps(self) -> None:
        """Refuse approximate solves and step sizes other than 1 for layers that are not residual."""
        settings, what = self.settings, "its layers are no residual steps: what they make does not grow with the state (post-norm)"
        if settings.mode != "serial":
            raise SettingsError(
                f"model.architecture {self.config.model_type}: {what}, so that MGRIT and windows do not apply to it. Train it exactly "
                "(mode: serial, step.middle: 1, buffers 0), or choose a pre-norm relative, such as roberta-prelayernorm for bert"
            )
        if any(size != 1 for size in settings.step_sizes):
            raise SettingsError(
                f"model.architecture {self.config.model_type}: {what}, so that Δt must be 1: set step.middle=1 and step.buffer=1"
            )

    # Pieces -------------------------------------------------------------------------------------------------------------------

    def embed(self) -> nn.Module:
        """Build the embedding; parameters that the first state does not depend on are frozen."""
        return self._frozen_but(self._build_filled(self.embed_paths), self.analysis.embed)

    def layer(self, index: int) -> nn.Module:
        """Build a layer, with adapters if LoRA is set; its weights are rescaled by `model.initialisation` unless a checkpoint has it.

        A table that all layers of a list read is left out, since every worker has it (`common`).
        """
        path, lora = self.paths[index], self.settings.model.lora
        layer = self._build_filled((path,))[path]
        if not self.weights.has(path):
            self._rescale(layer)
        if lora is not None:
            add_adapters(layer, path, lora)
        for _, bias in self.biases:
            if bias.table.startswith(f"{path}."):
                del layer.get_submodule(bias.attention.removeprefix(f"{path}."))._modules[TABLE]
        return layer

    def head(self) -> nn.Module:
        """Build the head; parameters that the outputs do not depend on are frozen."""
        return self._frozen_but(self._build_filled(self.head_paths), self.analysis.head)

    def common(self) -> nn.Module | None:
        """Build the modules that several layers use; None if there are none."""
        return self._build_filled(self.common_paths) if self.common_paths else None

    def _build(self, paths: Collection[str]) -> Piece:
        return build_piece(self.model, tuple(paths), self.bare, self.aliases)

    def _build_filled(self, paths: Collection[str]) -> Piece:
        """Build a piece with pretrained weights where there are any."""
        piece = self._build(paths)
        self.weights.fill(piece)
        return piece

    def _frozen_but(self, piece: nn.Module, used: frozenset[str]) -> nn.Module:
        """Freeze a piece's parameters except those in `used`."""
        for name, parameter in piece.named_parameters():
            parameter.requires_grad_(bool(self._names_of(name) & used))
        return piece

    def _rescale(self, layer: nn.Module) -> None:
        """Apply model.initialisation to a layer that transformers' own rules have initialised."""
        kind, family = self.settings.model.initialisation, self.family
        if kind == "default" or (kind == "scaled" and family.scaled):
            return
        factor = math.sqrt(math.log(2 * self.layers)) if kind == "deep" else 1 / math.sqrt(2 * self.layers)
        for name in (*family.residual_outputs, *(family.inner if kind == "deep" else ())):
            self.scaled_weight(layer, name).data.mul_(factor)

    def scaled_weight(self, layer: nn.Module, name: str) -> Tensor:
        """Return what model.initialisation scales in a layer's module `name`: its weight, or the weight's columns that make values."""
        weight = layer.get_submodule(name).get_parameter("weight")
        return weight[:, -self.settings.model.width :] if name in self.family.joint else weight

    def prefix(self, piece: int | str) -> str:
        """Return a layer's path in the whole model; an empty prefix for other pieces, whose parameters carry full names already."""
        return f"{self.paths[piece]}." if isinstance(piece, int) else ""

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

    # Calls ----------------------------------------------------------------------------------------------------------------------

    def arguments(self, inputs: Inputs, past: GenerationCache | None = None) -> dict[str, Any]:
        """Return the model's keyword arguments for a batch; with a cache of generation, only the tokens that it does not hold."""
        parts, pad = tensors(inputs), self.facts.pad
        if self.settings.model.task == "images":
            return {"pixel_values": parts[0].to(self.replay.dtype)}
        kwargs: dict[str, Any] = {"input_ids": parts[0]}
        if "use_cache" in self._takes:  # a cache would carry a layer's keys from one sweep into the next
            kwargs["use_cache"] = False
        if pad is not None:
            kwargs["attention_mask"] = (parts[0] != pad).long()
        tokens = "decoder_input_ids" if self.encoder_layers else "input_ids"
        kwargs[tokens] = parts[-1] if self.encoder_layers else parts[0]
        if past is not None:
            assert self._cache_argument is not None
            kwargs |= {tokens: kwargs[tokens][:, past.known :], "use_cache": True, self._cache_argument: past.cache}
        if not self.encoder_layers and len(parts) > 1:
            # Texts are packed into a row: transformers masks them from each other where positions start over and no mask is given.
            return {**kwargs, "position_ids": parts[1]}
        return kwargs

    @cached_property
    def _takes(self) -> Collection[str]:
        return inspect.signature(self.model.forward).parameters

    @property
    def _cache_argument(self) -> str | None:
        """Name of the cache among the arguments of the model's forward; None if it takes none."""
        return next((name for name in CACHE if name in self._takes), None) if "use_cache" in self._takes else None

    def _some_inputs(self) -> Inputs:
        """Return a few samples of the shape that the model's inputs have."""
        if self.settings.model.task == "images":
            assert self.facts.image is not None
            return torch.zeros(SAMPLES, *self.facts.image)
        length = min(TOKENS, self.settings.sequence_length)
        ids = torch.arange(SAMPLES * length).view(SAMPLES, length) % self.facts.vocabulary
        if self.facts.pad is not None:
            ids[ids == self.facts.pad] = (self.facts.pad + 1) % self.facts.vocabulary
        if self.settings.data.documents == "packed":
            if "position_ids" not in self._takes:
                raise UnsupportedModelError("it takes no positions, and data.documents=packed begins them anew with every text")
            return ids, torch.arange(length).expand_as(ids)
        return (ids, ids) if self.encoder_layers else ids

    def kind(self, index: int) -> Hashable:
        """Return the layer's kind: equal for layers that the model calls alike and whose modules are alike."""
        number = self.analysis.kinds[index]
        if not self.encoder_layers:
            return number
        half, first = ("encoder", 0) if index < self.encoder_layers else ("decoder", self.encoder_layers)
        return half if number == self.analysis.kinds[first] else f"{half} of another kind, {number},"

    def past(self) -> GenerationCache | None:
        """Return an empty cache of keys and values; None if the model takes no cache."""
        return None if self._cache_argument is None else GenerationCache(has_encoder=bool(self.encoder_layers))

    def state_spec(self, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> StateSpec:
        """Return the shapes that the model's own forward makes from these inputs."""
        with torch.no_grad():
            states = self.replay.first_state(inputs, {}, dtype, training=False)
        return StateSpec(tuple(state.shape for state in states), (dtype,) * len(states), device, bare=len(states) == 1)

    def context(self, inputs: Inputs, dtype: torch.dtype, past: GenerationCache | None = None) -> Context:
        """Find out how each layer is called for these inputs."""
        return Context(inputs, self.replay.calls(inputs, dtype, past), past)

    def enter(self, embed: Piece, inputs: Inputs, context: Context) -> State:  # type: ignore[override]
        """Return the state that the model makes from its inputs before the first layer."""
        parameters = dict(embed.named_parameters(remove_duplicate=False))
        dtype = next(iter(parameters.values())).dtype
        states = self.replay.first_state(inputs, parameters, dtype, training=embed.training, past=context.past)
        return states if self.encoder_layers else states[0]

    def advance(self, index: int, layer: nn.Module, state: State, context: Context, common: nn.Module | None) -> State:
        """Evaluate a layer, called as the model calls it. With an encoder, the state holds the halves (encoder, decoder)."""
        call, part = context.calls[index], tensors(state)[0 if index < self.encoder_layers else -1]
        known = 0 if context.past is None else context.past.known
        if known and index < self.encoder_layers:
            return state  # while generating, the decoder's layers have the encoder's result in their cache
        for layers, bias in self.biases:
            if index in layers:
                assert isinstance(common, Piece)
                call = bias.put(call, bias.of(self.replay.model, common[bias.table], part, known))
        if not self.encoder_layers:
            return state_of(call.on(layer, part))
        encoded, decoded = tensors(state)
        if index < self.encoder_layers:
            return state_of(call.on(layer, part)), decoded
        encoder_output = encoded
        for path in self.replay.encoder_output_modules:
            encoder_output = (common[path] if isinstance(common, Piece) else self.replay.model.get_submodule(path))(encoder_output)
        call = call.replaced(lambda place, value: encoder_output if isinstance(value, EncoderOutput) else value)
        return encoded, state_of(call.on(layer, part))

    def leave(self, head: Piece, state: State, context: Context) -> Tensor:  # type: ignore[override]
        """Return the model's logits for its last state."""
        parameters, last = dict(head.named_parameters(remove_duplicate=False)), tensors(state)[-1]
        inputs = self._of_last(context.inputs, last)
        return self.replay.outputs(inputs, last, parameters, next(iter(parameters.values())).dtype, training=head.training)

    def _of_last(self, inputs: Inputs, state: Tensor) -> Inputs:
        """Cut the inputs to as many last tokens as the state has, since models give their outputs the shape of their inputs."""
        if self.settings.model.task == "images" or state.shape[1] == tensors(inputs)[-1].shape[1]:
            return inputs
        last = [part[:, -state.shape[1] :] for part in tensors(inputs)]
        return like(inputs, (tensors(inputs)[0], *last[1:]) if self.encoder_layers else tuple(last))
