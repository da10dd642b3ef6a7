"""Random numbers keyed by (seed, step, layer, sample), never by worker.

Two things need this. A layer's initial weights have to depend on the seed and its index alone. A layer's dropout mask has to be the same
in every sweep of one training step, or MGRIT does not converge (arXiv:2601.09026, appendix C), and the same however the batch is divided
into microbatches or replicas, so that any mesh trains the same network.

Dropout is handled below the modules, in PyTorch's dispatcher: every operator that draws random numbers has a kernel here, registered under
a dispatch key that is active only inside `FrozenRandomness`. This catches every caller: nn.Dropout, nn.MultiheadAttention, C++ code that
composes its own dropout, a module that draws by hand. Other operators fall through the key at no cost. A `TorchFunctionMode` would slow
down small layers by a third and not see inside nn.MultiheadAttention; a `TorchDispatchMode` would slow them down several times.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel

from rayllp.errors import SettingsError
from rayllp.keys import key

_default_generator = threading.RLock()


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seed torch's default CPU generator by `parts` inside the block, and restore its state afterwards."""
    # The default generator belongs to the process: workers that are threads take turns, so that none seeds it while another draws.
    with _default_generator, torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(*parts))
        yield


class UnkeyedDrawError(SettingsError):
    """A layer draws random numbers in a way that cannot be keyed by step and sample."""


class FrozenRandomness:
    """Makes all random numbers drawn inside the block depend on (parts, sample) alone, without changing the module that draws them.

    Each sample has a generator of its own, which fills that sample's rows of every tensor drawn, in the order of the draws. Dimension 0 of
    such a tensor has to be the batch, or a multiple of it in which a sample's rows are adjacent (batch times heads). A scalar is the same
    for all samples.

    Args:
        parts: what the numbers depend on: seed, step, layer.
        samples: index of each sequence within the step's global batch.
        on_draw: called at each draw with the operator's name.
    """

    def __init__(self, parts: tuple[object, ...], samples: tuple[int, ...], on_draw: Callable[[str], None] | None = None) -> None:
        self.parts, self.samples, self.on_draw = parts, samples, on_draw
        self._generators: dict[tuple[torch.device, int | None], torch.Generator] = {}

    def __enter__(self) -> Self:
        self._outer, _inside.frozen = getattr(_inside, "frozen", None), self
        self._guard = torch._C._IncludeDispatchKeyGuard(_KEY)
        self._guard.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(*error)
        _inside.frozen = self._outer

    def generator(self, device: torch.device, place: int | None) -> torch.Generator:
        """Return the generator of the sample at this place of the batch (None: one for all samples); it continues from draw to draw."""
        generator = self._generators.get((device, place))
        if generator is None:
            sample = "all samples" if place is None else self.samples[place]
            generator = self._generators[device, place] = torch.Generator(device).manual_seed(key(*self.parts, sample))
        return generator

    def rows(self, name: str, shape: torch.Size, device: torch.device) -> Iterator[tuple[Any, torch.Generator]]:
        """Yield, for each sample, its rows in a tensor of this shape and its generator.

        Raises:
            UnkeyedDrawError: dimension 0 is not a multiple of the batch.
        """
        if not shape:
            yield ..., self.generator(device, None)
            return
        each, rest = divmod(shape[0], len(self.samples))
        if rest or not each:
            raise UnkeyedDrawError(
                f"{name} draws a tensor of shape {tuple(shape)}, but the batch has {len(self.samples)} sequences: dimension 0 of what is "
                "drawn must be the batch, so that a sample's mask does not depend on how the batch is cut"
            )
        for place in range(len(self.samples)):
            yield slice(place * each, (place + 1) * each), self.generator(device, place)


_inside = threading.local()


# Operators that draw, by key ------------------------------------------------------------------------------------------------------


def _fill(frozen: FrozenRandomness, name: str, op: Any, tensor: Tensor, *args: Any) -> Tensor:
    """Kernel of Tensor.uniform_, normal_ and all others that fill a tensor."""
    fill = getattr(Tensor, op.overloadpacket.__name__)
    for place, generator in frozen.rows(name, tensor.shape, tensor.device):
        part = tensor[place]
        if part.is_contiguous():
            fill(part, *args, generator=generator)
        else:  # draw in order of index, not of memory, so that strides do not matter
            part.copy_(fill(torch.empty(part.shape, dtype=part.dtype, device=part.device), *args, generator=generator))
    return tensor


def _coin(frozen: FrozenRandomness, name: str, op: Any, tensor: Tensor, p: float | Tensor = 0.5) -> Tensor:
    """Kernel of Tensor.bernoulli_, which dropout calls.

    It draws in single precision, which is faster on a CPU than the operator's own double precision.
    """
    uniform = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
    return tensor.copy_(_fill(frozen, name, torch.ops.aten.uniform_.default, uniform) < p)


