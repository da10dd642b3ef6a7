"""Conversion of weights from and to TorchBraid's files. With the same modules this gives the same network.

TorchBraid's examples (github.com/Multilevel-NN/torchbraid) build their networks in one way: an opening and a closing module on rank 0, and
between them a `LayerParallel` of equal steps x + dt·F(x). Each rank saves the `state_dict` of its part, and `saveSerialNet` makes a
`SerialNet` of the whole network. Both are read by parameter names, so any of these networks becomes a `LayerStack` of the same modules.

    weights = TorchBraidWeights.read(["rank0.pt", "rank1.pt"])
    model = weights.stack(embed=OpenLayer(...), step=lambda: StepLayer(...), head=CloseLayer(...), loss=my_loss, dt=Tf / N)
    rayllp.train(config, model=model, batches=batches)              # with step.middle = Tf / N
    TorchBraidWeights.of_run("runs/mine").write("serial.pt")        # state_dict of a SerialNet; workers=4 writes one file per rank
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from rayllp.checkpoint.location import Folder, checkpoint_folder
from rayllp.checkpoint.store import find_checkpoint
from rayllp.config import load_run_config, torchbraid_blocks
from rayllp.errors import CheckpointError
from rayllp.models.stack import LayerStack

State = dict[str, Tensor]
PARALLEL, SERIAL = "parallel_nn.", "serial_nn."
LAYERS = "local_layers."
WRAPPERS = ("model_state", "model_state_dict", "state_dict")
"""Keys under which TorchBraid's scripts store a state_dict among other things."""


class Step(nn.Module):
    """A step of TorchBraid, x + dt·F(x), as a residual layer.

    Args:
        step: F; or, if it takes dt as its second argument, the whole step x -> x + dt·F(x, dt).
        dt: step size on TorchBraid's finest level, Tf / N; `step.middle` must have the same value.
    """

    def __init__(self, step: nn.Module, dt: float = 1.0) -> None:
        super().__init__()
        self.step, self.dt = step, dt
        self._takes_dt = len(inspect.signature(step.forward).parameters) > 1

    def forward(self, x: Tensor) -> Tensor:
        """Return x + F(x), the layer for Δt = 1."""
        stepped: Tensor = x + ((self.step(x, self.dt) - x) / self.dt if self._takes_dt else self.step(x))
        return stepped


