"""Seconds from the kill of a worker to the next finished training step, and the steps that are lost: rayllp and Ray Train.

    python examples/benchmarks/recovery.py [--kills 20] [--pause 5] [--workers 3] [--which rayllp ray-train] [--json FILE]

Both train the same small GPT-2 (transformers' own layers, Gloo, CPU, one thread a worker) on the same batches, each on a Ray cluster of its
own on this machine. rayllp keeps states in the memory of workers and replaces the lost one; Ray Train (v2, data-parallel) reports a
checkpoint to local disk every few steps and restarts all workers from the last. Worker processes get SIGKILL, at random; times are
taken by this process, which looks at the files that the run writes every 20 ms.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import rayllp
from rayllp.config import TrainConfig

START_S, RECOVER_S, STOP_S = 300.0, 120.0, 60.0
"""Longest waits: for the first steps, for a step after a kill, for a run that is told to stop."""
POLL_S = 0.02
WARM_STEPS = 10
TAIL_BYTES = 1 << 16
"""Of a growing file, what is read each time: more than a chunk of steps writes, and little enough to leave the cores to training."""
REPORT_S = "0.2"
"""Ray Train looks after its workers this often; its default of 2 s makes reports, and the noticing of a death, slower."""

T = TypeVar("T")


class FailedError(Exception):
    """No step came within the limit, or the run ended."""


@dataclass(frozen=True)
class Recovery:
    """One kill.

    Attributes:
        rank: whose process was killed.
        step: steps done when it was.
        next_step_s: from the kill until the first step after it was finished, be it one that is done again.
        caught_up_s: from the kill until a step was finished that had not been done before.
        steps_lost: steps done again.
        own_s: what the system itself says that it took; rayllp's restore event counts from its noticing to all layers being back.
    """

    rank: int
    step: int
    next_step_s: float
    caught_up_s: float
    steps_lost: int
    own_s: float | None = None


@dataclass
class Outcome:
    """What was found of one system; `failed` says why there are fewer recoveries than kills."""

    recoveries: list[Recovery] = field(default_factory=list)
    failed: str = ""


@dataclass(frozen=True)
class Restored:
    """Training goes on after `step` steps; `lost` more had been done."""

    step: int
    lost: int
    own_s: float | None = None


def settings(workers: int, steps: int, snapshot_every: int | None) -> TrainConfig:
    """Four middle layers a worker and two buffers at both ends; nothing but training: no evaluations, probes or checkpoints."""
    return rayllp.make_config(
        {
            "workers": workers, "steps": steps, "mode": "parallel", "model": {"layers": 4 * workers + 4, "width": 64, "heads": 4},
            "sequence_length": 64, "batch_size": 4 * workers, "solver": "mgrit", "mgrit": {"coarsening": 4}, "adaptive": {"probe_every": 0},
            "eval": {"every": 0, "batches": 1, "final_batches": 1, "sample": 0}, "checkpoint": {"every": 0, "best": False},
            "snapshot_every": snapshot_every, "max_failures": 1_000_000, "device": "cpu",
        }
    )  # fmt: skip


# Files -----------------------------------------------------------------------------------------------------------------------------


def append(path: Path, **values: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a file that another process writes."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[1 if start else 0 : -1]]


# The two systems: what runs in a child process, and what its files tell --------------------------------------------------------------


class Rayllp:
    name = "rayllp"

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"

    @staticmethod
    def train(folder: Path, config: TrainConfig, every: int) -> None:
        from rayllp.cluster import session
        from rayllp.cluster.ray_group import RayGroup

        class Watched(RayGroup):
            """Writes down which processes the workers are: each says so where its layers are built."""

            def call_some(self, ranks: Iterable[int], method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
                answers = super().call_some(ranks, method, *arguments, timeout_s=timeout_s)
                if method == "build":
                    for share in answers:
                        append(folder / "workers.jsonl", rank=share["rank"], pid=share["pid"])
                return answers

        session.RayGroup = Watched  # type: ignore[misc, attr-defined]
        rayllp.train(config, output=folder / "run")

    def steps(self) -> int:
        lines = tail(self.run / "metrics.jsonl")
        return lines[-1]["step"] + 1 if lines else 0

    def restored(self, killed: float) -> Restored | None:
        events = (e for e in tail(self.run / "events.jsonl") if e["kind"] == "restore" and e["time"] > killed)
        return next((Restored(e["step"], e["steps_lost"], e["seconds"]) for e in events), None)

    def finished(self, step: int, killed: float) -> float | None:
        """When the step was finished that follows `step` others: the lines of a chunk of steps come at once, at its end."""
        now, lines = time.time(), tail(self.run / "metrics.jsonl")
        after = [line for line in lines if line["step"] > step]
        return now - sum(line["step_time_s"] for line in after) if lines and lines[-1]["step"] >= step else None


class RayTrain:
    name = "ray-train"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def train(folder: Path, config: TrainConfig, every: int) -> None:
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = REPORT_S
        import ray
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from rayllp.data import load_data

        data = load_data(config)
        ray.init(address="local", num_cpus=max(os.cpu_count() or 1, config.world), include_dashboard=False)
        TorchTrainer(
            train_loop,
            # As with rayllp, the data set is read once and shared: a new worker does not pay for it again.
            train_loop_config={"folder": folder, "config": config, "every": every, "data": ray.put(data)},
            scaling_config=ScalingConfig(num_workers=config.world),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(
                name="run",
                storage_path=str(folder / "storage"),
                failure_config=FailureConfig(max_failures=-1),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        ).fit()

    def steps(self) -> int:
        lines = tail(self.folder / "steps.jsonl")
        return lines[-1]["step"] + 1 if lines else 0

    def _attempts(self, killed: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Lines of workers that started before the kill, some of which may finish the step in hand after it, and of later ones."""
        lines = tail(self.folder / "steps.jsonl")
        return [x for x in lines if x["started"] <= killed], [x for x in lines if x["started"] > killed]

    def restored(self, killed: float) -> Restored | None:
        before, after = self._attempts(killed)
        return Restored(after[0]["step"], before[-1]["step"] + 1 - after[0]["step"]) if before and after else None

    def finished(self, step: int, killed: float) -> float | None:
        return next((line["time"] for line in self._attempts(killed)[1] if line["step"] >= step), None)


