"""TorchBraid's solver in place of rayllp's, with the same layers, weights, batches and optimizer: for comparisons, and for its users.

TorchBraid (github.com/Multilevel-NN/torchbraid) wraps XBraid. It is installed as its README says, and imported only on use. Only the two
apps that XBraid drives are used, forward and backward, as TorchBraid's `LayerParallel` sets them up. What that module does around them (it
moves the output to rank 0 and back) is left out, since here the last worker has the head.
"""

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rayllp.channel.base import Channel
from rayllp.channel.mpi import MPIChannel
from rayllp.config import TrainConfig
from rayllp.control import Accuracy
from rayllp.engine.block import Block, BoundBlock
from rayllp.errors import ChannelError, SettingsError
from rayllp.state import State, interpolate

INSTALL = "install TorchBraid as its README says (github.com/Multilevel-NN/torchbraid), for this Python and this MPI, or set solver: mgrit"


def check_installed(config: TrainConfig) -> None:
    """Refuse `solver: torchbraid` where TorchBraid is missing.

    Raises:
        SettingsError: TorchBraid is missing.
    """
    if config.solver == "torchbraid" and find_spec("torchbraid") is None:
        raise SettingsError(f"solver: torchbraid, but there is no such module here: {INSTALL}")


class _Step(nn.Module):
    """A layer in the form that TorchBraid calls: a step over `dt` layers, x + dt·(Φ(x) − x)."""

    def __init__(self, layer: nn.Module, run: Callable[[Tensor], State]) -> None:
        super().__init__()
        self.layer, self._run = layer, run

    def forward(self, x: Tensor, dt: float) -> Tensor:
        after = self._run(x)
        found = after if dt == 1 else interpolate(x, after, dt)
        assert isinstance(found, Tensor)
        return found


class _Noticing(types.SimpleNamespace):
    """Replaces `traceback` in TorchBraid's modules, which print exceptions and continue with wrong numbers, to keep the exceptions."""

    def __init__(self) -> None:
        super().__init__()
        self.noticed: list[BaseException] = []

    def print_exc(self, *_: Any) -> None:
        self.format_exc()

    def format_exc(self, *_: Any) -> str:
        error = sys.exc_info()[1]
        if error is not None:
            self.noticed.append(error)
        return repr(error)


class TorchBraidSolver:
    """One worker's end of TorchBraid, over the communicator of its channel.

    Args:
        block: this worker's layers.
        channel: the channel of the layer group, an `MPIChannel`.
        config: the settings of the run.

    Raises:
        SettingsError: TorchBraid is missing, the channel is another one, or layers share weights.
    """

    def __init__(self, block: Block, channel: Channel, config: TrainConfig) -> None:
        if not isinstance(channel, MPIChannel):
            raise SettingsError(f"solver: torchbraid talks by MPI, not by a {type(channel).__name__}: set channel: mpi")
        if block.common is not None:
            raise SettingsError(
                "solver: torchbraid wants layers with weights of their own, and this network has common ones: set solver: mgrit"
            )
        try:
            from torchbraid import odenet_apps, torchbraid_app
            from torchbraid.layer_parallel import LayerParallel
        except ImportError as error:
            raise SettingsError(f"solver: torchbraid cannot be loaded ({error}): {INSTALL}") from error
        self.block, self.channel, N = block, channel, config.middle_layers
        self._noticing = _Noticing()
        for module in (odenet_apps, torchbraid_app):
            module.traceback = self._noticing
        steps = [partial(self._step, block.index(n)) for n in range(N)]
        levels, c = config.mgrit.levels, config.mgrit.coarsening
        self.solver = LayerParallel(
            channel.comm.Dup(), steps, [1] * N, float(N), max_fwd_levels=levels.forward, max_bwd_levels=levels.backward, max_iters=1
        )
        solver, relaxation = self.solver, config.mgrit.relaxation
        solver.setPrintLevel(0)
        solver.setSkipDowncycle(config.mgrit.initial_guess == "coarse")
        solver.setCFactor(c if isinstance(c, int) else dict(enumerate((*c, *(c[-1:] * levels.forward))[: max(levels.forward, 1)])))
        coarse, fine = (int(kind == "FCF") for kind in (relaxation.coarse, relaxation.fine))
        solver.setNumRelax(coarse)
        solver.setNumRelax(fine, level=0)
        for app in (solver.fwd_app, solver.bwd_app):
            app.setDevice(block.device)
            app.trainNetwork()

    def _step(self, index: int) -> _Step:
        """Return layer `index`: this worker's own, or memory for a neighbour's layer.

        TorchBraid sends a neighbour's weights if its coarse grid needs them.
        """
        mine = self.block.layers.get(index)
        if mine is None:
            layer = self.block.architecture.build(index, self.block.config.seed)
            mine = layer.to(device=self.block.device, dtype=self.block.dtype)
        return _Step(mine, lambda x: self.bound.layer(index, x, mine))

    @contextmanager
    def _surfaced(self, what: str) -> Iterator[None]:
        """Turn an exception that TorchBraid swallows in this context into a ChannelError.

        If a worker is lost meanwhile, this process ends, since XBraid's waits have no time limit.
        """
        self._noticing.noticed.clear()
        with self.channel.exit_on_loss():
            yield
        if self._noticing.noticed:
            raise ChannelError(f"TorchBraid's {what} solve failed: {self._noticing.noticed[0]!r}") from self._noticing.noticed[0]

    def forward(self, bound: BoundBlock, initial: State | None, like: Tensor, accuracy: Accuracy) -> Tensor | None:
        """Do the forward solve.

        Args:
            bound: this worker's layers, bound to the samples; the adjoint solve uses them, too.
            initial: the state before the first step, on the first worker.
            like: a tensor of a state's shape and dtype.
            accuracy: says how many iterations to do.

        Returns: the state after the last step, on the last worker; None elsewhere.
        """
        solver, self.bound = self.solver, bound
        solver.setFwdMaxIters(accuracy.iterations_forward)
        solver.setBwdMaxIters(accuracy.iterations_backward)
        app = solver.fwd_app
        shapes = [like.shape] * (self.block.config.middle_layers + 1)
        for each in (app, solver.bwd_app):
            if each.getShape() != shapes:
                each.setShape(shapes)
        app.backpropped.clear()
        with self._surfaced("forward"), torch.no_grad():
            output = app.run(initial if initial is not None else torch.zeros_like(like), [], {})
        return output if self.block.last else None

    def adjoint(self, seed: State | None) -> Tensor | None:
        """Do the adjoint solve, and add the gradients of this worker's layers to `.grad`.

        Args:
            seed: λ_N, on the last worker.

        Returns: λ_0, on the first worker; None elsewhere.
        """
        layers = [list(layer.parameters()) for layer in self.solver.layer_models]
        before = [[p.grad for p in parameters] for parameters in layers]
        for parameters in layers:
            for p in parameters:
                p.grad = None
        app = self.solver.bwd_app
        with self._surfaced("adjoint"):
            found = app.run(seed, [], {})
        for parameters, earlier, gradients in zip(layers, before, app.grads, strict=True):
            for p, old, new in zip(parameters, earlier, gradients, strict=True):
                p.grad = new if old is None else old if new is None else old.add_(new)
        app.grads = []
        self.solver.fwd_app.backpropped.clear()
        return found if self.block.first else None
