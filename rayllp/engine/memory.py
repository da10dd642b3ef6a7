"""Memory of this process: the most that it has taken, and freed tensors given back to the system."""

import ctypes
import resource
import sys
from functools import cache
from typing import NamedTuple

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT_BYTES = 32 * 1024**2
"""The most that glibc takes as M_MMAP_THRESHOLD; it comes to this by itself where larger tensors are freed."""


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def keep_freed_memory() -> None:
    """Have glibc keep the pages of freed tensors of this process for the next ones; nothing where there is no glibc.

    A step frees what the next one allocates. Left alone, glibc gives the end of its heap back in between, and thousands of pages are
    faulted in and zeroed anew in every step: 4 % of the time of a 64-layer block of width 128 (docs/speed.md). The peak stays as it was.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Have glibc give the pages of freed tensors back to the system; nothing where there is no glibc.

    Left alone, glibc keeps them in a heap that gradients, allocated between the graphs of one interval and the next, fragment:
    recomputation from C-points lowered the peak of a 64-layer block 1.7 times, and 3 times or more with this call once an interval
    (examples/benchmarks/memory.py). Mapping every large tensor by itself (M_MMAP_THRESHOLD) gives 4 times, but doubles the step's time.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


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