@dataclass(frozen=True)
class TorchBraidWeights:
    """All weights of one network.

    Attributes:
        ends: parameters of the opening and closing modules, by full names ("open_nn.…", "close_nn.…").
        layers: for each step, its parameters by their names in the step's module.
    """

    ends: State
    layers: list[State] = field(default_factory=list)

    # From TorchBraid ------------------------------------------------------------------------------------------------------------

    @staticmethod
    def read(paths: str | Path | Sequence[str | Path]) -> "TorchBraidWeights":
        """Read the files of all ranks in the order of ranks, or the one file of a SerialNet's state_dict.

        Raises:
            CheckpointError: a file cannot be read, contains a whole pickled module, or has names that are not TorchBraid's.
        """
        files = [paths] if isinstance(paths, str | Path) else list(paths)
        return TorchBraidWeights.of([_read(Path(path)) for path in files])

    @staticmethod
    def of(states: Sequence[Mapping[str, Tensor]]) -> "TorchBraidWeights":
        """Return the weights in the state_dicts of all ranks, or of a SerialNet.

        Raises:
            CheckpointError: names are not TorchBraid's.
        """
        ends: State = {}
        layers: list[State] = []
        for rank, state in enumerate(states):
            layers_of_rank: dict[int, State] = {}
            for name, value in state.items():
                if not name.startswith((PARALLEL, SERIAL)):
                    ends[name] = value
                    continue
                layer, _, own = name.removeprefix(SERIAL).removeprefix(PARALLEL).removeprefix(LAYERS).partition(".")
                own = own.removeprefix("layer.").removeprefix("layer." if name.startswith(SERIAL) else "")
                if not layer.isdigit():
                    raise CheckpointError(f"rank {rank}: {name} is no layer's: give the state_dict of a ParallelNet or a SerialNet")
                layers_of_rank.setdefault(int(layer), {})[own] = value
            if sorted(layers_of_rank) != list(range(len(layers_of_rank))):
                raise CheckpointError(f"rank {rank} has layers {sorted(layers_of_rank)}, which leave some out: give the whole state_dict")
            layers += [layers_of_rank[layer] for layer in sorted(layers_of_rank)]
        if not layers:
            raise CheckpointError(f"no name begins with {PARALLEL} or {SERIAL}: give the state_dict of a ParallelNet or a SerialNet")
        if len({tuple(sorted(layer)) for layer in layers}) > 1:
            raise CheckpointError("layers have unlike parameters: give the files of all ranks of one network, in the order of the ranks")
        return TorchBraidWeights(ends, layers)

    def stack(
        self,
        *,
        embed: nn.Module,
        step: Callable[[], nn.Module],
        head: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        dt: float = 1.0,
        **options: Any,
    ) -> LayerStack:
        """Build a network of TorchBraid's own modules, which starts with these weights.

        Args:
            embed: the opening module.
            step: builds the module of one step.
            head: the closing module.
            loss: the loss of outputs and targets, summed over samples.
            dt: as in `Step`.
            options: further arguments of `LayerStack`.

        Raises:
            CheckpointError: the modules have other parameters.
        """
        for module, state in ((embed, self._end("open")), (head, self._end("close"))):
            _fill(module, state)
        layers = [partial(_layer, step, state, dt) for state in self.layers]
        layers[0]()  # find out now, not in a worker, whether the weights fit
        return LayerStack(embed=embed, layers=layers, head=head, loss=loss, **options)

    def _end(self, which: str) -> State:
        return {name.partition(".")[2]: value for name, value in self.ends.items() if name.startswith(which)}

    # To TorchBraid --------------------------------------------------------------------------------------------------------------

    @staticmethod
    def of_run(run: str | Path, step: int | None = None) -> "TorchBraidWeights":
        """Return the weights in a checkpoint of a run whose model `stack` has built: parameters only, no buffers.

        Args:
            step: step of the checkpoint; None: the latest.

        Raises:
            CheckpointError: there is no such checkpoint, or it is of another model.
        """
        run = Path(run)
        folder = find_checkpoint(run, checkpoint_folder(run, load_run_config(run).checkpoint.path), step)
        files: list[Folder] = sorted(folder.glob("*.safetensors"), key=str)
        pieces = {path.stem: _weights(path.read_bytes()) for path in files}
        layers = [
            {name.partition(".step.")[2]: value for name, value in pieces[piece].items()}
            for piece in sorted(pieces)
            if piece.startswith("layer_")
        ]
        if not layers or any("" in layer for layer in layers):
            raise CheckpointError(f"{folder} is not of a model that TorchBraidWeights.stack made: its layers are no steps")
        ends = {
            f"{end}.{name.partition('.')[2]}": value
            for piece, end in (("embed", "open_nn"), ("head", "close_nn"))
            for name, value in pieces.get(piece, {}).items()
        }
        return TorchBraidWeights(ends, layers)

    def states(self, workers: int | None = None) -> list[State]:
        """Return a state_dict for each rank, with layers distributed as TorchBraid distributes them.

        Args:
            workers: number of ranks; None: return one state_dict, that of a SerialNet.

        Raises:
            CheckpointError: TorchBraid cannot distribute the layers over this number of ranks.
        """
        if workers is None:
            return [self.ends | {f"{SERIAL}{n}.layer.layer.{name}": value for n, name, value in _numbered(self.layers)}]
        if len(self.layers) % workers:
            raise CheckpointError(f"TorchBraid needs the same number of layers on each rank: {len(self.layers)} do not divide by {workers}")
        states, start = [], 0
        for rank, count in enumerate(torchbraid_blocks(len(self.layers), workers)):
            own = _numbered(self.layers[start : start + count])
            layers = {f"{PARALLEL}{LAYERS}{n}.layer.{name}": value for n, name, value in own}
            states.append((self.ends if rank == 0 else {}) | layers)
            start += count
        return states

    def write(self, path: str | Path, workers: int | None = None) -> list[Path]:
        """Write the state_dicts to files, and return their paths.

        Args:
            path: file to write. With `workers` there is one per rank: "serial.pt" becomes "serial_rank0.pt" and so on.
            workers: as for `states`.
        """
        target = Path(path)
        states = self.states(workers)
        paths = [target] if workers is None else [target.with_stem(f"{target.stem}_rank{rank}") for rank in range(workers)]
        for each, state in zip(paths, states, strict=True):
            torch.save(state, each)
        return paths


def _numbered(layers: Iterable[State]) -> list[tuple[int, str, Tensor]]:
    return [(n, name, value) for n, layer in enumerate(layers) for name, value in layer.items()]


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors alone ({str(error).splitlines()[0]}). saveSerialNet writes a whole pickled module, which is "
            "a program and is not run here: load it where you trust it, and save its state_dict()"
        ) from error
    for name in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state_dict, nor one under {', '.join(WRAPPERS)}")
    return state


def _fill(module: nn.Module, state: State) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{type(module).__name__} is not the module that these weights are of: {error}") from error


def _layer(step: Callable[[], nn.Module], state: State, dt: float) -> Step:
    module = step()
    _fill(module, state)
    return Step(module, dt)


def _weights(data: bytes) -> State:
    """Return the parameters in a piece of a checkpoint, given the content of its file."""
    return {name.removeprefix("weight/"): value for name, value in load(data).items() if name.startswith("weight/")}
