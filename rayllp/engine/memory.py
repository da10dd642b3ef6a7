"""Memory of this process: the most that it has taken, and freed tensors given back to the system."""

import ctypes
import resource
import sys
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # no glibc
        return None


def return_freed_memory() -> None:
    """Have glibc give the pages of freed tensors back to the system; nothing where there is no glibc.

    Left alone, glibc keeps them in a heap that gradients, allocated between the graphs of one interval and the next, fragment:
    recomputation from C-points lowered the peak of a 64-layer block 1.7 times, and 3 times or more with this call once an interval
    (examples/benchmarks/memory.py). Mapping every large tensor by itself (M_MMAP_THRESHOLD) gives 4 times, but doubles the step's time.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


class PeakMemory(NamedTuple):
    """Bytes, since the process began.

    Attributes:
        resident: of the process, in main memory.
        cuda: of tensors on its GPU; None without one.
    """

    resident: int
    cuda: int | None


def peak_memory(device: torch.device) -> PeakMemory:
    """What the kernel and torch's allocator have counted; costs microseconds."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return PeakMemory(resident, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)