def _native_dropout(frozen: FrozenRandomness, name: str, op: Any, tensor: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Kernel of native_dropout, which nn.Dropout calls on a GPU."""
    keep = _coin(frozen, name, op, torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device), 1 - p)
    return tensor * keep.to(tensor.dtype).mul_(1 / (1 - p) if p < 1 else 0.0), keep


def _by_row(frozen: FrozenRandomness, name: str, op: Any, *args: Any, **options: Any) -> Tensor:
    """Kernel of torch.bernoulli, randn_like, normal with a tensor of means, and others that draw a number for each element of a tensor."""
    shape = torch.broadcast_shapes(*(arg.shape for arg in args if isinstance(arg, Tensor)))
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    args = tuple(arg.expand(shape) if isinstance(arg, Tensor) else arg for arg in args)
    parts = [
        op(*(arg[place] if isinstance(arg, Tensor) else arg for arg in args), **options, generator=generator)
        for place, generator in frozen.rows(name, shape, device)
    ]
    return torch.cat(parts) if shape else parts[0]


def _of_size(frozen: FrozenRandomness, name: str, op: Any, *args: Any, **options: Any) -> Tensor:
    """Kernel of torch.rand, randn, randint and normal, which are given a size."""
    *before, size = args
    shape, device = torch.Size(size), torch.device(options.get("device") or "cpu")
    parts = [
        op(*before, [] if place is ... else [place.stop - place.start, *shape[1:]], **options, generator=generator)
        for place, generator in frozen.rows(name, shape, device)
    ]
    return torch.cat(parts) if shape else parts[0]


def _refuse(frozen: FrozenRandomness, name: str, op: Any, *args: Any, **options: Any) -> Any:
    raise UnkeyedDrawError(f"{name} draws numbers that cannot be taken sample by sample")


_FILLING = "uniform_ normal_ exponential_ geometric_ cauchy_ log_normal_ random_".split()
_ROWWISE = "bernoulli poisson binomial _standard_gamma normal rand_like randn_like randint_like rrelu_with_noise".split()
_SIZED = "rand randn randint".split()
_REFUSED = """
multinomial randperm _sample_dirichlet _fused_dropout rrelu_with_noise_ rrelu_with_noise_functional bernoulli uniform normal exponential
geometric cauchy log_normal random lstm gru rnn_tanh rnn_relu _cudnn_rnn miopen_rnn _flash_attention_forward _efficient_attention_forward
_flash_attention_forward_no_dropout_inplace _scaled_dot_product_attention_math_for_mps _scaled_dot_product_flash_attention
_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu
_scaled_dot_product_fused_attention_overrideable
""".split()
"""Operators that are refused where they draw; attention and recurrent ones draw only with dropout."""
DRAWING = (*_FILLING, *_ROWWISE, *_SIZED, "bernoulli_", "native_dropout", *_REFUSED)
"""All of PyTorch's operators that draw random numbers."""
_WITH_GENERATOR = {
    "default": "generator", "low": "low_generator", "Tensor": "Tensor_generator", "low_dtype": "low_generator_dtype",
}  # fmt: skip
"""For factories whose usual overload takes no generator: the overload that does."""


def _handler(op: Any) -> Callable[..., Any]:
    """Return the function that draws an operator's random numbers by key."""
    name, overload = op._schema.name.removeprefix("aten::"), op._overloadname
    if overload.endswith("out"):
        return _refuse
    if name == "bernoulli_":
        return _coin
    if name == "native_dropout":
        return _native_dropout
    if name in _FILLING:
        return _fill
    if name in _SIZED or (name, overload) == ("normal", "float_float"):
        return _of_size
    return _by_row if name in _ROWWISE else _refuse


def _kernel(op: Any) -> Callable[..., Any]:
    """Return the kernel that is registered for an operator."""
    handle, name = _handler(op), op._schema.name.removeprefix("aten::")
    defaults = {argument.name: argument.default_value for argument in op._schema.arguments}
    plain = "generator" not in defaults and handle in (_of_size, _by_row)
    takes = getattr(op.overloadpacket, _WITH_GENERATOR[op._overloadname]) if plain else op

    def draws(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """True if a call draws random numbers: not without dropout, and not outside training."""
        values = {**defaults, **dict(zip(defaults, args, strict=False)), **options}
        idle = values.get("dropout", values.get("dropout_p")) == 0 or values.get("train", values.get("training")) is False
        return not (idle or (name == "native_dropout" and values["p"] == 0))

    # Only operators with these arguments may draw nothing; looking at the arguments of all would cost as much as the operator itself.
    may_idle = bool({"dropout", "dropout_p", "train", "training"} & set(defaults))

    def kernel(*args: Any, **options: Any) -> Any:
        """Run the operator with random numbers by key."""
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            if may_idle and not draws(args, options):
                return op(*args, **options)
            frozen = getattr(_inside, "frozen", None)
            if frozen is None:  # this thread is autograd's
                raise UnkeyedDrawError(f"{name} draws numbers in the backward pass")
            if frozen.on_draw is not None:
                frozen.on_draw(name)
            options.pop("generator", None)  # a generator of the layer's own would continue from sweep to sweep
            args = tuple(arg for arg in args if not isinstance(arg, torch.Generator))
            return handle(frozen, name, takes, *args, **options)

    return kernel


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, p: float = 0.0, *args: Any, **options: Any) -> Any:
    """Kernel of scaled_dot_product_attention. Fused kernels draw dropout internally, so with dropout its composite definition is used."""
    if p == 0:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return torch.ops.aten.scaled_dot_product_attention.default(query, key, value, mask, p, *args, **options)
    return torch.ops.aten._scaled_dot_product_attention_math.default(query, key, value, mask, p, *args, **options)[0]


def _register() -> list[Library]:
    """Register the kernels under the dispatch key; they stay as long as the returned libraries live."""
    aten, others = Library("aten", "IMPL", _KEY_NAME), Library("_", "IMPL", _KEY_NAME)
    others.fallback(fallthrough_kernel)
    aten.impl("scaled_dot_product_attention", _attention)
    for name in dict.fromkeys(DRAWING):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            aten.impl(op, _kernel(op))
    return [aten, others]


_KEY_NAME = "TESTING_ONLY_GenericMode"
"""A dispatch key of higher priority than all others, used by no backend, no mode and no other library."""
_KEY = cast(torch._C.DispatchKey, torch._C._parse_dispatch_key(_KEY_NAME))
_KEYS = torch._C.DispatchKeySet(_KEY)
_libraries = _register()
