"""A transformers model's own forward without its layers: the first state it makes, how it calls each layer, its outputs from the last one.

Every layer has a stand-in that hands the state on. Parameters that nobody has given are zeros of stride 0, which take no memory, so that
a worker in the middle of the network can ask the model how its layers are called without having the embedding's weights.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Cache, PreTrainedModel

from rayllp.errors import SettingsError

LARGE, NOT_RESIDUAL = 1e4, 0.5
"""A layer that changes a state of this size by more than this share of it is no residual step: a norm follows its sum."""
STATE = "hidden_states"
"""How transformers' layers call the state, where it is not their first argument."""


class UncuttableError(SettingsError):
    """A model whose forward is not inputs, then one layer after the other, then outputs."""


@dataclass(frozen=True)
class HandedOn:
    """What a layer returns beside the state, as it appears in the call of a later one."""

    layer: int
    place: int


@dataclass(frozen=True)
class Memory:
    """The encoder's final states, in the call of a decoder's layer."""


@dataclass(frozen=True)
class Call:
    """How the model calls a layer. The state's place is left empty.

    Attributes:
        args: what follows the state, where it is the first argument.
        kwargs: by name.
        named: whether the state is given by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple["Call", Tensor]:
        """A call, and the state in it.

        Raises:
            UncuttableError: there is none.
        """
        if args and isinstance(args[0], Tensor):
            return cls(args[1:], dict(kwargs), named=False), args[0]
        if isinstance(kwargs.get(STATE), Tensor):
            return cls(args, {name: value for name, value in kwargs.items() if name != STATE}, named=True), kwargs[STATE]
        raise UncuttableError(f"its layers take no {STATE}: they are called with {sorted(kwargs)}")

    def on(self, layer: Callable[..., Any], state: Tensor) -> Any:
        """Call a layer so, on another state."""
        return layer(*self.args, **{STATE: state}, **self.kwargs) if self.named else layer(state, *self.args, **self.kwargs)

    def values(self) -> Iterator[tuple[str | int, Any]]:
        """Arguments, by place or name."""
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def replaced(self, change: Callable[[str | int, Any], Any]) -> "Call":
        """With every argument changed."""
        args = tuple(change(place, value) for place, value in enumerate(self.args))
        return Call(args, {name: change(name, value) for name, value in self.kwargs.items()}, self.named)


def state_of(returned: Any) -> Tensor:
    """The state in what a layer returns: itself, or the first of several."""
    return returned[0] if isinstance(returned, tuple | list) else returned


@dataclass(frozen=True)
class Examined:
    """What running a model once has shown of it.

    Attributes:
        embed: names of the parameters that the first state depends on.
        head: names of those that the outputs depend on, beside the last state.
        memory: names of those between the encoder's last state and what the decoder reads of it; empty without an encoder.
        kinds: of each layer: equal for layers that differ in their weights alone.
        residual: whether every kind of layer changes a large state by less than itself, as x + F(x) with a norm in F does.
        shapes: of the states, batch size first: one, or an encoder's and a decoder's.
    """

    embed: frozenset[str]
    head: frozenset[str]
    memory: frozenset[str]
    kinds: tuple[int, ...]
    residual: bool
    shapes: tuple[torch.Size, ...]


class Replay:
    """A model's forward with stand-ins for its layers.

    Args:
        model: on the meta device.
        paths: full names of the layers in their order, an encoder's before a decoder's.
        encoder: how many are an encoder's.
        arguments: the model's keyword arguments for a batch's inputs.
    """

    def __init__(self, model: PreTrainedModel, paths: Sequence[str], encoder: int, arguments: Callable[[Any], dict[str, Any]]) -> None:
        self.paths, self.encoder, self.arguments = tuple(paths), encoder, arguments
        self.model = copy.deepcopy(model).eval()
        self.memory_modules: tuple[str, ...] = ()
        self._memory_places: frozenset[str | int] = frozenset()
        self._returns: dict[int, int | None] = dict.fromkeys(range(len(paths)))
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

    def calls(self, inputs: Any, dtype: torch.dtype) -> list[Call]:
        """How each layer is called for these inputs; masks, positions and whatever else follows from the batch alone."""
        calls: list[Call] = []

        def visit(index: int, call: Call, state: Tensor) -> Tensor:
            calls.append(call.replaced(self._without_memory) if index >= self.encoder else call)
            if index == len(self.layers) - 1:
                raise _EndError
            return state

        with torch.no_grad():
            self._run(inputs, {}, visit, dtype, training=False)
        return calls

    def first_state(self, inputs: Any, parameters: Mapping[str, Tensor], dtype: torch.dtype, *, training: bool) -> tuple[Tensor, ...]:
        """The state before the first layer; with an encoder, that before its first layer and that before the decoder's."""
        first: list[Tensor] = []
        last_start = self.encoder if self.encoder < len(self.layers) else 0

        def visit(index: int, call: Call, state: Tensor) -> Tensor:
            if index in (0, self.encoder):
                first.append(state)
            if index == last_start:
                raise _EndError
            return state

        self._run(inputs, parameters, visit, dtype, training=training)
        return tuple(first)

    def outputs(self, inputs: Any, state: Tensor, parameters: Mapping[str, Tensor], dtype: torch.dtype, *, training: bool) -> Tensor:
        """The model's logits, its last layer having made this state."""

        def visit(index: int, call: Call, passed: Tensor) -> Tensor:
            if index < len(self.layers) - 1:
                return passed
            self._train(training)  # from here on: what comes before the layers is another piece's, and draws nothing here
            return state

        return _logits(self._run(inputs, parameters, visit, dtype, training=False))

    def examine(self, inputs: Any, build: Callable[[int], nn.Module], dtype: torch.dtype) -> Examined:
        """Run the model once on a few samples, with a real layer of every kind.

        Args:
            build: a layer with its weights.

        Raises:
            UncuttableError: its layers are not called one after the other, or need what no other worker can have.
        """
        return _Examination(self, inputs, build, dtype).run()

    def _run(
        self,
        inputs: Any,
        parameters: Mapping[str, Tensor],
        visit: Callable[[int, Call, Tensor], Tensor],
        dtype: torch.dtype,
        *,
        training: bool,
    ) -> Any:
        self._move(dtype, inputs[0].device if isinstance(inputs, tuple) else inputs.device)
        self._train(training)
        self._visit = visit
        try:
            return functional_call(self.model, dict(parameters), (), self.arguments(inputs), tie_weights=False)
        except _EndError:
            return None
        finally:
            self._visit = _pass_on

    def _stand_in(self, index: int, *args: Any, **kwargs: Any) -> Any:
        call, state = Call.split(args, kwargs)
        state = self._visit(index, call, state)
        size = self._returns[index]
        return state if size is None else (state, *(HandedOn(index, place) for place in range(1, size)))

    def _without_memory(self, place: str | int, value: Any) -> Any:
        return Memory() if place in self._memory_places else value

    # Tensors outside the layers -------------------------------------------------------------------------------------------------

    def _fill_outside(self) -> None:
        """Buffers get their values by the model's own rules, while parameters are still on the meta device; then these become zeros.

        Parameters that the model does not train are tables (of sines, mostly), and have values as buffers do.
        """
        inside = tuple(path + "." for path in self.paths)
        for path, module in self.model.named_modules():
            if (path + ".").startswith(inside):
                continue
            tables = {name: p for name, p in module._parameters.items() if p is not None and not p.requires_grad}
            if any(tensor is not None and tensor.is_meta for tensor in (*module._buffers.values(), *tables.values())):
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")
                for name, table in tables.items():
                    module._parameters[name] = nn.Parameter(torch.empty_like(table, device="cpu"), requires_grad=False)
                with torch.no_grad():
                    initialiser(self.model, path)(module)
            self._tables += [(module, name) for name in tables]
            self._outside += [(module, name) for name, p in module._parameters.items() if p is not None and name not in tables]
        self._placed = torch.float32, torch.device("meta")
        self._move(torch.float32, torch.device("cpu"))

    def _train(self, training: bool) -> None:
        if self.model.training != training:
            for module in self._around:
                module.training = training

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters that stand outside the layers, at present."""
        return self._placed[0]

    def _move(self, dtype: torch.dtype, device: torch.device) -> None:
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
        """The zeros that stand for parameters outside the layers, each name by itself: tied ones are several here."""
        names = {id(module): path for path, module in self.model.named_modules()}
        return {f"{names[id(module)]}.{name}".lstrip("."): module._parameters[name] for module, name in self._outside}  # type: ignore[misc]


class _EndError(Exception):
    """Ends a model's forward where nothing after it is asked for."""


