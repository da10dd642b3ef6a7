"""Run a transformers model's own forward without its layers, to get its first state, its calls of layers, or its outputs.

Each layer is replaced by a stand-in that passes the state on. Parameters that are not given are zeros of stride 0, which take no memory, so
that a worker in the middle of the network can find out how its layers are called without having the embedding's weights.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from rayllp.errors import SettingsError
from rayllp.models.generation_cache import GenerationCache
from rayllp.models.meta_device import fill_buffers, initialiser

STATE = "hidden_states"
"""Name that transformers' layers give to the state where it is not their first argument."""


class UnsupportedModelError(SettingsError):
    """A model's forward is not of the form: inputs, then one layer after the other, then outputs."""


@dataclass(frozen=True)
class ExtraOutput:
    """Placeholder, in a call, for a value that an earlier layer returned besides the state: value number `place` of layer `layer`."""

    layer: int
    place: int


@dataclass(frozen=True)
class EncoderOutput:
    """Placeholder, in a call of a decoder layer, for the encoder's final states."""


@dataclass(frozen=True)
class Call:
    """How the model calls a layer: all arguments but the state.

    Attributes:
        args: positional arguments; without the first one where that is the state.
        kwargs: keyword arguments.
        named: True if the state is passed by keyword.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple["Call", Tensor]:
        """Separate a layer's arguments into the call and the state.

        Raises:
            UnsupportedModelError: no argument is the state.
        """
        if args and isinstance(args[0], Tensor):
            return cls(args[1:], dict(kwargs), named=False), args[0]
        if isinstance(kwargs.get(STATE), Tensor):
            return cls(args, {name: value for name, value in kwargs.items() if name != STATE}, named=True), kwargs[STATE]
        raise UnsupportedModelError(f"its layers take no {STATE}: they are called with {sorted(kwargs)}")

    def on(self, layer: Callable[..., Any], state: Tensor) -> Any:
        """Call a layer with these arguments and the given state."""
        return layer(*self.args, **{STATE: state}, **self.kwargs) if self.named else layer(state, *self.args, **self.kwargs)

    def values(self) -> Iterator[tuple[str | int, Any]]:
        """Yield the arguments with their positions or names."""
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def replaced(self, change: Callable[[str | int, Any], Any]) -> "Call":
        """Return a copy in which each argument is replaced by `change(place, argument)`."""
        args = tuple(change(place, value) for place, value in enumerate(self.args))
        return Call(args, {name: change(name, value) for name, value in self.kwargs.items()}, self.named)


def state_of(returned: Any) -> Tensor:
    """Return the state in what a layer returns: the value itself, or the first of several."""
    return returned[0] if isinstance(returned, tuple | list) else returned


class Replay:
    """A model's forward with stand-ins for its layers.

    Args:
        model: the model, on the meta device.
        paths: full names of the layers in order, an encoder's before a decoder's.
        encoder_layers: how many of them belong to an encoder.
        arguments: returns the model's keyword arguments for a batch's inputs and a cache of generation (or None).

    Attributes:
        num_returned: for each layer, how many values it returns; None if it returns the bare state.
        encoder_output_places: those arguments of decoder layers that are the encoder's final states.
        encoder_output_modules: full names of the modules that, one after the other, make these from the encoder's last state.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        paths: Sequence[str],
        encoder_layers: int,
        arguments: Callable[[Any, GenerationCache | None], dict[str, Any]],
    ) -> None:
        self.paths, self.encoder_layers, self.arguments = tuple(paths), encoder_layers, arguments
        self.model = copy.deepcopy(model).eval()
        self.encoder_output_modules: tuple[str, ...] = ()
        self.encoder_output_places: frozenset[str | int] = frozenset()
        self.num_returned: dict[int, int | None] = dict.fromkeys(range(len(paths)))
        self._visit: Callable[[int, Call, Tensor], Tensor] = _pass_on
        self.layers = [self.model.get_submodule(path) for path in self.paths]
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._stand_in, index)  # type: ignore[method-assign]
        self._outside: list[tuple[nn.Module, str]] = []
        self._tables: list[tuple[nn.Module, str]] = []
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        self._around = [module for module in self.model.modules() if id(module) not in inside]
        self._fill_outside()

    # Running ------------------------------------------------------------------------------------------------------------------

    def calls(self, inputs: Any, dtype: torch.dtype, past: GenerationCache | None = None) -> list[Call]:
        """Return how each layer is called for these inputs: masks, positions and whatever else depends on the batch alone."""
        calls: list[Call] = []

        def visit(index: int, call: Call, state: Tensor) -> Tensor:
            calls.append(call.replaced(self._without_encoder_output) if index >= self.encoder_layers else call)
            if index == len(self.layers) - 1:
                raise EndOfForward
            return state

        with torch.no_grad():
            self.run(inputs, {}, visit, dtype, training=False, past=past)
        return calls

    def first_state(
        self, inputs: Any, parameters: Mapping[str, Tensor], dtype: torch.dtype, *, training: bool, past: GenerationCache | None = None
    ) -> tuple[Tensor, ...]:
        """Return the state before the first layer; with an encoder, the states before its first layer and before the decoder's."""
        first: list[Tensor] = []
        last_start = self.encoder_layers if self.encoder_layers < len(self.layers) else 0

        def visit(index: int, call: Call, state: Tensor) -> Tensor:
            if index in (0, self.encoder_layers):
                first.append(state)
            if index == last_start:
                raise EndOfForward
            return state

        self.run(inputs, parameters, visit, dtype, training=training, past=past)
        return tuple(first)

    def outputs(self, inputs: Any, state: Tensor, parameters: Mapping[str, Tensor], dtype: torch.dtype, *, training: bool) -> Tensor:
        """Return the model's logits, given the state after its last layer."""

        def visit(index: int, call: Call, passed: Tensor) -> Tensor:
            if index < len(self.layers) - 1:
                return passed
            self._train(training)  # not earlier: what comes before the layers belongs to another piece and must not draw random numbers
            return state

        return logits_of(self.run(inputs, parameters, visit, dtype, training=False))

    def run(
        self,
        inputs: Any,
        parameters: Mapping[str, Tensor],
        visit: Callable[[int, Call, Tensor], Tensor],
        dtype: torch.dtype,
        *,
        training: bool,
        past: GenerationCache | None = None,
    ) -> Any:
        """Run the model's forward and return its result; None if it was ended early.

        Args:
            inputs: the inputs of a batch.
            parameters: parameters outside the layers by full name; the others are zeros.
            visit: called for each layer in turn with its number, its call and the state; returns the state after the layer.
            dtype: dtype of parameters and states.
            training: whether the modules around the layers are in training mode.
            past: a cache of generation; the tokens that it holds are left out.
        """
        self.move(dtype, inputs[0].device if isinstance(inputs, tuple) else inputs.device)
        self._train(training)
        self._visit = visit
        try:
            return functional_call(self.model, dict(parameters), (), self.arguments(inputs, past), tie_weights=False)
        except EndOfForward:
            return None
        finally:
            self._visit = _pass_on

    def _stand_in(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Take a layer's place in the model: pass its call and state to `visit`, and return as many values as the layer would."""
        call, state = Call.split(args, kwargs)
        state = self._visit(index, call, state)
        size = self.num_returned[index]
        return state if size is None else (state, *(ExtraOutput(index, place) for place in range(1, size)))

    def _without_encoder_output(self, place: str | int, value: Any) -> Any:
        return EncoderOutput() if place in self.encoder_output_places else value

    # Tensors outside the layers -------------------------------------------------------------------------------------------------

    def _fill_outside(self) -> None:
        """Initialise buffers by the model's own rules while parameters are still on the meta device, then turn these into zeros.

        Parameters that the model does not train are fixed tables (mostly of sines), and are initialised as buffers are.
        """
        inside = tuple(path + "." for path in self.paths)
        for path, module in self.model.named_modules():
            if (path + ".").startswith(inside):
                continue
            tables = {name: p for name, p in module._parameters.items() if p is not None and not p.requires_grad}
            if any(tensor is not None and tensor.is_meta for tensor in (*module._buffers.values(), *tables.values())):
                for name, table in tables.items():
                    module._parameters[name] = nn.Parameter(torch.empty_like(table, device="cpu"), requires_grad=False)
                fill_buffers(module)
                with torch.no_grad():
                    initialiser(self.model, path)(module)
            self._tables += [(module, name) for name in tables]
            self._outside += [(module, name) for name, p in module._parameters.items() if p is not None and name not in tables]
        self._placed = torch.float32, torch.device("meta")
        self.move(torch.float32, torch.device("cpu"))

    def _train(self, training: bool) -> None:
        if self.model.training != training:
            for module in self._around:
                module.training = training

    @property
    def dtype(self) -> torch.dtype:
        """Current dtype of the parameters outside the layers."""
        return self._placed[0]

    def move(self, dtype: torch.dtype, device: torch.device) -> None:
        """Convert everything outside the layers to this dtype and device."""
        if self._placed == (dtype, device):
            return
        for module, name in self._outside:
            shape = module._parameters[name].shape  # type: ignore[union-attr]
            module._parameters[name] = nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shape), requires_grad=False)
        for module, name in self._tables:
            module._parameters[name] = nn.Parameter(module._parameters[name].to(device, dtype), requires_grad=False)  # type: ignore[union-attr]
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self._placed = dtype, device

    def outside(self) -> dict[str, nn.Parameter]:
        """Return the zeros that stand for the parameters outside the layers, by full name; tied ones are separate here."""
        names = {id(module): path for path, module in self.model.named_modules()}
        return {f"{names[id(module)]}.{name}".lstrip("."): module._parameters[name] for module, name in self._outside}  # type: ignore[misc]


class EndOfForward(Exception):  # noqa: N818 (it is no error)
    """Ends a model's forward early, where its result is not needed."""


def _pass_on(index: int, call: Call, state: Tensor) -> Tensor:
    return state


def logits_of(returned: Any) -> Tensor:
    """Return the logits of what a model returns.

    Raises:
        UnsupportedModelError: there are none.
    """
    logits = getattr(returned, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(f"its forward returns {type(returned).__name__} without logits")
    return logits
