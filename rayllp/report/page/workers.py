"""What timed steps show of the workers: where their time goes, what each does when, and their memory."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from rayllp.control.records import ROLLING
from rayllp.report.page.records import RunRecord
from rayllp.timeline import KINDS, Span

PARTS = (*KINDS, "other")


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """Where the time of one kind of step goes: medians over the timed steps.

    Attributes:
        kind: mode, iterations and number of workers, in words.
        steps: number of timed steps.
        step_s: seconds of a step on its slowest worker.
        workers: for each worker (by rank), seconds of compute, send, wait and other.
    """

    kind: str
    steps: int
    step_s: float
    workers: tuple[dict[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class StepTimeline:
    """The timeline of one step.

    Attributes:
        workers: for each worker (by rank), its spans, in seconds from when the first worker began the step, by the nodes' clocks.
        seconds: time until the last worker had done the step.
    """

    kind: str
    step: int
    seconds: float
    workers: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """A worker's peak memory up to the last timed step, in bytes; `cuda` is None without a GPU."""

    rank: int
    resident: int
    cuda: int | None


def describe_kind(line: dict[str, Any]) -> str:
    """Return in words what kind of step a line of timeline.jsonl describes."""
    forward, backward, workers = line["iterations_forward"], line["iterations_backward"], len(line["workers"])
    how = "serial" if line["mode"] == "serial" else f"{forward} forward + {backward} backward iterations"
    if line.get("solve") == ROLLING:
        how = "rolling window"
    return f"{how}, {workers} worker{'' if workers == 1 else 's'}"


def time_splits(run: RunRecord) -> list[TimeSplit]:
    """Return the time split of each kind of step that was timed, in the order in which the kinds first occur."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in run.timelines:
        kinds.setdefault(describe_kind(line), []).append(line)
    return [
        TimeSplit(
            kind=kind,
            steps=len(lines),
            step_s=median(max(worker["seconds"] for worker in line["workers"]) for line in lines),
            workers=tuple(
                {part: median(line["workers"][rank][part] for line in lines) for part in PARTS} for rank in range(len(lines[0]["workers"]))
            ),
        )
        for kind, lines in kinds.items()
    ]


def step_timelines(run: RunRecord) -> list[StepTimeline]:
    """Return the timeline of each kind of step, from the last one whose spans were kept."""
    last = {describe_kind(line): line for line in run.timelines if line.get("spans")}
    return [_timeline(kind, line) for kind, line in last.items()]


def _timeline(kind: str, line: dict[str, Any]) -> StepTimeline:
    begins = [worker["began"] for worker in line["workers"]]
    spans = [tuple(Span(*row).shifted(began) for row in rows) for rows, began in zip(line["spans"], begins, strict=True)]
    ends = [began + worker["seconds"] for began, worker in zip(begins, line["workers"], strict=True)]
    return StepTimeline(kind=kind, step=line["step"], seconds=max(ends), workers=tuple(spans))


def memory(run: RunRecord) -> list[WorkerMemory]:
    """Return each worker's memory at the last timed step; empty if no step was timed."""
    workers = run.timelines[-1]["workers"] if run.timelines else []
    return [WorkerMemory(rank=rank, resident=worker["peak_bytes"], cuda=worker["peak_cuda_bytes"]) for rank, worker in enumerate(workers)]
