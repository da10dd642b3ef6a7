"""What Ray calls the workers of a run, so that another process finds them by the run's directory. Pure."""

import os
import re
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

NAMESPACE = "rayllp"


def run_name(path: Path) -> str:
    """The run directory's full path; odd characters are written %XX, so that two directories never share a name."""
    return quote(os.fsencode(path.resolve()))


def worker_name(run: str, number: int) -> str:
    """Of the so-manieth process that a sitting started: its rank is that number at first, and may become another.

    The end is another each time, so that a successor need not wait until Ray has freed the name of the dead.
    """
    return f"{run}/worker_{number}.{uuid4().hex[:8]}"


def group_name(run: str) -> str:
    """Of a new placement group: it is there from a sitting's start to its end, whatever becomes of its workers."""
    return f"{run}/group.{uuid4().hex[:8]}"


def number_of(name: str, run: str) -> int | None:
    """The number of this run's worker of this name; None: the name is somebody else's."""
    found = re.fullmatch(re.escape(run) + r"/worker_(\d+)\.[0-9a-f]{8}", name)
    return int(found[1]) if found else None


def is_group(name: str, run: str) -> bool:
    """Whether this run's placement group is called so."""
    return re.fullmatch(re.escape(run) + r"/group\.[0-9a-f]{8}", name) is not None
