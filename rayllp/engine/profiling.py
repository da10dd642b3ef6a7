"""Traces of all operations in chosen steps (`profile.steps`), by `torch.profiler`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def profiled(device: torch.device, *, wanted: bool = True) -> Iterator[list[bytes]]:
    """Within this context, profile this thread and those that it starts work on, if `wanted`.

    Yields: a list to which the trace is appended at the end, in the format of chrome://tracing and ui.perfetto.dev, gzipped.
    """
    traces: list[bytes] = []
    if not wanted:
        yield traces
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        yield traces
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        profile.export_chrome_trace(str(path))
        traces.append(path.read_bytes())
