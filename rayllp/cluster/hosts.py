"""Checks that the hosts of a run's workers share what they need: the folder of the checkpoints, and a network."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray

from rayllp.channel.interfaces import Door
from rayllp.checkpoint import Folder
from rayllp.checkpoint.shared import leave_mark
from rayllp.cluster.placement import Place
from rayllp.errors import ClusterError

Ask = Callable[..., Any]
"""Calls a method of one worker, ask(rank, method, *arguments), and returns its answer."""


def check_storage(storage: Folder | None, places: Sequence[Place], seen_by: Collection[str], ask: Ask) -> set[str]:
    """Check that all hosts and this one see each other's files in the folder of the checkpoints; return the nodes that were checked.

    Args:
        storage: where checkpoints are written; None: no checkpoints are written.
        places: the workers' places, by rank.
        seen_by: nodes that need no check, since they have passed it before.

    Raises:
        ClusterError: a host does not share the folder, so that its part of a checkpoint would be lost.
    """
    new = {place.node: rank for rank, place in enumerate(places) if place.node not in seen_by}
    if storage is None or not new.keys() - {ray.get_runtime_context().get_node_id()}:
        return set()
    with leave_mark(storage) as mark:
        for rank in new.values():
            saw = ask(rank, "look", mark)
            if saw != "ok":
                raise _not_shared(places[rank], mark.folder, saw)
        if mark.answers() < len(new):
            raise _not_shared(places[max(new.values())], mark.folder, "what it writes is not seen here")
    return set(new)


def _not_shared(place: Place, folder: str, why: str) -> ClusterError:
    return ClusterError(
        f"{place.host} ({place.address}) does not share {folder} with this host ({why}), where checkpoints are to be written: every worker "
        "writes its own part. Set checkpoint.path to a URL that all hosts reach (s3://…, gs://…), or put the run on a file system that "
        "all of them mount: --output"
    )


def find_unreached(places: Sequence[Place], listen: Callable[[int, str], int], ask: Ask) -> list[tuple[str, Door, str]]:
    """Return which hosts cannot connect to which others, as (host, port that it tried, reason); one worker per host is tried.

    Args:
        places: the workers' places, by rank.
        listen: has a worker open a port at an address.
    """
    first = {place.node: rank for rank, place in reversed(list(enumerate(places)))}
    doors = {rank: Door(places[rank].address, listen(rank, places[rank].address)) for rank in sorted(first.values())}
    found = []
    for rank in doors:
        others = [door for other, door in doors.items() if other != rank]
        where = f"{places[rank].host} ({places[rank].address})"
        reached = ask(rank, "reach", others)
        found += [(where, door, each.why_not) for door, each in zip(others, reached, strict=True) if each.own is None]
    return found
