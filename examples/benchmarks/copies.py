"""What neighbour copies and background checkpoints cost: the time of a step with them over that without, in one run.

    python examples/benchmarks/copies.py [--workers 2] [--layers 20] [--width 128] [--pairs 20] [--block 25] [--output DIR] [--set …]

Blocks of steps take turns: with copies every `snapshot_every` steps as the run chose it, and a checkpoint begun at the block's start, as
with `checkpoint.every` = 2 · BLOCK; and without either. Times are the driver's, over whole blocks: all that a step waits for is in them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

import rayllp
from rayllp.cluster.ray_group import RayGroup
from rayllp.report import RunDirectory
from rayllp.training.driver import Driver, train_session
from rayllp.training.prepare import validate


class TakingTurns(Driver):
    """Copies and checkpoints in every second block of steps."""

    chosen = 0

    def __init__(self, block: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.block = block
        self.times: dict[bool, list[float]] = {True: [], False: []}

    def _between_chunks(self, step: int) -> None:
        super()._between_chunks(step)
        copies = self.state.copies
        if step % self.block or copies.is_undecided:
            return
        now = time.perf_counter()
        was_on = bool(copies.every)
        if hasattr(self, "_since"):
            self.times[was_on].append((now - self._since) / self.block)
        self.chosen = copies.every or self.chosen
        copies.every = 0 if was_on else self.chosen
        if copies.every:
            self.state.begin_save(step)
        self._since = time.perf_counter()

    def _next_chunk(self, step: int) -> Any:
        return super()._next_chunk(step)[: self.block - step % self.block]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--block", type=int, default=25)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    settings = [
        f"steps={arguments.block * (2 * arguments.pairs + 3)}", f"workers={arguments.workers}", f"model.layers={arguments.layers}",
        f"model.width={arguments.width}", "mode=parallel", "adaptive.probe_every=0", "eval.every=0", "eval.sample=0",
        "checkpoint.best=false",
        *arguments.overrides,
    ]  # fmt: skip
    config = rayllp.load_config(None, settings)
    run = RunDirectory.create((arguments.output or Path(tempfile.mkdtemp(prefix="copies_"))) / "run", config)
    ray.init(address="local", num_cpus=max(2, arguments.workers), include_dashboard=False, logging_level="ERROR")
    drivers: list[TakingTurns] = []

    def make_driver(*given: Any) -> TakingTurns:
        drivers.append(TakingTurns(arguments.block, *given))
        return drivers[0]

    train_session(config, run, RayGroup.for_run(config, run.path, "cpu"), validate(config), make_driver=make_driver)
    (driver,) = drivers
    ray.shutdown()
    on, off = driver.times[True], driver.times[False]
    count = min(len(on), len(off))
    ratios = [a / b for a, b in zip(on[-count:], off[-count:], strict=True)]
    spread = statistics.stdev(ratios) / count**0.5
    print(
        f"{config.world} workers, {arguments.layers} layers of width {arguments.width}, snapshot_every chosen: {driver.chosen}\n"
        f"step without {statistics.median(off) * 1e3:.1f} ms, with {statistics.median(on) * 1e3:.1f} ms; "
        f"ratio of {count} neighbouring pairs of {arguments.block} steps: mean {statistics.mean(ratios):.3f} ± {spread:.3f}, "
        f"median {statistics.median(ratios):.3f}; ratio of all: {sum(on[-count:]) / sum(off[-count:]):.3f}"
    )


if __name__ == "__main__":
    main()
