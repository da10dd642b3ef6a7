"""One worker's part of the network: its layers, and the embedding or head if it is first or last; and how these are called."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rayllp.config import TrainConfig
from rayllp.data.base import Inputs
from rayllp.engine.batch import StepBatch
from rayllp.engine.check_draws import check_draws
from rayllp.engine.deferred_gradients import DeferredGradients, LayerModules, Parts
from rayllp.engine.vmapped_layers import Stacks, advance_together
from rayllp.models import check_batched
from rayllp.models.base import Architecture, decayed_weights, hidden_matrices
from rayllp.models.randomness import FrozenRandomness
from rayllp.state import State, combine, interpolate, subtract

PARAMETER_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""The parameters' dtype, by the setting `dtype`: with bfloat16 only the computation is in bfloat16, by autocast."""
MOST_TRIES = 10
"""So often it is tried out whether a layer's backward pass can be cut in two, while some of its gradients are zero."""


class Block:
    """The pieces of the network that worker `rank` of the layer group owns. It keeps no others in memory.

    Attributes:
        layers: the owned layers, buffer layers included, by index in the whole network.
        solved: the owned layers of the solve (`TrainConfig.solved_layers`), ascending, counted from its first as solvers do. They are
            consecutive if the placement is in blocks.
        indices: the same layers' indices in the whole network.
        open, close: owned layers before and after the solve.
        draws: True if pieces draw random numbers in training, which are then frozen within a step.
        stacks: stacked weights of layers, for calls of several layers at once.
        callable: the layers as they are called: compiled, if the settings ask for it.
        advance_together: the function that calls several layers at once, compiled if the layers are.
    """

    def __init__(self, architecture: Architecture, config: TrainConfig, rank: int, device: torch.device) -> None:
        self.architecture, self.config, self.device = architecture, config, device
        self.dtype = PARAMETER_DTYPES[config.dtype]
        self.first, self.last = rank == 0, rank == config.layer_workers - 1
        self.solved = tuple(config.layers_of(rank))
        self.indices = tuple(map(self.index, self.solved))
        self.open = range(config.solved_layers.start) if self.first else range(0)
        self.close = range(config.solved_layers.stop, config.model.layers) if self.last else range(0)
        seed = config.seed
        self.embed = self._place(architecture.build("embed", seed)) if self.first else None
        self.layers = {n: self._place(architecture.build(n, seed)) for n in (*self.open, *self.indices, *self.close)}
        self.head = self._place(architecture.build("head", seed)) if self.last else None
        common = architecture.build("common", seed)
        self.common = None if common is None else self._place(common)
        self.parameters = dict(self._named_parameters())
        self._tie()
        tied = architecture.tied_to.items()
        for name, parameter in self.parameters.items():
            # A tied parameter is trained if any of its names says so: another worker, which knows it by the other, has to agree.
            names = {name, *(other for pair in tied if name in pair for other in pair)}
            parameter.requires_grad_(parameter.requires_grad and any(map(config.model.trains, names)))
        self._recorded: dict[int, State] | None = None
        self.stacks = Stacks(self.layers)
        self._templates: dict[int, dict[str, Tensor]] = {}
        self._splits: dict[int, bool] = {}  # by layer: whether its modules tell which parameters they use; tried out the first times
        self._tries = Counter[int]()  # by layer: how often that has told nothing
        self._modules: dict[int, LayerModules] = {}
        self.callable: Mapping[int, nn.Module] = self.layers
        self.advance_together = advance_together
        self._trains = False
        check_batched(config, architecture)
        # Compiled layers that draw are refused, since `FrozenRandomness` cannot be compiled.
        self.draws = architecture.stochastic is not False and not config.compile
        if config.compile:
            self._compile()

    def index(self, layer: int) -> int:
        """Return the index in the whole network of a layer of the solve, counted from the solve's first."""
        return layer + self.config.solved_layers.start

    def _place(self, module: nn.Module) -> nn.Module:
        return module.to(device=self.device, dtype=self.dtype).eval()

    def _compile(self) -> None:
        # A donated buffer serves one backward pass. Here relaxation, coarse solve and last sweep go through the same graph.
        torch._functorch.config.donated_buffer = False
        self.callable = {n: cast(nn.Module, torch.compile(module)) for n, module in self.layers.items()}
        self.advance_together = torch.compile(advance_together)

    def pieces(self) -> Iterator[tuple[str, str, nn.Module]]:
        """Yield the name ("embed", "layer_00003", "common", "head"), the prefix of parameter names, and the module of each owned piece."""
        architecture = self.architecture
        if self.embed is not None:
            yield "embed", architecture.prefix("embed"), self.embed
        for n, module in self.layers.items():
            yield f"layer_{n:05d}", architecture.prefix(n), module
        if self.common is not None:
            yield "common", architecture.prefix("common"), self.common
        if self.head is not None:
            yield "head", architecture.prefix("head"), self.head

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for _, prefix, module in self.pieces():
            for name, parameter in module.named_parameters():
                yield prefix + name, parameter

    def _tie(self) -> None:
        """Tie the head's parameters to the embedding's.

        Where a worker has both, they become one parameter. A worker that has only the head starts with the embedding's values.
        """
        if not self.last or not self.architecture.tied:
            return
        if self.embed is None:
            embedding = self.architecture.build("embed", self.config.seed).to(self.dtype)
            names = {self.architecture.prefix("embed") + name: value for name, value in embedding.named_parameters()}
            for name, tied in self.architecture.tied:
                self.parameters[tied].data.copy_(names[name].data)
            return
        for name, tied in self.architecture.tied:
            path, _, leaf = tied.removeprefix(self.architecture.prefix("head")).rpartition(".")
            assert self.head is not None
            setattr(self.head.get_submodule(path), leaf, self.parameters[name])
            del self.parameters[tied]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """This worker's parameters that are not frozen, by name."""
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    @property
    def tied(self) -> list[str]:
        """Names of this worker's parameters that are tied to another worker's: the embedding's on the first, the head's on the last."""
        if self.first == self.last:
            return []
        return [pair[1] if self.last else pair[0] for pair in self.architecture.tied]

    @property
    def common_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that every worker holds, by name. Their gradients are summed over workers."""
        prefix = self.architecture.prefix("common")
        return {prefix + name: parameter for name, parameter in self.common.named_parameters()} if self.common is not None else {}

    def is_counted_elsewhere(self, name: str) -> bool:
        """Return True if another worker's copy of this parameter counts in norms and checkpoints, and this one does not."""
        return (self.last and name in self.tied) or (not self.first and name in self.common_parameters)

    def owned(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Yield piece, full name and value of every parameter. A parameter that two pieces share is yielded with the first."""
        for piece, prefix, module in self.pieces():
            for own, _ in module.named_parameters():
                if prefix + own in self.parameters:
                    yield piece, prefix + own, self.parameters[prefix + own]

    def counted(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield the parameters that count in norms, in the network's order, each as (number of its piece, parameter)."""
        places = self.places
        for piece, name, parameter in self.owned():
            if not self.is_counted_elsewhere(name):
                yield places[piece], parameter

    @property
    def places(self) -> dict[str, int]:
        """Numbers of the pieces in the whole network: embedding 0, layer n is n + 1, then the common piece and the head."""
        layers = self.config.model.layers
        return {"embed": 0, "common": layers + 1, "head": layers + 2, **{f"layer_{n:05d}": n + 1 for n in self.layers}}

    def leaves(self, index: int) -> list[nn.Parameter]:
        """Return the trainable parameters that layer `index` uses, the common ones included."""
        return [*(p for p in self.layers[index].parameters() if p.requires_grad), *self.common_leaves]

    def recorded_parts(self, index: int) -> AbstractContextManager[Parts | None]:
        """Return a context in which the parts of layer `index` are recorded, if its parameters' gradients can be formed from them."""
        if self.config.compile or not self._splits.get(index, True):
            return nullcontext()
        if index not in self._modules:
            self._modules[index] = LayerModules(self.layers[index], self.leaves(index))
        return self._modules[index].recorded()

    def form(self, index: int, gradients: DeferredGradients) -> None:
        """Add the gradients of layer `index`'s parameters to `.grad`."""
        known = self._splits.get(index)
        if known is False:
            gradients = replace(gradients, parts=None)  # recorded before another microbatch has shown that they are wrong
        agrees = gradients.form(known_right=known is True)
        if known is None and gradients.parts is not None and gradients.is_finite:
            self._tries[index] += agrees is None
            if agrees is not None or self._tries[index] == MOST_TRIES:  # some gradients may always be zero
                self._splits[index] = agrees is not False

    @property
    def matrices(self) -> list[nn.Parameter]:
        """Trainable weight matrices of this worker's layers, buffer layers included."""
        return [matrix for layer in self.layers.values() for matrix in hidden_matrices(layer) if matrix.requires_grad]

    @property
    def decayed(self) -> set[str]:
        """Names of those parameters of this worker that weight decay applies to."""
        return {prefix + name for _, prefix, module in self.pieces() for name in decayed_weights(module)}

    @property
    def common_leaves(self) -> list[nn.Parameter]:
        """Trainable parameters of the piece that several layers use."""
        return [] if self.common is None else [p for p in self.common.parameters() if p.requires_grad]

    def template(self, index: int) -> dict[str, Tensor]:
        """Return uninitialised tensors with the names and shapes of a layer's parameters. The layer may be another worker's."""
        if index not in self._templates:
            layer = self.architecture.build(index, self.config.seed)
            empty = {name: torch.empty(p.shape, dtype=self.dtype, device=self.device) for name, p in layer.named_parameters()}
            self._templates[index] = empty
        return self._templates[index]

    # Calls of the pieces ------------------------------------------------------------------------------------------------------

    def bind(self, batch: StepBatch) -> "BoundBlock":
        """Return the block as a training step calls it for these samples: in training mode, with the dropout that belongs to them."""
        return BoundBlock(self, batch.step, batch.samples, self.architecture.context(batch.inputs, self.dtype), training=True)

    def bind_for_evaluation(self, inputs: Inputs, *, past: Any = None) -> "BoundBlock":
        """Return the block as it is called for samples with these inputs in evaluation mode.

        Args:
            inputs: the samples' inputs.
            past: in generation, the architecture's cache of the tokens before these (`Architecture.past`).
        """
        remembered = {} if past is None else {"past": past}
        return BoundBlock(self, 0, (), self.architecture.context(inputs, self.dtype, **remembered), training=False)

    @contextmanager
    def recorded_inputs(self) -> Iterator[dict[int, State]]:
        """Within this context, record each layer's latest input for the global batch's first sample. Yields the inputs by layer."""
        found: dict[int, State] = {}
        self._recorded = found
        try:
            yield found
        finally:
            self._recorded = None

    def train(self, training: bool) -> None:
        """Put all pieces into training mode, or into evaluation mode. `BoundBlock` does so itself."""
        if training != self._trains:
            for _, _, module in self.pieces():
                module.train(training)
            self._trains = training

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Within this context, run layers without torch.compile: in generation, every new length would cause a compilation."""
        kept, self.callable = self.callable, self.layers
        try:
            yield
        finally:
            self.callable = kept

    def check_draws(self, inputs: Inputs) -> None:
        """Run the pieces once, on a sample of these inputs, to find what random numbers they draw in training.

        Raises:
            SettingsError: a piece draws numbers that are no function of seed, step, layer and sample, or any where none can be frozen.
        """
        pieces = {"embed": self.embed, **self.layers, "head": self.head}
        owned = {piece: module for piece, module in pieces.items() if module is not None}
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.config.dtype == "bfloat16" else None
        drawing = check_draws(self.architecture, owned, self.common, inputs, self.dtype, autocast)
        check_batched(self.config, self.architecture, drawing)
        self.draws = self.draws or drawing is not None


@dataclass(frozen=True, eq=False)
class BoundBlock:
    """A block bound to certain samples of a step: its pieces are called with the masks and the dropout of these samples.

    Attributes:
        block: the pieces.
        step: number of the training step, which keys random numbers.
        samples: positions of the samples in the global batch, which key random numbers, too; in evaluation none.
        context: what the architecture makes of the samples' inputs, such as masks.
        training: whether the pieces run in training mode.
    """

    block: Block
    step: int
    samples: tuple[int, ...]
    context: Any
    training: bool

    @contextmanager
    def _context(self, piece: object, *, autocast: bool = True) -> Iterator[None]:
        block = self.block
        block.train(self.training)
        with ExitStack() as stack:
            if block.config.dtype == "bfloat16" and autocast:
                stack.enter_context(torch.autocast(block.device.type, torch.bfloat16))
            if self.training and block.draws:
                stack.enter_context(FrozenRandomness((block.config.seed, self.step, piece), self.samples))
            yield

    def layer(self, index: int, state: State, module: nn.Module | None = None) -> State:
        """Return x + Δt·(block(x) − x) for layer `index`; just block(x) if Δt = 1.

        Args:
            module: called as the layer, in place of this worker's own.
        """
        block, size = self.block, self.block.config.step_sizes[index]
        self._record(index, state)
        with self._context(index):
            module = block.callable[index] if module is None else module
            after = block.architecture.advance(index, module, state, self.context, block.common)
        return after if size == 1 else interpolate(state, after, size)

    def layers_together(self, indices: Sequence[int], state: State, weights: Mapping[str, Tensor]) -> State:
        """Return what `layer` returns for several middle layers, in one call.

        Args:
            indices: the layers.
            state: the states of the layers, stacked along dimension 0.
            weights: stacked weights of exactly these layers (`Stack.weights`).
        """
        block, first = self.block, indices[0]
        for place, index in enumerate(indices):
            self._record(index, combine(lambda part, place=place: part[place], state))
        with self._context(first):
            after = block.advance_together(
                block.architecture.advance, first, block.layers[first], dict(weights), state, self.context, block.common
            )
        size = block.config.step_sizes[first]
        return after if size == 1 else interpolate(state, after, size)

    def _record(self, index: int, state: State) -> None:
        recorded = self.block._recorded
        if recorded is not None and self.samples[:1] == (0,):
            recorded[index] = combine(lambda part: part[:1].detach().clone(), state)

    def increment(self, index: int, state: State) -> State:
        """Return block(x) − x, a layer's increment for Δt = 1.

        Computed in the weights' own precision, without autocast, since callers take differences of increments.
        """
        block = self.block
        with self._context(index, autocast=False):
            after = block.architecture.advance(index, block.layers[index], state, self.context, block.common)
        return subtract(after, state)

    def enter(self, inputs: Inputs) -> State:
        """Return the state before the first layer of the solve: embedding, then by MGRIT the opening buffer layers."""
        block = self.block
        assert block.embed is not None
        with self._context("embed"):
            state = block.architecture.enter(block.embed, inputs, self.context)
        for n in block.open:
            state = self.layer(n, state)
        return state

    def leave(self, state: State, *, last_only: bool = False) -> Tensor:
        """Return the outputs from the state after the last layer of the solve: by MGRIT the closing buffer layers, then the head.

        Args:
            last_only: return the output at the last position only.
        """
        block = self.block
        assert block.head is not None
        for n in block.close:
            state = self.layer(n, state)
        if last_only:
            state = block.architecture.last_position(state)
        with self._context("head"):
            return block.architecture.leave(block.head, state, self.context)
