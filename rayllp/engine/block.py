"""One worker's share of the network: its layers, and the embedding or head where it is first or last."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from rayllp.config import TrainConfig
from rayllp.models.base import Architecture
from rayllp.models.randomness import FrozenRandomness
from rayllp.state import State, interpolate

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


class Block:
    """The pieces that worker `rank` of the layer group owns. Only these are ever built.

    Attributes:
        layers: by index in the whole network; the buffers of the first and last worker among them.
        middle: indices of the owned middle layers.
    """

    def __init__(self, architecture: Architecture, config: TrainConfig, rank: int, device: torch.device) -> None:
        self.architecture, self.config, self.device = architecture, config, device
        self.dtype = DTYPES[config.dtype]
        self.first, self.last = rank == 0, rank == config.layer_workers - 1
        start = config.buffers.open + sum(config.blocks[:rank])
        self.middle = range(start, start + config.blocks[rank])
        self.open = range(config.buffers.open) if self.first else range(0)
        self.close = range(config.model.layers - config.buffers.close, config.model.layers) if self.last else range(0)
        seed = config.seed
        self.embed = self._place(architecture.build_embed(seed)) if self.first else None
        self.layers = {n: self._place(architecture.build_layer(seed, n)) for n in (*self.open, *self.middle, *self.close)}
        self.head = self._place(architecture.build_head(seed)) if self.last else None
        self.parameters = dict(self._named_parameters())
        self._tie()
        self._step, self._training = 0, False
        self._samples: tuple[int, ...] = (0,)

    def _place(self, module: nn.Module) -> nn.Module:
        return module.to(device=self.device, dtype=self.dtype).eval()

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        architecture = self.architecture
        pieces = [(architecture.embed_prefix(), self.embed), *((architecture.layer_prefix(n), m) for n, m in self.layers.items())]
        for prefix, module in (*pieces, (architecture.head_prefix(), self.head)):
            for name, parameter in module.named_parameters() if module is not None else ():
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

    # Tied parameters whose two copies are on two workers
    @property
    def shared(self) -> list[str]:
        """Names, in this worker's terms, of tied parameters whose other copy is on another worker."""
        if self.first == self.last:
            return []
        return [pair[1] if self.last else pair[0] for pair in self.architecture.tied]

    # Running ------------------------------------------------------------------------------------------------------------------

    def begin(self, step: int, samples: Iterable[int], *, training: bool) -> None:
        """What follows belongs to this step and these samples of its global batch."""
        self._step, self._samples = step, tuple(samples)
        if training != self._training:
            self._training = training
            for module in (self.embed, *self.layers.values(), self.head):
                if module is not None:
                    module.train(training)

    @contextmanager
    def _context(self, piece: object) -> Iterator[None]:
        with ExitStack() as stack:
            if self.config.dtype == "bfloat16":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self._training and self.architecture.stochastic:
                stack.enter_context(FrozenRandomness((self.config.seed, self._step, piece), self._samples))
            yield

    def layer(self, index: int, state: State) -> State:
        """x + Δt·(block(x) − x); the block as it is where Δt = 1."""
        size = self.config.step_sizes[index]
        with self._context(index):
            after = self.layers[index](state)
        return after if size == 1 else interpolate(state, after, size)

    def enter(self, inputs: Tensor) -> State:
        """Embedding and opening buffers."""
        assert self.embed is not None
        with self._context("embed"):
            state: State = self.embed(inputs)
        for n in self.open:
            state = self.layer(n, state)
        return state

    def leave(self, state: State) -> Tensor:
        """Closing buffers and head: the outputs."""
        assert self.head is not None
        for n in self.close:
            state = self.layer(n, state)
        with self._context("head"):
            return self.head(state)