def train_loop(given: dict[str, Any]) -> None:
    """What each of Ray Train's workers does."""
    import ray.train
    import torch
    from plain import plain_gpt2, plain_step
    from ray.train.torch import prepare_model

    config, folder, every, started = given["config"], given["folder"], given["every"], time.time()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    append(folder / "workers.jsonl", rank=rank, pid=os.getpid())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = ray.get(given["data"])
    network = plain_gpt2(config, data.tokenizer.vocabulary)
    optimizer, first = torch.optim.AdamW(network.parameters(), lr=1e-3), 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as path:
            state = torch.load(Path(path) / "state.pt")
        first = state["step"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    model = prepare_model(network)
    for step in range(first, config.steps):
        inputs, targets = (part[rank::world] for part in data.batch("train", step, config.batch_size))
        loss = plain_step(model, optimizer, config, step, inputs, targets)
        if rank == 0:
            append(folder / "steps.jsonl", step=step, time=time.time(), started=started, loss=loss)
        if (step + 1) % every:
            continue
        if rank == 0:
            with tempfile.TemporaryDirectory() as path:
                state = {"step": step + 1, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, Path(path) / "state.pt")
                ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(path))
        else:
            ray.train.report({})


SYSTEMS: dict[str, type[Rayllp] | type[RayTrain]] = {system.name: system for system in (Rayllp, RayTrain)}


# Killing and waiting -----------------------------------------------------------------------------------------------------------------


