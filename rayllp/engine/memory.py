"""Memory of this process: its peak, and what glibc does with the memory of freed tensors."""

import ctypes
import resource
import sys
from functools import cache
from typing import NamedTuple

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
LARGEST_KEPT_BYTES = 32 * 1024**2
"""The largest value that glibc accepts for M_MMAP_THRESHOLD, which it also reaches by itself once larger tensors are freed."""


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def keep_freed_memory() -> None:
    """Make glibc keep the pages of freed tensors for the next ones. Does nothing without glibc.

    A step frees what the next one allocates. By default glibc returns the end of its heap to the system in between, and thousands of pages
    are faulted in and zeroed again in every step: 4 % of the time of a 64-layer block of width 128 (docs/speed.md). The peak stays the
    same.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Make glibc return the pages of freed tensors to the system. Does nothing without glibc.

    By default glibc keeps them in its heap, which is fragmented by the gradients that are allocated between the graphs of one interval and
    the next. Recomputation from C-points alone lowered the peak of a 64-layer block 1.7 times; with this call once per interval, 3 times or
    more (examples/benchmarks/memory.py). Mapping each large tensor by itself (M_MMAP_THRESHOLD) gives 4 times, but doubles the step's time.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


class PeakMemory(NamedTuple):
    """Peak memory since the process began, in bytes.

    Attributes:
        resident: main memory of the process.
        cuda: tensors on its GPU; None without one.
    """

    resident: int
    cuda: int | None


def peak_memory(device: torch.device) -> PeakMemory:
    """Return the peaks that the kernel and torch's allocator have counted. This takes microseconds."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return PeakMemory(resident, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)
