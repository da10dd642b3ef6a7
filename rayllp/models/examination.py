"""Find out whether a model can be cut into layers, and which parameters belong to which piece, by running it once on a few samples."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from rayllp.models.replay import Call, EndOfForward, ExtraOutput, Replay, UnsupportedModelError, logits_of, state_of

LARGE, NOT_RESIDUAL = 1e4, 0.5
"""Size of a test state, and the relative change in it from which a layer is not residual: x + F(norm(x)) changes a large x little."""


@dataclass(frozen=True)
class ModelAnalysis:
    """What one run of a model has shown.

    Attributes:
        embed: names of the parameters that the first state depends on.
        head: names of the parameters outside the layers that the outputs depend on.
        encoder_output: names of the parameters between the encoder's last state and what the decoder reads of it; empty without an encoder.
        kinds: the kind of each layer; equal for layers that differ only in their weights.
        residual: True if every kind of layer changes a large state by much less than its size, as x + F(norm(x)) does.
        extra_arguments: how each layer was called; of the arguments, only those that other layers return besides the state are kept.
    """

    embed: frozenset[str]
    head: frozenset[str]
    encoder_output: frozenset[str]
    kinds: tuple[int, ...]
    residual: bool
    extra_arguments: tuple[Call, ...]


def examine(replay: Replay, inputs: Any, build: Callable[[int], nn.Module], dtype: torch.dtype) -> ModelAnalysis:
    """Run the model once, with a real layer of each kind; afterwards `replay` knows how many values each layer returns.

    Args:
        replay: the model's forward with stand-ins for its layers.
        inputs: the inputs of a few samples.
        build: builds layer number n, with weights.
        dtype: dtype of parameters and states.

    Raises:
        UnsupportedModelError: the layers are not called one after the other, or need something that another worker does not have.
    """
    return _Examination(replay, inputs, build, dtype).run()


def parameters_behind(tensor: Tensor) -> set[int]:
    """Return the ids (`id()`) of all parameters that a tensor was computed from, found along its autograd graph."""
    parameters, seen, todo = set(), set(), [tensor.grad_fn]
    if tensor.grad_fn is None and tensor.requires_grad:
        parameters.add(id(tensor))
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            parameters.add(id(variable))
        todo += [following for following, _ in node.next_functions]
    return parameters


class _Examination:
    """One run of a model, in which every tensor that a layer is called with is traced back to what it was computed from."""

    def __init__(self, replay: Replay, inputs: Any, build: Callable[[int], nn.Module], dtype: torch.dtype) -> None:
        self.replay, self.inputs, self.build, self.dtype = replay, inputs, build, dtype
        self.visited: list[int] = []
        self.first: list[Tensor] = []
        self.passed: Tensor | None = None
        self.encoder_state: Tensor | None = None
        self.encoder_output: Tensor | None = None
        self.kinds: dict[Any, int] = {}
        self.calls: list[Call] = []  # all calls are kept, so that no two of their tensors can have the same id()
        self.kind_of: list[int] = []
        self.returned_by_kind: dict[int, tuple[int | None, Tensor]] = {}
        self.residual = True

    def run(self) -> ModelAnalysis:
        """Run the model and return what was found."""
        replay = self.replay
        replay.move(self.dtype, torch.device("cpu"))
        outside = replay.outside()
        for parameter in outside.values():
            parameter.requires_grad_()
        try:
            with torch.enable_grad():
                outputs = logits_of(replay.run(self.inputs, {}, self._visit, self.dtype, training=False))
        finally:
            for parameter in outside.values():
                parameter.requires_grad_(False)
        if self.visited != list(range(len(replay.layers))):
            raise UnsupportedModelError(f"its forward calls layers {self.visited}, not each of {len(replay.layers)} once and in order")
        embed = self._names(outside, *self.first)
        encoder_output = self._names(outside, self.encoder_output) if self.encoder_output is not None else frozenset()
        if self.encoder_output is not None:
            replay.encoder_output_modules = self._encoder_output_modules()
        extra_arguments = tuple(call.replaced(_only_extra_outputs) for call in self.calls)
        return ModelAnalysis(embed, self._names(outside, outputs), encoder_output, tuple(self.kind_of), self.residual, extra_arguments)

    def _names(self, outside: Mapping[str, nn.Parameter], *tensors: Tensor) -> frozenset[str]:
        """Return the names of those parameters outside the layers that these tensors were computed from."""
        behind = set().union(*(parameters_behind(tensor) for tensor in tensors))
        return frozenset(name for name, parameter in outside.items() if id(parameter) in behind)

    def _visit(self, index: int, call: Call, state: Tensor) -> Tensor:
        """Stand in for a layer: check how it is called, and return the state that a real layer of its kind makes."""
        replay = self.replay
        self.visited.append(index)
        self.calls.append(call)
        if index in (0, replay.encoder_layers):
            self.first.append(state)
        elif state is not self.passed:
            raise UnsupportedModelError(f"it changes the state between layers {index - 1} and {index}")
        self._check_arguments(index, call)
        kind = self._kind(index, call)
        self.kind_of.append(kind)
        if kind not in self.returned_by_kind:
            self.returned_by_kind[kind] = self._call(index, call, state.detach())
        replay.num_returned[index], after = self.returned_by_kind[kind]
        if after.shape != state.shape:
            raise UnsupportedModelError(f"layer {index} makes a state of shape {tuple(after.shape)} of one of {tuple(state.shape)}")
        self.passed = after.clone()
        if index == replay.encoder_layers - 1:
            self.encoder_state = self.passed.requires_grad_()
        return self.passed

    def _check_arguments(self, index: int, call: Call) -> None:
        """Refuse arguments that another worker could not compute, and note which one is the encoder's result."""
        for place, value in call.values():
            if isinstance(value, Cache):
                raise UnsupportedModelError(f"layer {index} is given a cache, which would remember one sweep in the next")
            for tensor in _tensors_in(value):
                if not tensor.requires_grad:
                    continue
                if self.encoder_state is not None and id(self.encoder_state) in parameters_behind(tensor):
                    if self.encoder_output is None or tensor is self.encoder_output:
                        self.encoder_output = tensor
                        self.replay.encoder_output_places |= {place}
                        continue
                    raise UnsupportedModelError(f"layer {index} reads more of the encoder than its last states ({place})")
                raise UnsupportedModelError(f"layer {index} is given {_word(place)}, which parameters outside the layers have made")

    def _kind(self, index: int, call: Call) -> int:
        """Return the number of a layer's kind, from its class, its parameters' shapes and its arguments."""
        module = self.replay.layers[index]
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
        plain = tuple((place, _identity(value)) for place, value in call.values())
        form = type(module), getattr(module, "attention_type", None), getattr(module, "layer_type", None), shapes, plain
        return self.kinds.setdefault(form, len(self.kinds))

    def _call(self, index: int, call: Call, state: Tensor) -> tuple[int | None, Tensor]:
        """Call a real layer; return how many values it returns (None for a bare state) and the state, and test whether it is residual."""
        layer, call = self.build(index).to(self.dtype), call.replaced(_without_extra_outputs)
        large = torch.randn_like(state) * LARGE
        with torch.no_grad():
            returned = call.on(layer, state)
            change = state_of(call.on(layer, large)) - large
        self.residual &= bool(change.norm() < NOT_RESIDUAL * large.norm())
        size = len(returned) if isinstance(returned, tuple | list) else None
        return size, state_of(returned).detach()

    def _encoder_output_modules(self) -> tuple[str, ...]:
        """Return the names of the modules that, one after the other, turn the encoder's last state into what the decoder reads."""
        replay, names, hooks = self.replay, [], []
        reached: list[Tensor] = []

        def after(module: nn.Module, args: tuple[Any, ...], returned: Any, name: str) -> None:
            if reached and args and args[0] is reached[-1] and isinstance(returned, Tensor):
                names.append(name)
                reached.append(returned)

        def visit(index: int, call: Call, state: Tensor) -> Tensor:
            if index == replay.encoder_layers - 1:
                state = state.clone()
                reached.append(state)
            if index == replay.encoder_layers:
                read = {id(value) for place, value in call.values() if place in replay.encoder_output_places}
                if read != {id(reached[-1])}:
                    raise UnsupportedModelError("between encoder and decoder there is more than modules called one after the other")
                raise EndOfForward
            return state

        for name, module in replay.model.named_modules():
            if not list(module.children()):
                hooks.append(module.register_forward_hook(partial(after, name=name)))
        try:
            with torch.no_grad():
                replay.run(self.inputs, {}, visit, self.dtype, training=False)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(names)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors_in(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)


def _identity(value: Any) -> Any:
    """Return a value that is equal for equal arguments: tensors are compared by identity, anything else by its text."""
    tensors = tuple(id(tensor) for tensor in _tensors_in(value))
    return tensors or ("extra output" if isinstance(value, ExtraOutput) else repr(value))


def _without_extra_outputs(place: str | int, value: Any) -> Any:
    return None if isinstance(value, ExtraOutput) else value


def _only_extra_outputs(place: str | int, value: Any) -> Any:
    return value if isinstance(value, ExtraOutput) else None


def _word(place: str | int) -> str:
    return f"its argument {place + 2}" if isinstance(place, int) else place
