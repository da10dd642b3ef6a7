"""Checks that the hosts of a run's workers share what they need: the folder of the checkpoints, and a network."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray

from rayllp.channel.interfaces import Door
from rayllp.checkpoint import Folder
from rayllp.checkpoint.shared import leave_mark
from rayllp.cluster.placement import WorkerLocation
from rayllp.errors import ClusterError

Ask = Callable[..., Any]
"""Calls a method of one worker, ask(rank, method, *arguments), and returns its answer."""


def check_storage(storage: Folder | None, locations: Sequence[WorkerLocation], seen_by: Collection[str], ask: Ask) -> set[str]:
    """Check that all hosts and this one see each other's files in the folder of the checkpoints; return the nodes that were checked.

    Args:
        storage: where checkpoints are written; None: no checkpoints are written.
        locations: the workers' locations, by rank.
        seen_by: nodes that need no check, since they have passed it before.

    Raises:
        ClusterError: a host does not share the folder, so that its part of a checkpoint would be lost.
    """
    unchecked = {location.node: rank for rank, location in enumerate(locations) if location.node not in seen_by}
    if storage is None or not unchecked.keys() - {ray.get_runtime_context().get_node_id()}:
        return set()
    with leave_mark(storage) as mark:
        for rank in unchecked.values():
            outcome = ask(rank, "look", mark)
            if outcome != "ok":
                raise _not_shared(locations[rank], mark.folder, outcome)
        if mark.answers() < len(unchecked):
            raise _not_shared(locations[max(unchecked.values())], mark.folder, "what it writes is not seen here")
    return set(unchecked)


def _not_shared(location: WorkerLocation, folder: str, why: str) -> ClusterError:
    return ClusterError(
        f"{location.host} ({location.address}) does not share {folder} with this host ({why}), where checkpoints are to be written: every "
        "worker writes its own part. Set checkpoint.path to a URL that all hosts reach (s3://…, gs://…), or put the run on a file system "
        "that all of them mount: --output"
    )


def find_unreached(locations: Sequence[WorkerLocation], listen: Callable[[int, str], int], ask: Ask) -> list[tuple[str, Door, str]]:
    """Return which hosts cannot connect to which others, as (host, port that it tried, reason); one worker per host is tried.

    Args:
        locations: the workers' locations, by rank.
        listen: has a worker open a port at an address.
    """
    rank_on_node = {location.node: rank for rank, location in reversed(list(enumerate(locations)))}
    doors = {rank: Door(locations[rank].address, listen(rank, locations[rank].address)) for rank in sorted(rank_on_node.values())}
    unreached = []
    for rank in doors:
        others = [door for other, door in doors.items() if other != rank]
        host = f"{locations[rank].host} ({locations[rank].address})"
        reached = ask(rank, "reach", others)
        unreached += [(host, door, each.why_not) for door, each in zip(others, reached, strict=True) if each.own is None]
    return unreached