def descendants(root: int) -> list[int]:
    """Processes below `root`, by Linux's own accounting."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, open_ = [], [root]
    while open_:
        below = children.get(open_.pop(), [])
        found += below
        open_ += below
    return found


@contextlib.contextmanager
def running(name: str, folder: Path, arguments: argparse.Namespace) -> Iterator[subprocess.Popen[bytes]]:
    """The system in a child process with a Ray cluster of its own; at the end neither is left."""
    command = [sys.executable, __file__, "--child", str(folder), "--which", name, "--workers", str(arguments.workers)]
    command += ["--steps", str(arguments.steps), "--checkpoint-every", str(arguments.checkpoint_every)]
    if arguments.snapshot_every is not None:
        command += ["--snapshot-every", str(arguments.snapshot_every)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment.setdefault("RAY_worker_niceness", "0")  # by default Ray runs workers at 15, far behind whatever else the machine does
    with (folder / "log.txt").open("wb") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield child
        finally:
            below = descendants(child.pid)
            child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                for pid in (child.pid, *below):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                child.wait()


def wait_for(what: str, look: Callable[[], T | None], limit_s: float, child: subprocess.Popen[bytes], since: float | None = None) -> T:
    """Look every 20 ms until there is something, for so long since `since` (time.time), or from now on.

    Raises:
        FailedError: nothing within the limit, or the run ended.
    """
    deadline = (time.time() if since is None else since) + limit_s
    while (found := look()) is None:
        if child.poll() is not None:
            raise FailedError(f"{what}: the run ended with exit code {child.returncode}")
        if time.time() > deadline:
            raise FailedError(f"{what}: nothing within {limit_s:g} s")
        time.sleep(POLL_S)
    return found


def kill_one(system: Rayllp | RayTrain, child: subprocess.Popen[bytes], generator: random.Random) -> tuple[int, float]:
    """SIGKILL for a worker; its rank, and when."""
    pids = {line["rank"]: line["pid"] for line in tail(system.folder / "workers.jsonl")}
    rank = generator.choice(sorted(pids))
    if child.poll() is not None:
        raise FailedError(f"the run ended with exit code {child.returncode} before it was killed so often")
    if pids[rank] not in descendants(child.pid):  # never another's process that has got the number
        raise FailedError(f"worker {rank}'s process is gone, and nobody killed it")
    killed = time.time()
    os.kill(pids[rank], signal.SIGKILL)
    return rank, killed


def recover(system: Rayllp | RayTrain, child: subprocess.Popen[bytes], generator: random.Random) -> Recovery:
    """Kill a worker, and watch training go on."""
    rank, killed = kill_one(system, child, generator)

    def wait(what: str, look: Callable[[], T | None]) -> T:
        return wait_for(f"worker {rank} killed, {what}", look, RECOVER_S, child, killed)

    back = wait("going on", lambda: system.restored(killed))
    reached = back.step + back.lost
    next_step = wait("the next step", lambda: system.finished(back.step, killed))
    caught_up = wait(f"step {reached + 1}", lambda: system.finished(reached, killed))
    return Recovery(rank, reached, next_step - killed, caught_up - killed, back.lost, back.own_s)


def measure(name: str, arguments: argparse.Namespace) -> Outcome:
    outcome, generator = Outcome(), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="recovery_") as temporary:
        folder = Path(temporary)
        system = SYSTEMS[name](folder)
        try:
            with running(name, folder, arguments) as child:
                wait_for("the first steps", lambda: system.steps() >= WARM_STEPS or None, START_S, child)
                for number in range(arguments.kills):
                    time.sleep(arguments.pause)
                    outcome.recoveries.append(recover(system, child, generator))
                    print(f"{name}, kill {number + 1}: {shown(outcome.recoveries[-1])}", file=sys.stderr, flush=True)
        except FailedError as error:
            outcome.failed = str(error)
            log = (folder / "log.txt").read_text(errors="replace", encoding="utf-8").splitlines()[-20:]
            print(f"{name}: FAILED: {error}; the end of its log:", *log, sep="\n  ", file=sys.stderr, flush=True)
    return outcome


# Reporting ---------------------------------------------------------------------------------------------------------------------------


def shown(recovery: Recovery) -> str:
    own = "" if recovery.own_s is None else f" ({recovery.own_s:.2f} s by its own event)"
    times = f"next step after {recovery.next_step_s:.2f} s{own}, new ground after {recovery.caught_up_s:.2f} s"
    return f"worker {recovery.rank} after {recovery.step} steps: {times}, {recovery.steps_lost} steps lost"


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all are not above: of few values no value is made up."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def row(name: str, seconds: Sequence[float], recoveries: Sequence[Recovery], failed: bool) -> str:
    count = f"{len(seconds)}" + (", then FAILED" if failed else "")
    if not seconds:
        return f"| {name} | {count} | – | – | – | – | – |"
    lost = [recovery.steps_lost for recovery in recoveries]
    times = f"{statistics.median(seconds):.2f} | {quantile(seconds, 0.9):.2f} | {max(seconds):.2f}"
    return f"| {name} | {count} | {times} | {statistics.median(lost):g} | {max(lost)} |"


def table(outcomes: dict[str, Outcome]) -> str:
    rows = ["| system | kills | median, s | p90, s | worst, s | steps lost, median | worst |", "|---|---|---|---|---|---|---|"]
    for name, outcome in outcomes.items():
        found, failed = outcome.recoveries, bool(outcome.failed)
        rows.append(row(f"{name}: kill to next step", [r.next_step_s for r in found], found, failed))
        rows.append(row(f"{name}: kill to new ground", [r.caught_up_s for r in found], found, failed))
        own = [r.own_s for r in found if r.own_s is not None]
        if own:
            rows.append(row(f"{name}: its restore events", own, found, failed))
    return "\n".join(rows)


def missing(name: str) -> str:
    """What Ray Train needs and this environment lacks, with the command that brings it."""
    lacking = [module for module in ("pandas", "pyarrow") if name == "ray-train" and importlib.util.find_spec(module) is None]
    return f"{name} needs {' and '.join(lacking)}: pip install 'ray[train]=={version('ray')}'" if lacking else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--which", choices=list(SYSTEMS), nargs="+", default=list(SYSTEMS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds of undisturbed training before each kill")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps after which a run ends, kills or not")
    parser.add_argument("--snapshot-every", type=int, help="rayllp: steps between states kept in memory; default: what rayllp chooses")
    parser.add_argument("--checkpoint-every", type=int, default=5, help="Ray Train: steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of workers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        config = settings(arguments.workers, arguments.steps, arguments.snapshot_every)
        SYSTEMS[arguments.which[0]].train(arguments.child, config, arguments.checkpoint_every)
        return
    outcomes = {}
    for name in arguments.which:
        if lacking := missing(name):
            print(f"skipped: {lacking}", file=sys.stderr)
        else:
            outcomes[name] = measure(name, arguments)
    print(table(outcomes))
    if arguments.json:
        given = {key: value for key, value in vars(arguments).items() if key not in ("json", "child")}
        versions = {package: version(package) for package in ("ray", "torch", "transformers")}
        figures = {name: asdict(outcome) for name, outcome in outcomes.items()}
        raw = {"arguments": given, "versions": versions, "cores": os.cpu_count(), "load": os.getloadavg(), "systems": figures}
        arguments.json.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    if any(outcome.failed for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
