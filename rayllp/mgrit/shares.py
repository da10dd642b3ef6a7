"""Who does the arithmetic of a window's sweep: every worker for all rows of the states, or each for its share of them.

A row is what a state has along its last dimension: the values of one token. What is added up and compared between layers is so row by row.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rayllp.channel.base import StateSpec
from rayllp.mgrit.communicator import Communicator
from rayllp.mgrit.placement import Placement, do_nothing, gather, in_order, padded
from rayllp.state import State, combine, like, tensors

EXCHANGE = "exchange"
"""Begins the phase of a sweep's messages."""
IN_PIECES_BYTES = 3 * 2**20
"""If each worker receives so many bytes less in a sweep, the arithmetic is done in pieces, which takes more messages. Where fewer bytes are
saved, the number of messages decides how long it takes.
"""


class Shares(Protocol):
    """One worker's part in the arithmetic of sweeps. All workers call the same methods in the same order.

    A rolling window calls `of_increments`, `summed` and `of_states` for each sweep, after the last one `joined` instead of `of_states`;
    windows of fixed lengths need `of_increments` and `joined`. While states are under way, the worker does what it has to do meanwhile:
    once in each sweep.
    """

    def rows(self, state: State) -> State:
        """Return this worker's rows of a state."""
        ...

    def of_increments(self, layers: Sequence[int], mine: dict[int, State], phase: str) -> list[State]:
        """Return this worker's rows of the increments of all layers, in order.

        Args:
            layers: the window's layers.
            mine: the increments of those that this worker owns, in the same order.
            phase: names the messages in errors.
        """
        ...

    def summed(self, numbers: Tensor, phase: str) -> list[list[float]]:
        """Return sums over all rows, the same on every worker.

        Args:
            numbers: the same over this worker's rows; float64, shape (layers, numbers).
            phase: names the messages in errors.
        """
        ...

    def of_states(self, layers: Sequence[int], states: Sequence[State], phase: str) -> list[State | None]:
        """Return the states of this worker's layers, in the order of the layers; None for layers of others.

        Args:
            layers: at least one.
            states: this worker's rows of the state before each of them.
            phase: names the messages in errors.
        """
        ...

    def joined(self, rows: State, phase: str) -> State:
        """Return the state of which each worker has its rows.

        Args:
            rows: this worker's.
            phase: names the messages in errors.
        """
        ...


def shares_of(
    communicator: Communicator, placement: Placement, spec: StateSpec, length: int, meanwhile: Callable[[], None] = do_nothing,
    *, rolling: bool = False,
) -> Shares:  # fmt: skip
    """Return the way to do it: for small states the number of messages counts, for large ones that of bytes.

    Args:
        communicator: for messages to the other workers.
        placement: which worker owns which layer.
        spec: shapes and dtypes of a state.
        length: number of layers of the longest window.
        meanwhile: what this worker does in each sweep while messages are under way.
        rolling: whether each layer of the window gets a new state after a sweep, or the state behind the window alone is wanted.
    """
    state_bytes = sum(shape.numel() * dtype.itemsize for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True))
    way = Pieces if in_pieces(state_bytes, communicator.channel.size, length, rolling=rolling) else Whole
    return way(communicator, placement, spec, meanwhile)


