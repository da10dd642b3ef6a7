"""Which replica keeps the optimizer's state of which parameters, and updates these: the first stage of ZeRO (arXiv:1910.02054).

AdamW works element by element, so its parameters are cut where shares come out equal; Muon needs a matrix as a whole.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from rayllp.channel.base import Channel, MessageTag, StateSpec

ALIGNED = 16
"""Cuts are at multiples of so many numbers: vector instructions then treat every number as they would without a cut, to the last bit."""
CALL_NUMBERS = 2**19
"""The most that a replica gives in one all-gather, which needs memory for as many of every replica."""

Shares = list[dict[str, range]]
"""Of each replica, by a parameter's name, the part of it that is the replica's, in numbers of the flattened parameter."""
Segment = tuple[str, int, int]
"""A parameter's name, and the first number and the one after the last."""


def share_out(parameters: Mapping[str, nn.Parameter], whole: Collection[str], replicas: int) -> Shares:
    """Share parameters out, so that all replicas keep equally much of the optimizer's state.

    Args:
        whole: names of those that must not be cut, which are Muon's.
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
    """Up to which of so many numbers, one parameter after the other, each replica's go: who has more of Muon's gets fewer.

    Muon keeps one average of a number, AdamW two.
    """
    level = (sum(loads) + 2 * numbers) / len(loads)
    rooms = [max(0.0, level - load) for load in loads]
    ends, filled = [], 0.0
    for room in rooms:
        filled += room
        ends.append(round(numbers * filled / sum(rooms)) if filled else 0)
    return ends


def gather_parameters(parameters: Mapping[str, nn.Parameter], shares: Shares, replicas: Channel, step: int) -> None:
    """Have each replica's share of the parameters from it, which has updated them."""
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
    return next(iter(flat.values()))[:0]


def _calls(shares: Shares) -> Iterator[tuple[list[Segment], ...]]:
    """All shares, some of each replica's at a time."""
    return zip_longest(*(_pieces(share) for share in shares), fillvalue=[])


def _pieces(share: Mapping[str, range]) -> Iterator[list[Segment]]:
    """A share in pieces of CALL_NUMBERS."""
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
