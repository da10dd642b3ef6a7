"""The output of `rayllp plan`: the predicted times of meshes and settings as a table, and advice in words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rayllp.config import TrainConfig, load_run_config
from rayllp.config.nested import stage_at
from rayllp.control.records import ROLLING
from rayllp.errors import SettingsError
from rayllp.plan import Device, MGRITSolve, Option, Plan, RollingSolve, Solve, WindowSolve
from rayllp.report.progress import tell
from rayllp.report.run_directory import read_lines


def measured_biases(folders: Sequence[Path]) -> dict[Solve, float]:
    """Return the largest gradient bias that probes have measured with each solve.

    Of a rolling window it is a solve for each length, with the mean of what all its steps have taken.

    Args:
        folders: directories of runs or sweeps; for a sweep all its trials count.

    Raises:
        SettingsError: a folder is neither.
    """
    largest: dict[Solve, float] = {}
    rolling: dict[int, _Rolled] = {}
    for folder in folders:
        trials = [path.parent for path in sorted((folder / "trials").glob("*/config.yaml"))]
        runs = [folder] if (folder / "config.yaml").is_file() else trials
        if not runs:
            raise SettingsError(f"--run {folder}: neither a run's directory nor a sweep's")
        for run in runs:
            config, metrics = load_run_config(run), list(read_lines(run / "metrics.jsonl"))
            for solve, bias in _biases_of(config, metrics):
                largest[solve] = max(bias, largest.get(solve, 0.0))
            rolling.setdefault(config.longest_window, _Rolled()).add(config, metrics)
    return largest | {each.solve(length): each.bias for length, each in rolling.items() if each.layers}


@dataclass
class _Rolled:
    """What the steps of a rolling window have taken together.

    Attributes:
        layers: number of layers that they have solved.
        forward, backward: numbers of sweeps.
        bias: the largest that a probe has found and the controller has not refused.
    """

    layers: int = 0
    forward: int = 0
    backward: int = 0
    bias: float = 0.0

    def add(self, config: TrainConfig, metrics: Iterable[Mapping[str, Any]]) -> None:
        """Count the steps of a run."""
        used = False
        for metric in metrics:
            if metric.get("probed") is None and metric.get("solve") == ROLLING:
                self.layers += len(stage_at(config, metric["step"]).config.solved_layers)
                self.forward += metric["iterations_forward"]
                self.backward += metric["iterations_backward"]
                used = True
            elif metric.get("probed") == ROLLING and metric["bias"] is not None and used and metric["mode"] == "parallel":
                self.bias = max(self.bias, float(metric["bias"]))

    def solve(self, length: int) -> RollingSolve:
        """Return them as a solve of the planner."""
        return RollingSolve(length, self.layers / self.forward, self.layers / self.backward)


def _biases_of(config: TrainConfig, metrics: Iterable[Mapping[str, Any]]) -> list[tuple[Solve, float]]:
    """Return what probes have found about solves whose iterations or sweeps are fixed."""
    before = None
    biases: list[tuple[Solve, float]] = []
    if any(rung.startswith("0+") for rung in config.adaptive.ladder or ()):
        return []  # the metrics do not distinguish a serial forward solve from one iteration
    iterations = config.iterations.forward, config.iterations.backward
    for metric in metrics:
        # A step with a probe records doubled iterations. What the probe judges are those of the last step without one.
        if metric["bias"] is None and metric["rho_backward"] is None:
            iterations = metric["iterations_forward"], metric["iterations_backward"]
        elif metric["bias"] is not None and metric["mode"] == "parallel" and (before is None or before["mode"] == "parallel"):
            bias = math.inf if math.isnan(float(metric["bias"])) else float(metric["bias"])
            levels = config.mgrit.levels
            if metric.get("probed") == ROLLING:
                pass  # see `_Rolled`
            elif config.solver == "windows":
                biases.append((WindowSolve(config.longest_window, *iterations), bias))
            elif levels.forward == levels.backward:
                biases.append((MGRITSolve(config.fine_coarsening, levels.forward, *iterations), bias))
        before = metric
    return biases


def show_plan(plan: Plan, device: Device, console: Console) -> None:
    """Print the fastest exact and the fastest approximate option of each mesh, then the advice."""
    table = Table(title="predicted, the fastest of each mesh")
    for name in ("devices", "how", "step, ms", "speed-up", "memory, GiB", "bias"):
        table.add_column(name, justify="left" if name == "how" else "right")
    for option in _fastest(plan):
        fits = device.memory is None or option.memory <= device.memory
        unknown = "by probes" if isinstance(option.solve, RollingSolve) else "?"
        bias = unknown if option.bias is None else f"{option.bias:.2g}" if option.bias or option.solve is not None else "exact"
        numbers = (
            f"{1e3 * option.step_s:.4g}",
            f"{plan.serial_s / option.step_s:.2f}",
            f"{option.memory / 2**30:.3g}" + ("" if fits else " !"),
        )
        table.add_row(str(option.devices), option.text, *numbers, bias, style="bold" if option in (plan.best, plan.exact) else None)
    console.print(table)
    tell(console, plan.advice)


def _fastest(plan: Plan) -> list[Option]:
    """Return the fastest exact and the fastest approximate option of each mesh, and the advised ones."""
    seen, shown = set(), []
    for option in plan.options:
        key = option.solve is None, option.replicas, option.layer_workers
        if key not in seen or option in (plan.best, plan.exact):
            seen.add(key)
            shown.append(option)
    return shown
