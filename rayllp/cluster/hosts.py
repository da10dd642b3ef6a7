"""Checks that the hosts of a run's workers share what they need: the folder of the checkpoints, and a network."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray

from rayllp.channel.interfaces import Endpoint
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
            outcome = ask(rank, "check_visible", mark)
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


def find_unreachable(locations: Sequence[WorkerLocation], listen: Callable[[int, str], int], ask: Ask) -> list[tuple[str, Endpoint, str]]:
    """Return which hosts cannot connect to which others, as (host, endpoint that it tried, reason); one worker per host is tried.

    Args:
        locations: the workers' locations, by rank.
        listen: listen(rank, address) has that worker open a port at the address, and returns the port.
    """
    rank_on_node = {location.node: rank for rank, location in reversed(list(enumerate(locations)))}
    endpoints = {rank: Endpoint(locations[rank].address, listen(rank, locations[rank].address)) for rank in sorted(rank_on_node.values())}
    unreachable = []
    for rank in endpoints:
        others = [endpoint for other, endpoint in endpoints.items() if other != rank]
        host = f"{locations[rank].host} ({locations[rank].address})"
        attempts = ask(rank, "try_connections", others)
        unreachable += [
            (host, tried, attempt.error) for tried, attempt in zip(others, attempts, strict=True) if attempt.local_address is None
        ]
    return unreachable
