"""Writes the results of a sweep: best.yaml, trials.csv, HParams for TensorBoard, and an HTML page with plots."""

import base64
import csv
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from ray.tune import ResultGrid
from rich.console import Console
from rich.table import Table

from rayllp.config import to_yaml
from rayllp.report.progress import tell
from rayllp.report.run_directory import as_hparams
from rayllp.tuning.pictures import complete_rows, draw_all, pareto_front
from rayllp.tuning.reporter import WORST
from rayllp.tuning.sweep import Sweep

COLUMNS = (
    "validation_loss", "step_time", "bias", "largest_rho", "parallel_share", "switches", "switched_at", "last_mode", "step", "tokens",
    "seconds", "seconds_to_target", "diverged",
)  # fmt: skip

Row = dict[str, Any]


def write_results(sweep: Sweep, results: ResultGrid, folder: Path, infeasible: list[tuple[dict[str, Any], str]], console: Console) -> None:
    """Write all results, and print the best trials.

    Args:
        infeasible: choices of settings that could not be trials, each with the reason.
    """
    rows = rows_of(sweep, results)
    _write_csv(rows, sweep, folder / "trials.csv")
    best = best_row(rows, sweep)
    if best is not None:
        (folder / "best.yaml").write_text(_best_yaml(sweep, best), encoding="utf-8")
    _write_hparams(rows, sweep, folder / "tensorboard")
    pictures = draw_all(rows, sweep, folder)
    (folder / "index.html").write_text(_page(sweep, rows, best, pictures, infeasible), encoding="utf-8")
    _say(sweep, rows, best, folder, infeasible, console)


def rows_of(sweep: Sweep, results: ResultGrid) -> list[Row]:
    """Return one row per trial, in the order in which they were tried: its id, settings, state, and the values of its last report."""
    rows = []
    for result in results:
        config, metrics = result.config or {}, result.metrics or {}
        chosen = dict(config.get("settings", {}))
        rows.append(
            {
                "trial": metrics.get("trial_id") or Path(result.path).name.removeprefix("trial_"),
                "settings": chosen,
                "forced_serial": bool(config.get("forced_serial")),
                "shrunk": bool(config.get("shrunk")),
                "error": _last_line(str(result.error)) if result.error else None,
                "state": "failed" if result.error else "diverged" if metrics.get("diverged") else "done" if metrics else "not started",
                **{name: _measured(metrics.get(name)) for name in (*COLUMNS, *sweep.objective.metrics)},
                "time_total_s": metrics.get("time_total_s"),
            }
        )
    return rows


def _measured(value: Any) -> Any:
    """Return a reported value; None if it only stands for a missing one."""
    return None if isinstance(value, float) and not value < WORST else value


def _last_line(text: str) -> str:
    """Return the last line of a traceback, which has the error's message."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def best_row(rows: list[Row], sweep: Sweep) -> Row | None:
    """Return the trial with the smallest objective, or for two objectives the middle one of the Pareto front; None if none has finished."""
    metrics = sweep.objective.metrics
    done = complete_rows([row for row in rows if row["state"] == "done"], *metrics)
    if not done:
        return None
    if len(metrics) == 1:
        return min(done, key=lambda row: row[metrics[0]])
    front = pareto_front(done, metrics)
    return front[len(front) // 2]


def _best_yaml(sweep: Sweep, best: Row) -> str:
    # `best` may have settings that the sweep has forced on the running trial; only those of the space are wanted.
    chosen = {name: value for name, value in best["settings"].items() if name in sweep.space}
    values = ", ".join(f"{name} {best[name]:.6g}" for name in sweep.objective.metrics)
    return f"# The best of sweep {sweep.name}, trial {best['trial']}: {values}.\n" + to_yaml(sweep.config(chosen))


def _write_csv(rows: list[Row], sweep: Sweep, path: Path) -> None:
    names = list(sweep.space)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        metrics = list(dict.fromkeys((*sweep.objective.metrics, *COLUMNS)))
        writer.writerow(["trial", "state", *names, *metrics, "forced_serial", "shrunk", "time_total_s"])
        for row in rows:
            chosen = [row["settings"].get(name, "") for name in names]
            values = ["" if row.get(name) is None else row[name] for name in metrics]
            writer.writerow([row["trial"], row["state"], *chosen, *values, row["forced_serial"], row["shrunk"], row["time_total_s"]])


def _write_hparams(rows: list[Row], sweep: Sweep, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as board:
        for row in rows:
            results = {f"hparam/{name}": row[name] for name in (*sweep.objective.metrics, "validation_loss") if row.get(name) is not None}
            if results:
                board.add_hparams(as_hparams(row["settings"]), results, run_name=f"trial_{row['trial']}")


def _say(sweep: Sweep, rows: list[Row], best: Row | None, folder: Path, infeasible: list[Any], console: Console) -> None:
    metrics = sweep.objective.metrics
    table = Table(title=f"sweep {sweep.name}: {len(rows)} trials" + (f", {len(infeasible)} refused" if infeasible else ""))
    for name in ("trial", *metrics, "parallel", "settings"):
        table.add_column(name)
    front = pareto_front([row for row in rows if row["state"] == "done"], metrics) if len(metrics) > 1 else []
    ordered = sorted(rows, key=lambda row: WORST if row[metrics[0]] is None else row[metrics[0]])
    for row in ordered[:10]:
        mark = " ← best" if row is best else " (front)" if row in front else "" if row["state"] == "done" else f" ({row['state']})"
        cells = ["–" if row[name] is None else f"{row[name]:.4g}" for name in metrics]
        share = "–" if row["parallel_share"] is None else f"{row['parallel_share']:.0%}"
        table.add_row(
            f"{row['trial']}{mark}", *cells, share, ", ".join(f"{name}={value}" for name, value in row["settings"].items()) or "base config"
        )
    console.print(table)
    failed = [row for row in rows if row["state"] == "failed"]
    if failed:
        tell(console, f"{len(failed)} of {len(rows)} trials failed; {failed[0]['trial']}: {failed[0]['error']}", style="red")
    last = f"train it: rayllp train {folder / 'best.yaml'}; " if best is not None else "no trial has finished; "
    tell(console, f"{last}pictures: {folder / 'index.html'}")


def _page(sweep: Sweep, rows: list[Row], best: Row | None, pictures: list[tuple[str, Path]], infeasible: list[tuple[Any, str]]) -> str:
    """Return an HTML page that includes its pictures and needs no other file. Whatever comes from settings and errors is escaped."""
    environment = Environment(
        loader=PackageLoader("rayllp.tuning"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = lambda value: "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    measured = dict.fromkeys((*sweep.objective.metrics, "validation_loss", "step_time", "bias", "parallel_share", "switched_at"))
    return environment.get_template("sweep.html.jinja").render(
        sweep=sweep,
        rows=rows,
        best=best,
        heads=["trial", "state", *sweep.space, *measured],
        pictures=[(caption, base64.b64encode(path.read_bytes()).decode()) for caption, path in pictures],
        infeasible=[(json.dumps(chosen), why) for chosen, why in infeasible],
    )
