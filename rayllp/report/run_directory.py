"""The files that a run writes to its directory. Other tools read them, so names do not change (docs/trainer.md, "What a run writes")."""

import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from errno import EACCES, ENOTDIR
from pathlib import Path
from typing import Any

from rayllp.checkpoint.location import Folder, checkpoint_folder
from rayllp.config import EvalSettings, TrainConfig, to_yaml
from rayllp.errors import SettingsError
from rayllp.report.run_lock import LOCK_FILE, OWNER_FILE
from rayllp.timeline import TimedStep, sum_kinds, sum_phases

UNUSED = {"config.yaml", "tensorboard", "loggers.json", "wandb", LOCK_FILE, OWNER_FILE}
"""The files that a run directory has before anything was recorded."""


class RunDirectory:
    """A run directory: config.yaml, metrics.jsonl, evals.jsonl, events.jsonl, timeline.jsonl, checkpoints/, tensorboard/.

    What cannot be written, because a disk is full or the path is gone, is kept in memory, and written in order once that works again.

    Args:
        config: settings of the run, which may place checkpoints elsewhere; None: they are in RUN/checkpoints.

    Attributes:
        trouble: why something could not be written yet; None if everything was written.
    """

    def __init__(self, path: Path, config: TrainConfig | None = None) -> None:
        self.path = path
        self.trouble: str | None = None
        self._waiting: deque[Callable[[], None]] = deque()
        self.checkpoints: Folder = checkpoint_folder(path, None if config is None else config.checkpoint.path)

    @classmethod
    def create(cls, output: str | Path | None, config: TrainConfig) -> "RunDirectory":
        """Create the directory of a new run: `output`, or runs/<date>_<name>.

        Raises:
            SettingsError: it is not empty, or cannot be written.
        """
        path = cls.find_place(output, config.name)
        with refusing(path):
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        return cls(path, config)

    @staticmethod
    def find_place(output: str | Path | None, name: str) -> Path:
        """Return where the directory of a new run or sweep of this name is to be, without creating it: `output`, or runs/<date>_<name>.

        Raises:
            SettingsError: it could not be created there: a file or a non-empty directory is in the way, or permissions are missing.
        """
        path = Path(output) if output else Path("runs") / f"{date.today().isoformat()}_{name}"
        with refusing(path):
            path = path if output else unused(path)
            if path.exists() and not path.is_dir():
                raise SettingsError(f"output {path} is a file: choose a directory with --output")
            if path.is_dir() and any(path.iterdir()):
                held = "another run" if (path / "config.yaml").exists() else "other files"
                raise SettingsError(
                    f"output directory {path} holds {held}: choose another with --output, or resume it with --resume {path}"
                )
            there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
            if not there.is_dir():
                raise NotADirectoryError(ENOTDIR, f"{there} is a file")
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(EACCES, os.strerror(EACCES))
        return path

    def change_settings(self, before: TrainConfig, now: TrainConfig) -> None:
        """Store the new settings of a resumed run, and record the change as an event."""
        self.mend()
        old, new = (flatten(config.model_dump(mode="json")) for config in (before, now))
        changed = {name: [old.get(name), new.get(name)] for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)}
        _replace(self.path / "config.yaml", to_yaml(now))
        self.event(-1, "settings", changed=changed)

    def last_evaluation(self) -> dict[str, Any] | None:
        """Return the last line of evals.jsonl, or None."""
        return next(reversed(self.evaluations()), None)

    def last_event(self, kind: str) -> dict[str, Any] | None:
        """Return the last line of events.jsonl of this kind, or None."""
        return next((line for line in reversed(read_lines(self.path / "events.jsonl")) if line["kind"] == kind), None)

    def evaluations(self) -> list[dict[str, Any]]:
        """Return all lines of evals.jsonl."""
        return read_lines(self.path / "evals.jsonl")

    def best_of_patience(self, settings: EvalSettings) -> dict[str, Any] | None:
        """Return the best evaluation if the last `eval.patience` ones were no better; None: the run need not stop early.

        Only the regular evaluations during training count.
        """
        best: dict[str, Any] | None = None
        waited = last = 0
        for line in self.evaluations() if settings.patience is not None else ():
            if line["step"] % settings.every or line["step"] == last:  # the evaluation at the end, which may use other batches
                continue
            last = line["step"]
            if best is None or line["loss"] < best["loss"]:
                best, waited = (line if math.isfinite(line["loss"]) else best), 0
            else:
                waited += 1
        return best if settings.patience is not None and waited >= settings.patience else None

    def metric(self, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self._append("metrics.jsonl", values)

    def timeline(
        self, step: int, kind: Mapping[str, Any], timed: Sequence[tuple[TimedStep, tuple[int, int | None]]], *, spans: bool
    ) -> None:
        """Append a line to timeline.jsonl.

        Args:
            kind: mode and iterations of the step.
            timed: for each worker (by rank), its timed step, and its peak memory in bytes: resident, and on its GPU if it has one.
            spans: True to store all spans, False for sums only.
        """
        began = min(each.started for each, _ in timed)
        workers = [
            {
                "began": round(each.started - began, 6), "seconds": each.seconds, **sum_kinds(each),
                "phases": sum_phases(each.spans), "peak_bytes": resident, "peak_cuda_bytes": cuda,
            }
            for each, (resident, cuda) in timed
        ]  # fmt: skip
        line: dict[str, Any] = {"step": step, **kind, "workers": _rounded(workers)}
        if spans:
            line["spans"] = _rounded([[list(span) for span in each.spans] for each, _ in timed])
        self._append("timeline.jsonl", line)

    def trace(self, step: int, rank: int, content: bytes) -> None:
        """Write a worker's trace of a step, made by torch.profiler and compressed by gzip, to profile/."""
        path = self.path / "profile" / f"step_{step}_worker_{rank}.json.gz"
        self._do(lambda: _write(path, content))

    def evaluation(self, step: int, split: str, loss: float, **metrics: float) -> None:
        """Append a line to evals.jsonl."""
        self._append("evals.jsonl", {"step": step, "split": split, "loss": loss, **metrics})

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Append a line to events.jsonl. Kinds are switch, deepen, settings, fault, resize, checkpoint, restore, stop, data and gain."""
        self._append("events.jsonl", {"time": time.time(), "step": step, "kind": kind, **details})

    def read_lipschitz(self) -> list[list[float]]:
        """Return the Lipschitz estimates in metrics.jsonl: a list of all layers' values for each probe that estimated them."""
        return [found for metric in read_lines(self.path / "metrics.jsonl") if (found := metric.get("lipschitz"))]

    def read_best(self) -> dict[str, Any] | None:
        """Return the best evaluation so far, as `write_best` has stored it, or None."""
        path = self.path / "best.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_best(self, best: Mapping[str, Any]) -> None:
        """Store the best evaluation in best.json, which tells which checkpoint has the lowest validation loss."""
        self.write_text("best.json", json.dumps(best) + "\n")

    def forget_best(self) -> None:
        """Remove best.json: the next evaluation is the best so far."""
        self._do(lambda: (self.path / "best.json").unlink(missing_ok=True))

    def write_text(self, name: str, text: str) -> None:
        """Write a whole file."""
        self._do(lambda: _replace(self.path / name, text))

    def discard_if_unused(self) -> None:
        """Remove the directory if the run has recorded nothing in it."""
        if self.path.is_dir() and {path.name for path in self.path.iterdir()} <= UNUSED:
            shutil.rmtree(self.path)

    def mend(self) -> None:
        """Remove incomplete last lines, which a killed driver may leave, and to which the next line would be appended."""
        for name in ("metrics.jsonl", "evals.jsonl", "events.jsonl", "timeline.jsonl"):
            path = self.path / name
            if path.is_file() and not path.read_bytes().endswith(b"\n"):
                _replace(path, "".join(line + "\n" for line in _whole_lines(path)))

    def truncate(self, step: int) -> None:
        """Discard metrics and timelines of the steps from `step` on, and later evaluations: these steps will be done again."""

        def cut() -> None:
            for name, last in (("metrics.jsonl", step - 1), ("timeline.jsonl", step - 1), ("evals.jsonl", step)):
                path = self.path / name
                if path.exists():
                    _replace(path, "".join(line + "\n" for line in _whole_lines(path) if json.loads(line)["step"] <= last))

        self._do(cut)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        line = json.dumps(values) + "\n"
        self._do(lambda: _append_line(self.path / name, line))

    def _do(self, write: Callable[[], None]) -> None:
        self._waiting.append(write)
        try:
            while self._waiting:
                self._waiting[0]()
                self._waiting.popleft()
        except OSError as error:
            self.trouble = str(error)
        else:
            self.trouble = None


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file without an incomplete last one."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the content of a .jsonl file; empty if there is no such file."""
    return [json.loads(line) for line in _whole_lines(path)]


def _append_line(path: Path, line: str) -> None:
    """Append a line. If that fails, nothing of it is left in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        end = file.tell()
        try:
            file.write(line)
            file.flush()
        except OSError:
            os.truncate(path, end)
            raise


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _replace(path: Path, text: str) -> None:
    """Replace a file atomically: readers find either the old or the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn an OSError inside this context into an error which says that the output directory cannot be written.

    Raises:
        SettingsError: writing has failed.
    """
    try:
        yield
    except OSError as error:
        raise SettingsError(f"output directory {path} cannot be written: {error.strerror}; choose another with --output") from None


def unused(path: Path) -> Path:
    """Return this path if nothing is there, else the first free one with a number appended."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}_{number}"), number + 1
    return candidate


def _rounded(values: Any) -> Any:
    """Round times to microseconds, to keep the file small."""
    if isinstance(values, float):
        return round(values, 6)
    if isinstance(values, Mapping):
        return {name: _rounded(value) for name, value in values.items()}
    return [_rounded(value) for value in values] if isinstance(values, list) else values


def changed_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that differ from their defaults, by dotted name."""
    values, plain = (flatten(settings.model_dump(mode="json")) for settings in (config, TrainConfig()))
    return {name: value for name, value in values.items() if value != plain.get(name)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as a flat dictionary by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def as_hparams(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return settings in the form that TensorBoard's HParams take: single values as they are, others as JSON."""
    return {name: value if isinstance(value, bool | int | float | str) else json.dumps(value) for name, value in values.items()}
