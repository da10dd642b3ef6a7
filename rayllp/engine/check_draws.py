"""Checks before training which random numbers the network's pieces draw, by running each on one sample.

Inside `FrozenRandomness` nearly everything that a layer draws is a function of (seed, step, layer, sample). What cannot be is refused here,
with its name: numbers from a generator that PyTorch's operators do not use (Python's, numpy's, a CUDA kernel's own), numbers whose
dimension 0 is not the batch, and numbers drawn in the backward pass.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from rayllp.data.base import Inputs
from rayllp.engine.vmapped_layers import kind
from rayllp.errors import SettingsError
from rayllp.keys import key
from rayllp.models.base import Architecture
from rayllp.models.randomness import FrozenRandomness, UnkeyedDrawError, seeded
from rayllp.state import State, combine, squared_norm, subtract, tensors

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
"""How far a sample's state may differ, relative to its norm, when others are in the batch: rounding depends on a matrix product's size."""
AUTOCAST_TOLERANCE = 0.03
"""The same limit where pieces run under autocast."""
DRAW_TOLERANCE = 0.05
"""How far it may differ in any case, relative to the difference that other random numbers make."""


def check_draws(
    architecture: Architecture,
    pieces: Mapping[int | str, nn.Module],
    common: nn.Module | None,
    inputs: Inputs,
    dtype: torch.dtype,
    autocast: AbstractContextManager[object] | None = None,
) -> str | None:
    """Run each kind of piece once in training mode, and those that draw random numbers a few times more.

    Args:
        architecture: says how pieces are called.
        pieces: the modules, by the layer's index, or "embed" and "head".
        common: the piece that several layers use, if there is one.
        inputs: inputs of a batch; the first sample is used.
        dtype: dtype of the weights.
        autocast: context in which pieces run; None if they run in their weights' dtype.

    Returns: the first piece that draws, with the module and the operator; None if none does.

    Raises:
        SettingsError: a piece draws numbers that are no function of seed, step, layer and sample.
    """
    one = combine(lambda part: part[:1], inputs)
    state = _some_state(architecture, one, dtype)
    kinds, first = set(), None
    for piece, module in pieces.items():
        if (of := kind(module)) in kinds:
            continue
        kinds.add(of)

        def call(state: State, inputs: Inputs, piece: int | str = piece, module: nn.Module = module) -> State:
            """Call the piece as its worker does."""
            context = architecture.context(inputs, dtype)
            if piece == "embed":
                return architecture.enter(module, inputs, context)
            if piece == "head":
                return architecture.leave(module, state, context)
            return architecture.advance(int(piece), module, state, context, common)

        name = f"layer {piece}" if isinstance(piece, int) else f"the {piece}"
        # `seeded` holds the lock on the default generator, so that other workers' threads do not draw from it meanwhile.
        with seeded("check draws"), _training(module), autocast or nullcontext():
            found = _Trial(name, module, call, state, one, AUTOCAST_TOLERANCE if autocast else TOLERANCES[dtype]).run()
        first = first or found
    return first


class _Trial:
    """Test runs of one piece, on one sample and on copies of it."""

    def __init__(
        self, name: str, module: nn.Module, call: Callable[[State, Inputs], State], state: State, inputs: Inputs, rounding: float
    ) -> None:
        self.name, self.module, self.call, self.state, self.inputs, self.rounding = name, module, call, state, inputs, rounding
        self.inside: list[str] = []
        self.drawn: list[str] = []

    def run(self) -> str | None:
        """Return the module and operator of the piece's first draw; None if it draws nothing.

        Raises:
            SettingsError: the piece draws numbers that cannot be frozen.
        """
        with self._following():
            with torch.no_grad():
                alone, moved = self._call()
            if moved:
                moved &= self._call()[1] & self._call()[1]  # once, it may have been another thread
            if moved:
                raise self._refusal(f"it draws from {' and '.join(sorted(moved))}: draw by PyTorch's operators")
            if not self.drawn:
                return None
            self._check_rows(alone)
            self._check_backward()
        return f"{self.name}: {self.drawn[0]}"

    def _call(self, samples: tuple[int, ...] = (0,), state: State | None = None) -> tuple[State, set[str]]:
        """Return the outputs for copies of the sample, and the names of the generators that were used.

        Args:
            samples: the key of each copy.
            state: the state to start from; None: the trial's own.
        """
        several, inputs = (
            combine(lambda part: torch.cat([part] * len(samples)), whole) for whole in (self.state if state is None else state, self.inputs)
        )
        device = tensors(inputs)[0].device
        before = _generators(device)
        self.inside.clear()
        try:
            with FrozenRandomness(("check draws",), samples, self._on_draw):
                found = self.call(several, inputs)
        except UnkeyedDrawError as error:
            raise self._refusal(f"{self._place()}: {error}") from None
        return found, {name for name, now in _generators(device).items() if now != before[name]}

    def _check_rows(self, alone: State) -> None:
        """Check that what is drawn for a sample does not depend on the others in the batch.

        Two copies of a sample with one key have to give what one alone gives.
        """
        with torch.no_grad():
            again, other, twice = self._call()[0], self._call((1,))[0], self._call((0, 0))[0]
        most = max(DRAW_TOLERANCE * _distance(other, alone), self.rounding * float(squared_norm(alone)) ** 0.5)
        rows = [combine(lambda part, row=row: part[row : row + 1], twice) for row in (0, 1)]
        if any(not _distance(state, alone) <= most for state in (again, *rows)):
            raise self._refusal(
                f"{self.drawn[0]} draws for a sample what depends on the others in the batch; dimension 0 of what is drawn must be the "
                "batch (batch_first=True)"
            )

    def _check_backward(self) -> None:
        """Check that the backward pass draws nothing."""

        def refuse(name: str) -> None:
            """Refuse any draw."""
            raise UnkeyedDrawError(name)

        leaf = combine(lambda part: part.clone().requires_grad_(part.is_floating_point()), self.state)
        with torch.enable_grad():
            outputs = [part for part in tensors(self._call(state=leaf)[0]) if part.requires_grad]
        wanted = [part for part in (*tensors(leaf), *self.module.parameters()) if part.requires_grad]
        try:
            with suppress(RuntimeError), FrozenRandomness((), (0,), refuse):
                torch.autograd.grad(outputs, wanted, [torch.ones_like(part) for part in outputs], allow_unused=True)
        except UnkeyedDrawError:
            raise self._refusal(
                f"{self.drawn[0]} draws again in the backward pass, by other numbers: take activation checkpointing out of the layer, and "
                "set recompute=true instead"
            ) from None

    # Names in errors ----------------------------------------------------------------------------------------------------------------

    def _on_draw(self, operator: str) -> None:
        """Keep the name of a draw: the module that is running, and the operator."""
        self.drawn.append(f"{self._place()}, by {operator}")

    def _place(self) -> str:
        """Return the path and class of the module that is running."""
        path = self.inside[-1] if self.inside else ""
        return f"{path or 'the module itself'} ({type(self.module.get_submodule(path)).__name__})"

    def _refusal(self, why: str) -> SettingsError:
        return SettingsError(
            f"{self.name} draws random numbers that would not be the same in every sweep of a step, for any workers: {why}"
        )

    @contextmanager
    def _following(self) -> Iterator[None]:
        """Keep `inside`, the paths of the modules that are running, up to date. Restores the module's buffers at the end."""

        def leave(*_: Any) -> None:
            """Remove a module that has ended."""
            self.inside.pop()

        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        handles = []
        for path, module in self.module.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: self.inside.append(path)))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for name, buffer in self.module.named_buffers():
                    buffer.copy_(buffers[name])


def _some_state(architecture: Architecture, inputs: Inputs, dtype: torch.dtype) -> State:
    """Return a random state of the right shapes, the same in every call."""
    device = tensors(inputs)[0].device
    generator = torch.Generator().manual_seed(key("check draws"))
    spec = architecture.state_spec(inputs, dtype, device)
    parts = [torch.randn(shape, generator=generator) for shape in spec.shapes]
    return spec.build([part.to(device, dtype) for part, dtype in zip(parts, spec.dtypes, strict=True)])


def _distance(x: State, y: State) -> float:
    return float(squared_norm(subtract(x, y))) ** 0.5


def _generators(device: torch.device) -> dict[str, object]:
    """Return the states of all random generators of the process, by name."""
    states: dict[str, object] = {
        "torch's default generator": _bytes(torch.get_rng_state()),
        "Python's random": random.getstate(),
        "numpy.random": [_bytes(part) for part in np.random.get_state(legacy=True)],
    }
    if device.type == "cuda":
        states["the GPU's default generator"] = _bytes(torch.cuda.get_rng_state(device))
    return states


def _bytes(state: Any) -> bytes:
    return np.asarray(state).tobytes()


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    was = module.training
    module.train()
    try:
        yield
    finally:
        module.train(was)