def in_pieces(state_bytes: float, workers: int, length: int, *, rolling: bool) -> bool:
    """Return True if each of so many workers does the arithmetic of its share of the rows. Arguments as those of `shares_of`.

    A worker receives the increments of all other workers' layers, or a share of the rows of these and of the states that it wants. With two
    workers and a rolling window of two layers, that is as much.
    """
    layers = -(-length // workers)
    wanted = layers if rolling else 1
    return (workers - 1) * (layers - (layers + wanted) / workers) * state_bytes > IN_PIECES_BYTES


class Whole(Shares):
    """Every worker does all of it, after one all-gather of increments."""

    def __init__(self, communicator: Communicator, placement: Placement, spec: StateSpec, meanwhile: Callable[[], None]) -> None:
        self._communicator, self._placement, self._spec, self._meanwhile = communicator, placement, spec, meanwhile

    def rows(self, state: State) -> State:
        return state

    def of_increments(self, layers: Sequence[int], mine: dict[int, State], phase: str) -> list[State]:
        return gather(self._communicator, self._placement, self._spec, layers, mine, phase, self._meanwhile)

    def summed(self, numbers: Tensor, phase: str) -> list[list[float]]:
        return numbers.tolist()

    def of_states(self, layers: Sequence[int], states: Sequence[State], phase: str) -> list[State | None]:
        return [*states]

    def joined(self, rows: State, phase: str) -> State:
        return rows


class Pieces(Shares):
    """Each of P workers does the arithmetic of 1/P of the rows.

    A worker then sends about two states in a sweep, by two exchanges of all with all, instead of P − 1 by one. Between the two all learn,
    from a few numbers of each, which layers are next: so a worker gets the states of its layers and no other. Those numbers are added in
    order of rank, so the sums have the same bits on all workers.
    """

    def __init__(self, communicator: Communicator, placement: Placement, spec: StateSpec, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile
        self._channel, self._tag, self._placement, self._spec = communicator.channel, communicator.tag, placement, spec
        self._rank, self._size = self._channel.rank, self._channel.size
        self._cuts = [_Cut(shape, dtype, self._size) for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)]

    def rows(self, state: State) -> State:
        return like(state, tuple(cut.piece(part, self._rank) for cut, part in self._cut(state)))

    def of_increments(self, layers: Sequence[int], mine: dict[int, State], phase: str) -> list[State]:
        owners, most = self._placement.sharing(layers)
        cut = [cut.pieces(part) for state in padded(mine, self._spec, most) for cut, part in self._cut(state)]
        given = self._exchange([[pieces[worker] for pieces in cut] for worker in range(self._size)], f"{phase}i")
        return in_order(owners, [self._states(parts) for parts in given])

    def summed(self, numbers: Tensor, phase: str) -> list[list[float]]:
        given = self._channel.all_gather(numbers, StateSpec.of(numbers), self._tag.at(f"{phase}n", 0))
        return torch.stack([part for each in given for part in tensors(each)]).sum(0).tolist()

    def of_states(self, layers: Sequence[int], states: Sequence[State], phase: str) -> list[State | None]:
        owners, most = self._placement.sharing(layers)
        leaving = []
        for worker in range(self._size):
            theirs = [state for state, owner in zip(states, owners, strict=True) if owner == worker]
            theirs += [combine(torch.zeros_like, states[0])] * (most - len(theirs))
            leaving.append([part for state in theirs for part in tensors(state)])
        given = self._exchange(leaving, f"{phase}s", self._meanwhile)
        own = map(self._whole, zip(*(self._states(parts) for parts in given), strict=True))
        return [next(own) if owner == self._rank else None for owner in owners]

    def joined(self, rows: State, phase: str) -> State:
        end = self._channel.begin_all_gather(rows, StateSpec.of(rows), self._tag.at(phase, 0))
        self._meanwhile()
        return self._whole(end())

    def _cut(self, state: State) -> Iterator[tuple["_Cut", Tensor]]:
        return zip(self._cuts, tensors(state), strict=True)

    def _states(self, parts: Sequence[Tensor]) -> list[State]:
        """Return the states, or rows of them, whose tensors these are, one state after the other."""
        count = len(self._cuts)
        return [self._spec.build(list(parts[first : first + count])) for first in range(0, len(parts), count)]

    def _whole(self, rows: Sequence[State]) -> State:
        """Return the state whose rows the workers have, in order of rank."""
        pieces = zip(*map(tensors, rows), strict=True)
        return self._spec.build([cut.joined(each) for cut, each in zip(self._cuts, pieces, strict=True)])

    def _exchange(self, parts: Sequence[Sequence[Tensor]], phase: str, meanwhile: Callable[[], None] = do_nothing) -> list[list[Tensor]]:
        """Send tensors to each worker, and return those that each has sent here. All lists are alike but for their values."""
        end = self._channel.begin_all_to_all([torch.cat([_bytes(part) for part in each]) for each in parts], self._tag.at(phase, 0))
        meanwhile()
        found = end()
        likes = parts[self._rank]
        sizes = [part.numel() * part.dtype.itemsize for part in likes]
        # A copy of each, since a tensor of a wider type may not begin at any byte.
        return [
            [piece.clone().view(part.dtype).view(part.shape) for piece, part in zip(message.split(sizes), likes, strict=True)]
            for message in found
        ]


class _Cut:
    """How a tensor of a state is cut into rows, and these into a piece for each worker.

    Args:
        shape, dtype: of the tensor.
        workers: number of pieces.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, workers: int) -> None:
        self._shape, self._workers = shape, workers
        self._width = shape[-1] if shape else 1
        self._rows = shape.numel() // self._width if self._width else 0
        self._length = -(-self._rows // workers)

    def pieces(self, tensor: Tensor) -> Tensor:
        """Return the pieces, the last ones with zeros in place of missing rows; shape (workers, rows, width)."""
        flat = tensor.detach().reshape(self._rows, self._width)
        missing = self._length * self._workers - self._rows
        return torch.nn.functional.pad(flat, (0, 0, 0, missing)).view(self._workers, self._length, self._width)

    def piece(self, tensor: Tensor, worker: int) -> Tensor:
        """Return a copy of one worker's piece; shape (rows, width)."""
        rows = tensor.detach().reshape(self._rows, self._width)[worker * self._length : (worker + 1) * self._length]
        return torch.nn.functional.pad(rows, (0, 0, 0, self._length - len(rows))).clone()

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the tensor from its pieces."""
        return torch.cat(list(pieces))[: self._rows].view(self._shape)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