def _pass_on(index: int, call: Call, state: Tensor) -> Tensor:
    return state


def _logits(returned: Any) -> Tensor:
    found = getattr(returned, "logits", None)
    if not isinstance(found, Tensor):
        raise UncuttableError(f"its forward returns {type(returned).__name__} without logits")
    return found


def initialiser(model: PreTrainedModel, path: str) -> Callable[[nn.Module], None]:
    """What initialises the module `path`: the rules of the innermost transformers model that it is in."""
    owner: PreTrainedModel = model
    place: nn.Module = model
    for name in path.split(".") if path else ():
        place = place.get_submodule(name)
        owner = place if isinstance(place, PreTrainedModel) else owner
    return owner._init_weights


def parameters_behind(tensor: Tensor) -> set[int]:
    """Identities of the leaves that a tensor's graph ends at."""
    found, seen, todo = set(), set(), [tensor.grad_fn]
    if tensor.grad_fn is None and tensor.requires_grad:
        found.add(id(tensor))
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        todo += [following for following, _ in node.next_functions]
    return found


class _Examination:
    """One run of a model, in which every tensor that a layer is called with is traced back to what made it."""

    def __init__(self, replay: Replay, inputs: Any, build: Callable[[int], nn.Module], dtype: torch.dtype) -> None:
        self.replay, self.inputs, self.build, self.dtype = replay, inputs, build, dtype
        self.visited: list[int] = []
        self.first: list[Tensor] = []
        self.passed: Tensor | None = None
        self.encoded: Tensor | None = None
        self.memory: Tensor | None = None
        self.kinds: dict[Any, int] = {}
        self.calls: list[Call] = []  # kept, so that no two of their tensors have one identity
        self.kind_of: list[int] = []
        self.returns: dict[int, tuple[int | None, Tensor]] = {}
        self.residual = True

    def run(self) -> Examined:
        replay = self.replay
        replay._move(self.dtype, torch.device("cpu"))
        outside = replay.outside()
        for parameter in outside.values():
            parameter.requires_grad_()
        try:
            with torch.enable_grad():
                outputs = _logits(replay._run(self.inputs, {}, self._visit, self.dtype, training=False))
        finally:
            for parameter in outside.values():
                parameter.requires_grad_(False)
        if self.visited != list(range(len(replay.layers))):
            raise UncuttableError(f"its forward calls layers {self.visited}, not each of {len(replay.layers)} once and in order")
        embed = self._names(outside, *self.first)
        memory = self._names(outside, self.memory) if self.memory is not None else frozenset()
        if self.memory is not None:
            replay.memory_modules = self._modules_to_memory()
        return Examined(
            embed, self._names(outside, outputs), memory, tuple(self.kind_of), self.residual, tuple(state.shape for state in self.first)
        )

    def _names(self, outside: Mapping[str, nn.Parameter], *tensors: Tensor) -> frozenset[str]:
        behind = set().union(*(parameters_behind(tensor) for tensor in tensors))
        return frozenset(name for name, parameter in outside.items() if id(parameter) in behind)

    def _visit(self, index: int, call: Call, state: Tensor) -> Tensor:
        replay = self.replay
        self.visited.append(index)
        self.calls.append(call)
        if index in (0, replay.encoder):
            self.first.append(state)
        elif state is not self.passed:
            raise UncuttableError(f"it changes the state between layers {index - 1} and {index}")
        self._check_arguments(index, call)
        kind = self._kind(index, call)
        self.kind_of.append(kind)
        if kind not in self.returns:
            self.returns[kind] = self._call(index, call, state.detach())
        replay._returns[index], after = self.returns[kind]
        if after.shape != state.shape:
            raise UncuttableError(f"layer {index} makes a state of shape {tuple(after.shape)} of one of {tuple(state.shape)}")
        self.passed = after.clone()
        if index == replay.encoder - 1:
            self.encoded = self.passed.requires_grad_()
        return self.passed

    def _check_arguments(self, index: int, call: Call) -> None:
        for place, value in call.values():
            if isinstance(value, Cache):
                raise UncuttableError(f"layer {index} is given a cache, which would remember one sweep in the next")
            for tensor in _tensors_in(value):
                if not tensor.requires_grad:
                    continue
                if self.encoded is not None and id(self.encoded) in parameters_behind(tensor):
                    if self.memory is None or tensor is self.memory:
                        self.memory = tensor
                        self.replay._memory_places |= {place}
                        continue
                    raise UncuttableError(f"layer {index} reads more of the encoder than its last states ({place})")
                raise UncuttableError(f"layer {index} is given {_word(place)}, which parameters outside the layers have made")

    def _kind(self, index: int, call: Call) -> int:
        module = self.replay.layers[index]
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
        plain = tuple((place, _identity(value)) for place, value in call.values())
        form = type(module), getattr(module, "attention_type", None), getattr(module, "layer_type", None), shapes, plain
        return self.kinds.setdefault(form, len(self.kinds))

    def _call(self, index: int, call: Call, state: Tensor) -> tuple[int | None, Tensor]:
        layer, call = self.build(index).to(self.dtype), call.replaced(_nothing_handed_on)
        large = torch.randn_like(state) * LARGE
        with torch.no_grad():
            returned = call.on(layer, state)
            change = state_of(call.on(layer, large)) - large
        self.residual &= bool(change.norm() < NOT_RESIDUAL * large.norm())
        size = len(returned) if isinstance(returned, tuple | list) else None
        return size, state_of(returned).detach()

    def _modules_to_memory(self) -> tuple[str, ...]:
        """The modules that are called one after the other on the encoder's last states, and make what the decoder reads."""
        replay, path, hooks = self.replay, [], []
        reached: list[Tensor] = []

        def after(module: nn.Module, args: tuple[Any, ...], returned: Any, name: str) -> None:
            if reached and args and args[0] is reached[-1] and isinstance(returned, Tensor):
                path.append(name)
                reached.append(returned)

        def visit(index: int, call: Call, state: Tensor) -> Tensor:
            if index == replay.encoder - 1:
                state = state.clone()
                reached.append(state)
            if index == replay.encoder:
                read = {id(value) for place, value in call.values() if place in replay._memory_places}
                if read != {id(reached[-1])}:
                    raise UncuttableError("between encoder and decoder there is more than modules called one after the other")
                raise _EndError
            return state

        for name, module in replay.model.named_modules():
            if not list(module.children()):
                hooks.append(module.register_forward_hook(partial(after, name=name)))
        try:
            with torch.no_grad():
                replay._run(self.inputs, {}, visit, self.dtype, training=False)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(path)


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
    """Equal for arguments that are one: tensors by themselves, all else by what it says."""
    found = tuple(id(tensor) for tensor in _tensors_in(value))
    return found or ("handed on" if isinstance(value, HandedOn) else repr(value))


def _nothing_handed_on(place: str | int, value: Any) -> Any:
    return None if isinstance(value, HandedOn) else value


def _word(place: str | int) -> str:
    return f"its argument {place + 2}" if isinstance(place, int) else place
