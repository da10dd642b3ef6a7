"""Exact solves where neighbouring layers may be on different workers: a state goes from owner to owner, layer after layer."""

from collections.abc import Callable, Iterator, Sequence

from rayllp.channel.base import StateSpec
from rayllp.errors import SettingsError
from rayllp.mgrit.communicator import Communicator
from rayllp.mgrit.propagator import Propagator
from rayllp.state import State


def own_steps(owners: Sequence[int], rank: int, *, source: int, destination: int) -> Iterator[tuple[int, int, int]]:
    """Yield the steps that worker `rank` takes, in order: each one's index, the rank its state comes from and the rank its result goes to.

    Args:
        owners: for each step, the worker that takes it.
        source: the worker that has the first state.
        destination: the worker that is to get the last state.
    """
    route = (source, *owners, destination)
    return ((place, route[place], route[place + 2]) for place, owner in enumerate(owners) if owner == rank)


def relay(
    communicator: Communicator,
    owners: Sequence[int],
    take: Callable[[int, State], State],
    initial: State | None,
    spec: StateSpec,
    phase: str,
    *,
    source: int,
    destination: int,
) -> State | None:
    """Pass a state through all steps, each taken by the worker that owns it.

    Args:
        communicator: for messages to the other workers.
        owners: for each step, the worker that takes it.
        take: takes one of this worker's steps: given its index and the state before it, returns the state after it.
        initial: the first state, on worker `source`.
        spec: shapes and dtypes of a state.
        phase: names the messages in errors.
        source: the worker that has the first state.
        destination: the worker that is to get the last state.

    Returns: the last state, on worker `destination`; None elsewhere.

    Raises:
        SettingsError: no initial state on worker `source`.
        ChannelError: a message did not arrive in time.
    """
    rank, state = communicator.rank, initial
    if rank == source and state is None:
        raise SettingsError(f"worker {rank} is to begin the solve and has no initial state")
    if rank == source != owners[0] and state is not None:
        communicator.send(state, owners[0], phase, 0)
    for place, before, after in own_steps(owners, rank, source=source, destination=destination):
        if before != rank:
            state = communicator.receive(spec, before, phase, 0)
        assert state is not None
        state = take(place, state)
        if after != rank:
            communicator.send(state, after, phase, 0)
    if rank == destination != owners[-1]:
        state = communicator.receive(spec, owners[-1], phase, 0)
    return state if rank == destination else None


def solve_in_order(
    owners: Sequence[int], propagator: Propagator, communicator: Communicator, initial: State | None, spec: StateSpec
) -> State | None:
    """Do the exact forward solve over all layers, from the first worker to the last.

    Args:
        owners: for each layer, the rank of the worker that owns it (`Placement.owners`).
        propagator: the steps of this worker's layers.
        communicator: for messages to the other workers.
        initial: the state before the first layer, on the first worker.
        spec: shapes and dtypes of a state.

    Returns: the state after the last layer, on the last worker of the channel; None elsewhere.
    """
    channel = communicator.channel

    def take(layer: int, state: State) -> State:
        if layer:
            channel.finish()  # does not wait: the state just received was computed from all that this worker has sent
        return propagator.step(layer, state)

    return relay(communicator, owners, take, initial, spec, "in order", source=0, destination=channel.size - 1)
