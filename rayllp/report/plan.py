"""The output of `rayllp plan`: the predicted times of meshes and settings as a table, and advice in words."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rayllp.config import load_run_config
from rayllp.control.records import ROLLING
from rayllp.errors import SettingsError
from rayllp.plan import Device, MGRITSolve, Option, Plan, Solve, WindowSolve
from rayllp.report.progress import tell
from rayllp.report.run_directory import read_lines


def measured_biases(folders: Sequence[Path]) -> dict[Solve, float]:
    """Return the largest gradient bias that probes have measured with each solve.

    Args:
        folders: directories of runs or sweeps; for a sweep all its trials count.

    Raises:
        SettingsError: a folder is neither.
    """
    largest: dict[Solve, float] = {}
    for folder in folders:
        trials = [path.parent for path in sorted((folder / "trials").glob("*/config.yaml"))]
        runs = [folder] if (folder / "config.yaml").is_file() else trials
        if not runs:
            raise SettingsError(f"--run {folder}: neither a run's directory nor a sweep's")
        for run in runs:
            for solve, bias in _biases_of(run):
                largest[solve] = max(bias, largest.get(solve, 0.0))
    return largest


def _biases_of(run: Path) -> list[tuple[Solve, float]]:
    config, before = load_run_config(run), None
    biases: list[tuple[Solve, float]] = []
    if any(rung.startswith("0+") for rung in config.adaptive.ladder or ()):
        return []  # the metrics do not distinguish a serial forward solve from one iteration
    iterations = config.iterations.forward, config.iterations.backward
    for metric in read_lines(run / "metrics.jsonl"):
        # A step with a probe records doubled iterations. What the probe judges are those of the last step without one.
        if metric["bias"] is None and metric["rho_backward"] is None:
            iterations = metric["iterations_forward"], metric["iterations_backward"]
        elif metric["bias"] is not None and metric["mode"] == "parallel" and (before is None or before["mode"] == "parallel"):
            bias = math.inf if math.isnan(float(metric["bias"])) else float(metric["bias"])
            levels = config.mgrit.levels
            if metric.get("probed") == ROLLING:
                pass  # whose sweeps differ from step to step, and which is no option of the planner
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
        bias = "?" if option.bias is None else f"{option.bias:.2g}" if option.bias else "exact"
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
