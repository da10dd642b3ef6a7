"""Any residual transformer of the transformers library: its own forward runs around the layers, and its layers run on the workers.

Nothing about the model is known beforehand. One run on a few samples (`examination.py`, by way of `replay.py`) shows which parameters the
first state and the outputs depend on, how each layer is called, and whether the model can be cut into layers at all.
"""

import inspect
import math
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rayllp.channel.base import StateSpec
from rayllp.config import TrainConfig
from rayllp.data.base import DatasetFacts, Inputs
from rayllp.errors import SettingsError
from rayllp.hf_config import read_config, transformers_config
from rayllp.models import model_types
from rayllp.models.examination import examine
from rayllp.models.layer_lists import layer_paths
from rayllp.models.metrics import Accuracy, Confusion, Metric, Perplexity
from rayllp.models.outline import outline
from rayllp.models.past import Past
from rayllp.models.pretrained import Piece, PretrainedArchitecture, is_within
from rayllp.models.randomness import seeded
from rayllp.models.replay import Call, EncoderOutput, ExtraOutput, Replay, UncuttableError, state_of
from rayllp.models.shared_bias import TABLE, SharedBias
from rayllp.state import State, like, tensors

CACHE = ("cache", "past_key_values")
SAMPLES, TOKENS = 2, 8
"""Samples, and tokens in each, that a model is examined with."""


@dataclass(frozen=True)
class Context:
    """What layers need beside the state: how the model calls each of them for the batch's inputs, and the cache of generation."""

    inputs: Inputs
    calls: list[Call]
    past: Past | None = None


