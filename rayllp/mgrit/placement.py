"""Which worker owns which layer where workers take layers in turn, and the exchange of what they have computed for theirs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from rayllp.channel.base import StateSpec
from rayllp.errors import SettingsError
from rayllp.mgrit.communicator import Communicator
from rayllp.state import State

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """Assignment of layers to workers.

    Attributes:
        owners: the rank of the worker that owns each layer, in the order of the network.
    """

    owners: tuple[int, ...]

    @staticmethod
    def cyclic(layers: int, workers: int) -> "Placement":
        """Return the placement with layer n on worker n mod P, where any P neighbouring layers are on P different workers.

        Raises:
            SettingsError: fewer layers than workers, or no worker.
        """
        if not 1 <= workers <= layers:
            raise SettingsError(f"{layers} layers on {workers} workers: each worker needs at least one layer")
        return Placement(tuple(layer % workers for layer in range(layers)))

    def owned(self, rank: int) -> tuple[int, ...]:
        """Return the layers that worker `rank` owns, in ascending order."""
        return tuple(layer for layer, owner in enumerate(self.owners) if owner == rank)

    def sharing(self, layers: Iterable[int]) -> tuple[list[int], int]:
        """Return the owner of each of these layers, and how many of them one worker owns at most."""
        owners = [self.owners[layer] for layer in layers]
        return owners, max(map(owners.count, owners))

    def windows(self, lengths: Sequence[int]) -> list[range]:
        """Return the network's layers cut into windows of these lengths.

        Raises:
            SettingsError: a window without layers, or lengths that do not add up to the number of layers.
        """
        if min(lengths, default=0) < 1 or sum(lengths) != len(self.owners):
            given = ", ".join(map(str, lengths)) or "no window"
            raise SettingsError(f"windows of {given} layers: each must have at least 1, all together {len(self.owners)}")
        return [range(stop - length, stop) for length, stop in zip(lengths, accumulate(lengths), strict=True)]


def do_nothing() -> None:
    """Wait for messages, and do nothing else meanwhile."""


def gather(
    communicator: Communicator, placement: Placement, spec: StateSpec, layers: Sequence[int], mine: dict[int, State], phase: str,
    meanwhile: Callable[[], None] = do_nothing,
) -> list[State]:  # fmt: skip
    """Return the increments of all these layers, in order. Summed in that order they give the same bits for any number of workers.

    A worker with fewer of these layers than others also sends zeros, since all workers take part in every all-gather.

    Args:
        communicator: for messages to the other workers.
        placement: which worker owns which layer.
        spec: shapes and dtypes of an increment.
        layers: the layers, in the order in which a solve takes them.
        mine: the increments of those that this worker owns, in the same order.
        phase: names the messages in errors.
        meanwhile: what this worker does while the messages are under way.

    Raises:
        ChannelError: an increment did not come within the time limit, or a worker is gone.
    """
    channel, tag = communicator.channel, communicator.tag
    if channel.size == 1:
        meanwhile()
        return [mine[layer] for layer in layers]
    owners, most = placement.sharing(layers)
    ends = [channel.begin_all_gather(state, spec, tag.at(phase, place)) for place, state in enumerate(padded(mine, spec, most))]
    meanwhile()
    return in_order(owners, list(zip(*(end() for end in ends), strict=True)))


def padded(mine: dict[int, State], spec: StateSpec, count: int) -> list[State]:
    """Return a worker's increments, with zeros after them, so that there are `count`."""
    return [*mine.values(), *(spec.zeros() for _ in range(count - len(mine)))]


def in_order(owners: Sequence[int], given: Sequence[Iterable[T]]) -> list[T]:
    """Return for each layer the next of what its owner has given, which is in the order of the layers; what is left over is padding."""
    left = [iter(each) for each in given]
    return [next(left[owner]) for owner in owners]
