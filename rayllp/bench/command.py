"""The commands `rayllp bench` and `rayllp plan`: measure, print a table, write files."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rayllp.bench.emulated import Emulation, RandomBatches, emulated_stack
from rayllp.bench.layers import bench_layers, data_for_timing, device_here, layer_model, measure_layers, read_layers
from rayllp.bench.step import bench_step, show_step
from rayllp.channel.timing import LARGE, Link
from rayllp.cluster.actor_pool import ActorPool
from rayllp.cluster.joining import join_cluster
from rayllp.cluster.placement import choose_device
from rayllp.cluster.ray_group import RayGroup
from rayllp.config import TrainConfig
from rayllp.errors import SettingsError
from rayllp.plan import Device, make_plan
from rayllp.quantities import write_size
from rayllp.report.gantt import draw_timeline, write_trace
from rayllp.report.plan import measured_biases, show_plan
from rayllp.report.progress import tell
from rayllp.training.inputs import Network


def run_step(
    config: TrainConfig, emulate: str | None, steps: int, file: Path | None, trace: Path | None, picture: Path | None, console: Console
) -> None:
    """Run `rayllp bench step`."""
    times = None if emulate is None else Emulation.parse(emulate)
    with join_cluster(config.world):
        bench = bench_step(config, steps=steps, emulate=times, device="cpu" if times else choose_device(config))
    show_step(config, bench, console)
    _write(file, bench.as_dict())
    if trace is not None:
        write_trace(bench.spans, trace)
    if picture is not None:
        draw_timeline(bench.spans, picture, f"{config.layer_workers} workers, {1e3 * bench.step_s:.0f} ms")


def run_layers(config: TrainConfig, file: Path | None, console: Console) -> None:
    """Run `rayllp bench layers`."""
    config, data = data_for_timing(config, partial(tell, console))
    bench = bench_layers(config, data, device_here(config))
    table = Table(title=f"{config.model.architecture or config.model.family}: a layer, batch {config.replica_batch}")
    for name in ("part", "ms"):
        table.add_column(name)
    for name, seconds in bench.as_dict()["costs"].items():
        if name != "message":
            table.add_row(name.replace("_", " "), f"{1e3 * seconds:.3f}")
    console.print(table)
    sizes = {"weights": bench.parameter_bytes, "graph": bench.graph_bytes, "state": bench.state_bytes}
    tell(console, ", ".join(f"{name} {write_size(size)}" for name, size in sizes.items()))
    _write(file, bench.as_dict())


def run_links(config: TrainConfig, file: Path | None, console: Console) -> None:
    """Run `rayllp bench links`.

    Raises:
        SettingsError: there is one worker, which has no neighbour.
    """
    if config.layer_workers == 1:
        raise SettingsError("one worker has no neighbour: give at least two with --set workers=2")
    instant = Emulation(0, 0, 0)
    state = 4 * config.replica_batch * config.sequence_length * config.model.width
    with join_cluster(config.world):
        group = RayGroup(config, ActorPool(config.world, choose_device(config)))
        try:
            group.start(config, Network(emulated_stack(config, instant)), RandomBatches(config))
            timed: list[Link] = [link for links in group.call("time_messages", sorted({1024, state, LARGE})) for link in links]
        finally:
            group.shutdown()
    table = Table(title="from one worker to the next, half a round trip")
    for name in ("workers", *(write_size(size) + ", µs" for size in timed[0].seconds), "GB/s"):
        table.add_column(name, justify="right")
    for link in timed:
        times = (f"{1e6 * seconds:.0f}" for seconds in link.seconds.values())
        table.add_row(f"{link.worker} – {link.worker + 1}", *times, f"{link.bandwidth_gb_s:.2f}")
    console.print(table)
    _write(file, [asdict(link) for link in timed])


def run_plan(
    config: TrainConfig, device: Device, devices: int, costs: Sequence[Path], runs: Sequence[Path], bias: float, file: Path | None,
    console: Console,
) -> None:  # fmt: skip
    """Run `rayllp plan`."""
    biases = measured_biases(runs)
    if costs:
        layers = [read_layers(path) for path in costs]
    else:
        config, data = data_for_timing(config, partial(tell, Console(stderr=True)))
        layers = measure_layers(config, data, device_here(config))
    plan = make_plan(config, layer_model(layers), device, devices, biases=biases, bias_limit=bias)
    show_plan(plan, device, console)
    _write(file, plan.as_dict())


def _write(file: Path | None, figures: Any) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