class Transformer(PretrainedArchitecture):
    """A model of the type `model.architecture`, for the task `model.head`.

    Raises:
        UncuttableError: the model cannot be cut into layers; the message says why.
    """

    bare: frozenset[str] = frozenset()
    """Modules of which a piece has the parameters only, while their submodules belong to other pieces."""

    @cached_property
    def model_class(self) -> type[PreTrainedModel]:  # type: ignore[override]
        """transformers' class for the model type and the task; a preset sets its own."""
        return model_types.model_class(self.config.model_type, self.settings.model.task)

    @cached_property
    def metric(self) -> Metric:  # type: ignore[override]
        """What an evaluation of the task reports beside the loss; a family may set another metric."""
        match self.settings.model.task:
            case "masked":
                return Accuracy("masked_accuracy")
            case "words":
                return Accuracy("word_accuracy")
            case "sentences":
                return Confusion(len(self.facts.classes))
            case "images":
                return Accuracy()
            case _:
                return Perplexity()

    def find_pieces(self) -> list[str]:
        """Examine the model: return the layers' full names, and set those of the pieces around them."""
        name = f"{self.config.model_type} ({type(self.model).__name__})"
        try:
            return self._examine()
        except UncuttableError as error:
            raise UncuttableError(f"model {name} cannot be cut into layers: {error}; choose another model.architecture") from None
        except SettingsError:
            raise
        except Exception as error:  # a model that needs other inputs may raise anything
            raise UncuttableError(
                f"model {name} could not be run on {self.settings.model.task} inputs ({type(error).__name__}: {error}): choose another "
                "model.architecture or model.head"
            ) from error

    def _examine(self) -> list[str]:
        self.stochastic = True if self.settings.model.dropout > 0 else None  # None: find out, as types may draw more than dropout
        paths, self.encoder_layers = layer_paths(self.model)
        if len(paths) != self.layers:
            raise UncuttableError(f"its list has {len(paths)} layers, and model.layers is {self.layers}")
        self.replay = Replay(self.model, paths, self.encoder_layers, self.arguments)
        with seeded("examine"):
            self.examined = examined = examine(self.replay, self._some_inputs(), lambda n: self._trial_layer(paths[n]), torch.float32)
        self.biases = self._shared_biases(paths)
        if not examined.residual:
            self._refuse_steps()
        both = examined.embed & examined.head
        if both:
            raise UncuttableError(f"its embedding and its head both read {', '.join(sorted(both))}")
        self._refuse_shared(paths)
        self.common_paths = (
            *(self.replay.encoder_output_modules if examined.encoder_output else ()),
            *(bias.table for _, bias in self.biases),
        )
        # Parameters that nothing depends on, or that are not trained, go with a piece too, so that exports have them.
        elsewhere = (*paths, *self.common_paths)
        rest = {name for name, _ in self.model.named_parameters() if not is_within(name, elsewhere)}
        rest = {name for name in rest if not self._names_of(name) & (examined.embed | examined.head)}
        owners = {name.rpartition(".")[0] for name in examined.embed}
        beside = {name for name in rest if name.rpartition(".")[0] in owners}
        self.embed_paths = self._cover(examined.embed | beside, elsewhere)
        self.head_paths = self._cover(examined.head | (rest - beside), elsewhere)
        if split := set(self.embed_paths) & set(self.head_paths):
            raise UncuttableError(f"its embedding and its head both read parameters of {', '.join(sorted(split))}")
        return paths

    def _names_of(self, name: str) -> set[str]:
        """Return all names of a parameter."""
        return next((set(group) for group in self.aliases if name in group), {name})

    def embed(self) -> nn.Module:
        """Build the embedding; parameters that the first state does not depend on are frozen."""
        return self._frozen_but(super().embed(), self.examined.embed)

    def head(self) -> nn.Module:
        """Build the head; parameters that the outputs do not depend on are frozen."""
        return self._frozen_but(super().head(), self.examined.head)

    def _frozen_but(self, piece: nn.Module, used: frozenset[str]) -> nn.Module:
        """Freeze a piece's parameters except those in `used`."""
        for name, parameter in piece.named_parameters():
            parameter.requires_grad_(bool(self._names_of(name) & used))
        return piece

    def _shared_biases(self, paths: list[str]) -> list[tuple[range, SharedBias]]:
        """Return the bias that the layers of each list share, with the range of these layers' numbers."""
        calls, biases = self.examined.extra_arguments, []
        for part in (range(self.encoder_layers), range(self.encoder_layers, len(paths))):
            if not any(isinstance(value, ExtraOutput) for n in part for _, value in calls[n].values()):
                continue
            bias = SharedBias.find(self.model, [paths[n] for n in part], [calls[n] for n in part])
            if bias is None:
                raise UncuttableError("a layer reads what an earlier one makes beside the state")
            biases.append((part, bias))
        return biases

    def _trial_layer(self, path: str) -> nn.Module:
        return self.make((path,), pretrained=False)[path].eval()  # it may be another worker's, whose weights are not read

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

    def copy_of(self, path: str) -> nn.Module:
        """Return a copy of a module; its submodules are left out where they belong to another piece."""
        module = super().copy_of(path)
        if path in self.bare:
            module._modules.clear()
        return module

    def layer(self, index: int) -> nn.Module:
        """Build a layer; a table that all layers of a list read is left out, since every worker has it (`common`)."""
        layer, prefix = super().layer(index), self.prefix(index)
        for _, bias in self.biases:
            if bias.table.startswith(prefix):
                del layer.get_submodule(bias.attention.removeprefix(prefix))._modules[TABLE]
        return layer

    def _cover(self, names: Iterable[str], elsewhere: tuple[str, ...]) -> tuple[str, ...]:
        """Return the largest modules whose parameters are all among `names`."""
        wanted, covered = set(names), []

        def visit(path: str, module: nn.Module) -> None:
            inside = {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(remove_duplicate=False)}
            if path in elsewhere or not inside & wanted:
                return
            if inside <= wanted and path:
                covered.append(path)
                return
            own = {f"{path}.{name}".lstrip(".") for name, p in module._parameters.items() if p is not None}
            if own & wanted:
                if not path:
                    raise UncuttableError(f"the parameters {sorted(own & wanted)} are in no module but the whole model")
                covered.append(path)
                self.bare |= {path}
            for name, child in module.named_children():
                visit(f"{path}.{name}".lstrip("."), child)

        visit("", self.model)
        return tuple(covered)

    def _refuse_shared(self, paths: list[str]) -> None:
        """Refuse parameters that a layer shares with another layer or with a piece around the layers."""
        for group in self.aliases:
            inside = {path for name in group for path in paths if name.startswith(path + ".")}
            if len(inside) > 1 or (inside and any(not name.startswith(tuple(path + "." for path in paths)) for name in group)):
                raise UncuttableError(f"its layers share a parameter: {group[0]} is {group[1]}")

    # Settings -------------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_settings(cls, settings: TrainConfig, facts: DatasetFacts, stored_config: Mapping[str, Any] | None = None) -> "Transformer":
        """Return the adapter for these settings and data; `stored_config` is the configuration of a run that is resumed."""
        source = settings.model.from_pretrained if stored_config is None else None  # a resumed run has weights of its own
        pretrained = None if source is None else transformers_config(read_config(source))
        config = cls.configuration(settings, facts, stored_config, pretrained)
        cls.check_sizes(config, settings)
        return cls(config, settings, facts, pretrained)

    @classmethod
    def configuration(
        cls, settings: TrainConfig, facts: DatasetFacts, resumed: Mapping[str, Any] | None, pretrained: Mapping[str, Any] | None
    ) -> PreTrainedConfig:
        """Return transformers' configuration of the model: that of a resumed run, or of the checkpoint to start from, or a new one."""
        return model_types.configuration(settings, facts, resumed, pretrained)

    @classmethod
    def positions(cls, config: PreTrainedConfig) -> float:
        """Return the longest sequence's length."""
        return getattr(config, "max_position_embeddings", math.inf)

    @classmethod
    def check_sizes(cls, config: PreTrainedConfig, settings: TrainConfig) -> None:
        """Refuse settings that the configuration does not allow."""
        room = cls.positions(config)
        if settings.model.task != "images" and settings.sequence_length > room:
            raise SettingsError(f"sequence_length {settings.sequence_length} is more than the {room} positions of the checkpoint: lower it")

    @classmethod
    def layer_paths(cls, config: PreTrainedConfig, layers: int) -> list[str]:
        """Return the full names of all layers in order; they are the same for all tasks of a model."""
        return layer_paths(outline(model_types.any_class(config), config))[0]

    # Calls ----------------------------------------------------------------------------------------------------------------------

    def arguments(self, inputs: Inputs, past: Past | None = None) -> dict[str, Any]:
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
                raise UncuttableError("it takes no positions, and data.documents=packed begins them anew with every text")
            return ids, torch.arange(length).expand_as(ids)
        return (ids, ids) if self.encoder_layers else ids

    def kind(self, index: int) -> Hashable:
        """Return the layer's kind: equal for layers that the model calls alike and whose modules are alike."""
        number = self.examined.kinds[index]
        if not self.encoder_layers:
            return number
        half, first = ("encoder", 0) if index < self.encoder_layers else ("decoder", self.encoder_layers)
        return half if number == self.examined.kinds[first] else f"{half} of another kind, {number},"

    def past(self) -> Past | None:
        """Return an empty cache of keys and values; None if the model takes no cache."""
        return None if self._cache_argument is None else Past(has_encoder=bool(self.encoder_layers))

    def state_spec(self, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> StateSpec:
        """Return the shapes that the model's own forward makes from these inputs."""
        with torch.no_grad():
            states = self.replay.first_state(inputs, {}, dtype, training=False)
        return StateSpec(tuple(state.shape for state in states), (dtype,) * len(states), device, bare=len(states) == 1)

    def context(self, inputs: Inputs, dtype: torch.dtype, past: Past | None = None) -> Context:
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
