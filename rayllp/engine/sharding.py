"""The optimizer's state sharded over replicas: each keeps the state of some parameters and updates these (ZeRO stage 1, arXiv:1910.02054).

AdamW works element by element, so its parameters may be cut anywhere to make shares equal. Muon and Adafactor need whole matrices.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from rayllp.channel.base import Channel, MessageTag, StateSpec

ALIGNED = 16
"""Parameters are cut at multiples of this many numbers, so that vector instructions give the same results as without a cut, bit for bit."""
CALL_NUMBERS = 2**19
"""The most numbers of each replica in one all-gather, which needs memory for as many from every replica."""

Shares = list[dict[str, range]]
"""For each replica, its part of each parameter by name, as a range of the flattened parameter's numbers."""
Segment = tuple[str, int, int]
"""A parameter's name, its first number, and the one after its last, in the flattened parameter."""


def share_out(parameters: Mapping[str, nn.Parameter], whole: Collection[str], replicas: int) -> Shares:
    """Divide the parameters among replicas so that all keep equally much of the optimizer's state.

    Args:
        parameters: the parameters by name.
        whole: names of parameters that must not be cut: Muon's matrices, or all of Adafactor's.
        replicas: number of replicas.
    """
    sizes = {name: p.numel() for name, p in parameters.items()}
    if replicas == 1:
        return [{name: range(size) for name, size in sizes.items()}]
    shares: Shares = [{} for _ in range(replicas)]
    loads = [0] * replicas
    for name in sorted(whole, key=lambda name: -sizes[name]):
        lightest = loads.index(min(loads))
        shares[lightest][name] = range(sizes[name])
        loads[lightest] += sizes[name]
    cut = [name for name in sizes if name not in whole]
    ends = _ends(loads, sum(sizes[name] for name in cut))
    done = replica = 0
    for name in cut:
        start = 0
        while start < sizes[name]:
            while replica < replicas - 1 and done + start >= ends[replica]:
                replica += 1
            stop = sizes[name] if replica == replicas - 1 else min(sizes[name], -(-(ends[replica] - done) // ALIGNED) * ALIGNED)
            shares[replica][name] = range(start, stop)
            start = stop
        done += sizes[name]
    return shares


def _ends(loads: Sequence[int], numbers: int) -> list[int]:
    """Return where each replica's share ends in the `numbers` numbers of all parameters that may be cut, one parameter after the other.

    A replica with more of Muon's numbers gets fewer others. Muon keeps one average for each number, AdamW two.
    """
    level = (sum(loads) + 2 * numbers) / len(loads)
    rooms = [max(0.0, level - load) for load in loads]
    ends, filled = [], 0.0
    for room in rooms:
        filled += room
        ends.append(round(numbers * filled / sum(rooms)) if filled else 0)
    return ends


def gather_parameters(parameters: Mapping[str, nn.Parameter], shares: Shares, replicas: Channel, step: int) -> None:
    """Receive each replica's share of the parameters from that replica, which has updated it."""
    tag = MessageTag(step, "update", "parameters of replicas")
    flat = {name: p.data.view(-1) for name, p in parameters.items()}
    for segments in _calls(shares):
        length = max(sum(stop - start for _, start, stop in mine) for mine in segments)
        own = torch.cat([flat[name][start:stop] for name, start, stop in segments[replicas.rank]] or [_nothing(flat)])
        given = torch.nn.functional.pad(own, (0, length - len(own)))
        found = replicas.all_gather(given, StateSpec.of(given), tag)
        for rank, (theirs, values) in enumerate(zip(segments, found, strict=True)):
            assert isinstance(values, Tensor)
            if rank != replicas.rank and theirs:
                sizes = [stop - start for _, start, stop in theirs]
                parts = values[: sum(sizes)].split(sizes)
                torch._foreach_copy_([flat[name][start:stop] for name, start, stop in theirs], parts)


def _nothing(flat: Mapping[str, Tensor]) -> Tensor:
    """Return an empty tensor of the parameters' dtype."""
    return next(iter(flat.values()))[:0]


def _calls(shares: Shares) -> Iterator[tuple[list[Segment], ...]]:
    """Yield the shares in calls: for each replica, the segments that it sends in one all-gather."""
    return zip_longest(*(_pieces(share) for share in shares), fillvalue=[])


def _pieces(share: Mapping[str, range]) -> Iterator[list[Segment]]:
    """Yield a share in pieces of CALL_NUMBERS numbers."""
    piece: list[Segment] = []
    room = CALL_NUMBERS
    for name, part in share.items():
        start = part.start
        while start < part.stop:
            stop = min(part.stop, start + room)
            piece.append((name, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield piece
                piece, room = [], CALL_NUMBERS
    if piece:
        yield piece
