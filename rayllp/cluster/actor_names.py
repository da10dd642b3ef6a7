"""The names under which Ray knows a run's workers, from which another process that has the run directory's path can find them."""

import os
import re
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

NAMESPACE = "rayllp"


def run_name(path: Path) -> str:
    """Return the run's name in Ray: the full path of its directory. Special characters are written %XX, so that names are unique."""
    return quote(os.fsencode(path.resolve()))


def worker_name(run: str, number: int) -> str:
    """Return a new name for the `number`-th worker process that a session has started.

    That number is also the worker's first rank, which may change later. The random suffix lets a replacement start before Ray has freed the
    name of the worker that died.
    """
    return f"{run}/worker_{number}.{uuid4().hex[:8]}"


def group_name(run: str) -> str:
    """Return a name for a new placement group. It exists as long as the session does, even while no worker is alive."""
    return f"{run}/group.{uuid4().hex[:8]}"


def number_of(name: str, run: str) -> int | None:
    """Return the number in the name of a worker of this run; None if the name is not one of this run's."""
    match = re.fullmatch(re.escape(run) + r"/worker_(\d+)\.[0-9a-f]{8}", name)
    return int(match[1]) if match else None


def is_group(name: str, run: str) -> bool:
    """True if this is the name of a placement group of this run."""
    return re.fullmatch(re.escape(run) + r"/group\.[0-9a-f]{8}", name) is not None
