"""One worker's share of the network: its layers, and the embedding or head where it is first or last."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from rayllp.config import TrainConfig
from rayllp.data.base import Inputs
from rayllp.engine.check_draws import check_draws
from rayllp.engine.vmapped_layers import Stacks
from rayllp.models import check_batched
from rayllp.models.base import Architecture, decayed_weights, hidden_matrices
from rayllp.models.randomness import FrozenRandomness
from rayllp.state import State, combine, interpolate, subtract, tensors

PARAMETER_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Moment:
    """What a call of a layer belongs to: a step, samples of its global batch, and what the architecture makes of their inputs."""

    step: int = 0
    samples: tuple[int, ...] = (0,)
    context: Any = None
    training: bool = False


class Block:
    """The pieces that worker `rank` of the layer group owns. Only these are ever built.

    Attributes:
        layers: by index in the whole network; the buffers of the first and last worker among them.
        middle: indices of the owned middle layers, ascending; neighbours where the placement is in blocks.
        draws: whether what the pieces draw in training is frozen.
        watched: None, or the last input of each layer, of the global batch's first sequence alone; filled while it is not None.
        stacks: of the middle layers, for calls of several.
    """

    def __init__(self, architecture: Architecture, config: TrainConfig, rank: int, device: torch.device) -> None:
        self.architecture, self.config, self.device = architecture, config, device
        self.dtype = PARAMETER_DTYPES[config.dtype]
        self.first, self.last = rank == 0, rank == config.layer_workers - 1
        self.middle = tuple(config.buffers.open + layer for layer in config.layers_of(rank))
        self.open = range(config.buffers.open) if self.first else range(0)
        self.close = range(config.model.layers - config.buffers.close, config.model.layers) if self.last else range(0)
        seed = config.seed
        self.embed = self._place(architecture.build_embed(seed)) if self.first else None
        self.layers = {n: self._place(architecture.build_layer(seed, n)) for n in (*self.open, *self.middle, *self.close)}
        self.head = self._place(architecture.build_head(seed)) if self.last else None
        common = architecture.build_common(seed)
        self.common = None if common is None else self._place(common)
        self.parameters = dict(self._named_parameters())
        self._tie()
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(parameter.requires_grad and config.model.trains(name))
        self.moment = Moment()
        self.watched: dict[int, State] | None = None
        self.stacks = Stacks(self.layers)
        self._templates: dict[int, dict[str, Tensor]] = {}
        self._callable: Mapping[int, nn.Module] = self.layers
        self._side_by_side = _side_by_side
        check_batched(config, architecture)
        # Compiled layers draw nothing, or are refused; a call under a key of our own could not be compiled.
        self.draws = architecture.stochastic is not False and not config.compile
        if config.compile:
            self._compile()

    def _place(self, module: nn.Module) -> nn.Module:
        return module.to(device=self.device, dtype=self.dtype).eval()

    def _compile(self) -> None:
        # A recorded graph is read several times: by relaxation, by the coarse solve, by the last sweep.
        torch._functorch.config.donated_buffer = False
        self._callable = {n: cast(nn.Module, torch.compile(module)) for n, module in self.layers.items()}
        self._side_by_side = torch.compile(_side_by_side)

    def pieces(self) -> Iterator[tuple[str, str, nn.Module]]:
        """Name ("embed", "layer_00003", "common", "head"), prefix of the parameters' names, and module of each owned piece."""
        architecture = self.architecture
        if self.embed is not None:
            yield "embed", architecture.embed_prefix(), self.embed
        for n, module in self.layers.items():
            yield f"layer_{n:05d}", architecture.layer_prefix(n), module
        if self.common is not None:
            yield "common", architecture.common_prefix(), self.common
        if self.head is not None:
            yield "head", architecture.head_prefix(), self.head

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for _, prefix, module in self.pieces():
            for name, parameter in module.named_parameters():
                yield prefix + name, parameter

    def _tie(self) -> None:
        """Make tied parameters one where a worker has both; give the head the embedding's values where it has only the head."""
        if not self.last or not self.architecture.tied:
            return
        if self.embed is None:
            embedding = self.architecture.build_embed(self.config.seed).to(self.dtype)
            names = {self.architecture.embed_prefix() + name: value for name, value in embedding.named_parameters()}
            for name, tied in self.architecture.tied:
                self.parameters[tied].data.copy_(names[name].data)
            return
        for name, tied in self.architecture.tied:
            path, _, leaf = tied.removeprefix(self.architecture.head_prefix()).rpartition(".")
            assert self.head is not None
            setattr(self.head.get_submodule(path), leaf, self.parameters[name])
            del self.parameters[tied]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Those of this worker's parameters that are not frozen."""
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    @property
    def shared(self) -> list[str]:
        """Names, in this worker's terms, of tied parameters whose other copy is on another worker."""
        if self.first == self.last:
            return []
        return [pair[1] if self.last else pair[0] for pair in self.architecture.tied]

    @property
    def shared_trained(self) -> list[str]:
        """Those of them that are not frozen."""
        return [name for name in self.shared if self.parameters[name].requires_grad]

    @property
    def common_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that every worker holds; their gradients are summed over workers."""
        prefix = self.architecture.common_prefix()
        return {prefix + name: parameter for name, parameter in self.common.named_parameters()} if self.common is not None else {}

    def is_counted_elsewhere(self, name: str) -> bool:
        """Whether another worker's copy of this parameter stands for it in norms and checkpoints."""
        return (self.last and name in self.shared) or (not self.first and name in self.common_parameters)

    def owned(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Piece, full name and value of every parameter; one that two pieces share counts to the first."""
        for piece, prefix, module in self.pieces():
            for own, _ in module.named_parameters():
                if prefix + own in self.parameters:
                    yield piece, prefix + own, self.parameters[prefix + own]

    def counted(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Parameters for which no other worker's copy stands, in the network's order, each with its piece's place in it."""
        layers = self.config.model.layers
        places = {"embed": 0, "common": layers + 1, "head": layers + 2, **{f"layer_{n:05d}": n + 1 for n in self.layers}}
        for piece, name, parameter in self.owned():
            if not self.is_counted_elsewhere(name):
                yield places[piece], parameter

    def leaves(self, index: int) -> list[nn.Parameter]:
        """Trainable parameters that layer `index` uses."""
        return [*(p for p in self.layers[index].parameters() if p.requires_grad), *self.common_leaves]

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The weight matrices of this worker's layers, buffers among them."""
        return [matrix for layer in self.layers.values() for matrix in hidden_matrices(layer) if matrix.requires_grad]

    @property
    def decayed(self) -> set[str]:
        """Names of this worker's parameters that weight decay is for."""
        return {prefix + name for _, prefix, module in self.pieces() for name in decayed_weights(module)}

    @property
    def common_leaves(self) -> list[nn.Parameter]:
        """Those of them that are every layer's."""
        return [] if self.common is None else [p for p in self.common.parameters() if p.requires_grad]

    def template(self, index: int) -> dict[str, Tensor]:
        """A layer of any worker: names of its parameters and tensors of their shapes, whose values mean nothing."""
        if index not in self._templates:
            layer = self.architecture.build_layer(self.config.seed, index)
            empty = {name: torch.empty(p.shape, dtype=self.dtype, device=self.device) for name, p in layer.named_parameters()}
            self._templates[index] = empty
        return self._templates[index]

    # Running ------------------------------------------------------------------------------------------------------------------

    def begin(self, step: int, samples: Iterable[int], inputs: Inputs, *, training: bool, past: Any = None) -> Moment:
        """What follows belongs to this step, and to these samples of its global batch, whose inputs are these.

        Args:
            past: in generation, what the architecture remembers of the inputs' first tokens.
        """
        remembered = {} if past is None else {"past": past}
        moment = Moment(step, tuple(samples), self.architecture.context(inputs, self.dtype, **remembered), training)
        self.resume(moment)
        return moment

    def resume(self, moment: Moment) -> None:
        """Go back to a moment that `begin` made."""
        if moment.training != self.moment.training:
            for _, _, module in self.pieces():
                module.train(moment.training)
        self.moment = moment

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Inside, layers run as they are: generation's lengths, each another, would be compiled one by one."""
        kept, self._callable = self._callable, self.layers
        try:
            yield
        finally:
            self._callable = kept

    def check_draws(self, inputs: Inputs) -> None:
        """Run the pieces once, on one of these inputs, to see what they draw in training.

        Raises:
            SettingsError: numbers that are no function of seed, step, layer and sample, or any where none can be frozen.
        """
        pieces = {"embed": self.embed, **self.layers, "head": self.head}
        owned = {piece: module for piece, module in pieces.items() if module is not None}
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.config.dtype == "bfloat16" else None
        drawing = check_draws(self.architecture, owned, self.common, inputs, self.dtype, autocast)
        check_batched(self.config, self.architecture, drawing)
        self.draws = self.draws or drawing is not None

    @contextmanager
    def _context(self, piece: object, *, autocast: bool = True) -> Iterator[None]:
        with ExitStack() as stack:
            if self.config.dtype == "bfloat16" and autocast:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self.moment.training and self.draws:
                stack.enter_context(FrozenRandomness((self.config.seed, self.moment.step, piece), self.moment.samples))
            yield

    def layer(self, index: int, state: State) -> State:
        """x + Δt·(block(x) − x); the block as it is where Δt = 1."""
        return self.run_layer(index, self._callable[index], state)

    def run_layer(self, index: int, module: nn.Module, state: State) -> State:
        """The same by another module for this layer, which may be another worker's."""
        size = self.config.step_sizes[index]
        self._watch(index, state)
        with self._context(index):
            after = self.architecture.advance(index, module, state, self.moment.context, self.common)
        return after if size == 1 else interpolate(state, after, size)

    def side_by_side(self, indices: Sequence[int], state: State, weights: Mapping[str, Tensor]) -> State:
        """`layer` of several middle layers in one call.

        Args:
            state: one a layer: dimension 0 is the layers.
            weights: of a stack that has these layers, and of no other.
        """
        first = indices[0]
        for place, index in enumerate(indices):
            self._watch(index, combine(lambda part, place=place: part[place], state))
        with self._context(first):
            after = self._side_by_side(
                self.architecture.advance, first, self.layers[first], dict(weights), state, self.moment.context, self.common
            )
        size = self.config.step_sizes[first]
        return after if size == 1 else interpolate(state, after, size)

    def _watch(self, index: int, state: State) -> None:
        if self.watched is not None and self.moment.samples[0] == 0:
            self.watched[index] = combine(lambda part: part[:1].detach().clone(), state)

    def increment(self, index: int, state: State) -> State:
        """block(x) − x, a layer's step for Δt = 1, in the weights' own precision: differences of it are taken."""
        with self._context(index, autocast=False):
            after = self.architecture.advance(index, self.layers[index], state, self.moment.context, self.common)
        return subtract(after, state)

    def enter(self, inputs: Inputs) -> State:
        """Embedding and opening buffers."""
        assert self.embed is not None
        with self._context("embed"):
            state = self.architecture.enter(self.embed, inputs, self.moment.context)
        for n in self.open:
            state = self.layer(n, state)
        return state

    def leave(self, state: State, *, last_only: bool = False) -> Tensor:
        """Closing buffers and head: the outputs, of all positions or of the last one only."""
        assert self.head is not None
        for n in self.close:
            state = self.layer(n, state)
        if last_only:
            state = self.architecture.last_position(state)
        with self._context("head"):
            return self.architecture.leave(self.head, state, self.moment.context)


def _side_by_side(
    advance: Callable[[int, nn.Module, State, Any, nn.Module | None], State],
    index: int,
    module: nn.Module,
    weights: dict[str, Tensor],
    state: State,
    context: Any,
    common: nn.Module | None,
) -> State:
    """`advance` of a layer with several weights, each from a state of its own."""

    def one(weights: dict[str, Tensor], state: State) -> State:
        def layer(*args: Any, **kwargs: Any) -> Any:
            return functional_call(module, weights, args, kwargs)

        return advance(index, cast(nn.Module, layer), state, context, common)

    # Of the fused attentions only the GPU's flash can be called under vmap: the CPU's is looped over, and the memory-efficient one's
    # backward pass refuses what its forward pass has made.
    on_gpu = tensors(state)[0].device.type == "cuda"
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if on_gpu else [SDPBackend.MATH]):
        return vmap(one)(weights, state)
