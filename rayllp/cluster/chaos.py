"""Kills workers of a run at random times, to see how it and the cluster bear that."""

import contextlib
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import ray
from ray.util import list_named_actors, placement_group_table

from rayllp.cluster.actor_names import NAMESPACE, is_group, number_of, run_name
from rayllp.config import check_run
from rayllp.errors import ClusterError, SettingsError

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
POLL_S = 0.5
ANSWER_S = 10.0
"""How long the cluster may take to answer. Ray itself waits a minute for one that is gone, and then ends the process."""

T = TypeVar("T")


# What happens when: pure ----------------------------------------------------------------------------------------------------------


class Worker(NamedTuple):
    """A living worker, and what Ray calls it."""

    number: int
    name: str


class Failure(NamedTuple):
    """The next kill: so long after the last one, and which of those that live then, as a number in [0, 1)."""

    after_s: float
    pick: float


def parse_duration(text: str, option: str) -> float:
    """Seconds in such as 20s, 15m or 1.5h.

    Args:
        option: what the text was given for, named where it cannot be read.

    Raises:
        SettingsError: it is no duration.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip(), re.ASCII)
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < seconds < float("inf"):
        raise SettingsError(f"{option} {text!r}: a duration is a number over 0 and a unit, s, m or h: write such as 20s, 15m or 1.5h")
    return seconds


def failures(mtbf_s: float, seed: int) -> Iterator[Failure]:
    """Kills without end: exponentially distributed times between them, as of faults that know nothing of each other."""
    generator = random.Random(seed)
    while True:
        yield Failure(generator.expovariate(1 / mtbf_s), generator.random())


def choose(living: Sequence[Worker], pick: float) -> Worker:
    """Who is struck. The order in which Ray names them does not matter."""
    return sorted(living)[int(pick * len(living))]


class Target(Protocol):
    """A run's workers on a cluster."""

    def alive(self) -> bool:
        """Whether the run is still there, with workers or between two of them."""

    def living(self) -> list[Worker]: ...

    def kill(self, worker: Worker) -> bool:
        """False: it was dead already."""


class Steps:
    """Sees by metrics.jsonl that a run trains: one that loses a worker before its first step ends, as it has nothing to go on from."""

    def __init__(self, run: Path) -> None:
        self._path, self._least = run / "metrics.jsonl", self._size(run / "metrics.jsonl")

    def done(self) -> bool:
        """Whether a step was done since this began to look. A run that goes on from a checkpoint shortens the file first."""
        size = self._size(self._path)
        self._least = min(size, self._least)
        return size > self._least

    @staticmethod
    def _size(path: Path) -> int:
        return path.stat().st_size if path.is_file() else 0


# On Ray ---------------------------------------------------------------------------------------------------------------------------


class RayTarget:
    """The workers of the run of this name on the cluster that this process has joined."""

    def __init__(self, run: str) -> None:
        self.run = run

    def alive(self) -> bool:
        """By its placement group, or by its workers where a group was lent to it; False too when the cluster is gone."""
        states = _answer(lambda: [group["state"] for group in placement_group_table().values() if is_group(group["name"], self.run)])
        return states is not None and (any(state != "REMOVED" for state in states) or bool(self.living()))

    def living(self) -> list[Worker]:
        """Workers that Ray has not found dead, those that are just starting among them."""
        actors = _answer(lambda: list_named_actors(all_namespaces=True)) or []
        names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
        return [Worker(number, name) for name in names if (number := number_of(name, self.run)) is not None]

    def kill(self, worker: Worker) -> bool:
        """End its process, on whatever node that is."""

        def find_it() -> Any:
            try:
                return ray.get_actor(worker.name, namespace=NAMESPACE)
            except ValueError:  # nobody has this name now
                return None

        actor = _answer(find_it)  # apart from the kill: one that is not waited for any more must not come later
        if actor is None:
            return False
        ray.kill(actor, no_restart=True)
        return True


def _answer(question: Callable[[], T]) -> T | None:
    """What the cluster says; None: nothing in time."""
    answers: list[T] = []
    failures: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # one that waits for a lost cluster must not keep this process
    thread.start()
    thread.join(ANSWER_S)
    if failures:
        raise ClusterError(f"the Ray cluster failed to answer: {type(failures[0]).__name__}: {failures[0]}") from failures[0]
    return answers[0] if answers else None


@contextlib.contextmanager
def find(run: Path) -> Iterator[RayTarget]:
    """The run, on the cluster of this process, else that of RAY_ADDRESS, else any on this machine.

    Raises:
        ClusterError: it is on none of them, or they cannot be joined.
    """
    # Ray loads an actor's class to find the actor. This one's takes seconds: here, and not while an answer is waited for.
    import rayllp.cluster.worker  # noqa: F401

    target = RayTarget(run_name(run))
    if ray.is_initialized():
        if not target.alive():
            raise ClusterError(_not_found(run, ["the one that this process is in"], []))
        yield target
        return
    seen: list[str] = []
    refused: list[str] = []
    for address in _addresses():
        try:
            ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:
            refused.append(f"{address} ({type(error).__name__}: {error})")
            continue
        try:
            if target.alive():
                yield target
                return
        finally:
            ray.shutdown()
        seen.append(address)
    raise ClusterError(_not_found(run, seen, refused))


def _addresses() -> list[str]:
    """Clusters to look at."""
    if os.environ.get("RAY_ADDRESS"):
        return [os.environ["RAY_ADDRESS"]]
    # address="auto" takes any one of several clusters, and each `rayllp train` may have its own: so all of them, by what "auto" itself
    # uses. It turns token authentication on where a token lies ready; an explicit address would not.
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.services import find_gcs_addresses

    logging.getLogger("ray").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return sorted(find_gcs_addresses())


def _not_found(run: Path, seen: list[str], refused: list[str]) -> str:
    where = f"looked at: {', '.join(seen)}" if seen else "found no Ray cluster to look at"
    if refused:
        where += (
            f"; could not join {', '.join(refused)}: run this as the user who started it; where RAY_ADDRESS names a cluster with token "
            "authentication, set RAY_AUTH_MODE=token, and have its token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    return (
        f"no worker of {run.resolve()} is alive ({where}). Only a run that is training can be tried: go on with it by "
        f"rayllp train --resume {run}. If it trains on another machine, run this on a machine of its cluster, with RAY_ADDRESS set, and "
        "give the directory by the path that it has there"
    )


def inject_failures(run: Path, mtbf_s: float, seed: int = 0, limit_s: float | None = None, say: Callable[[str], None] = print) -> int:
    """Kill random workers of a run that is training until it ends, the time is over, or Ctrl-C; how many were killed.

    Each is a line of RUN/chaos.jsonl.

    Args:
        mtbf_s: mean time between two kills.
        limit_s: for how long; None: until the run ends.
        say: takes a line for the user.

    Raises:
        SettingsError: not a run directory.
        ClusterError: the run is not alive on a cluster that can be joined.
    """
    check_run(run)
    with find(run) as target:
        lasting = "until the run ends" if limit_s is None else f"for {limit_s:g} s"
        say(f"killing a worker of {run} every {mtbf_s:g} s on average, seed {seed}, {lasting} or Ctrl-C")
        killed: list[Worker] = []

        def record(worker: Worker) -> None:
            killed.append(worker)
            now = time.time()
            with (run / "chaos.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": now, "kind": "chaos", "number": worker.number, "worker": worker.name}) + "\n")
            say(f"{time.strftime('%H:%M:%S', time.localtime(now))} killed worker {worker.number}")

        try:
            steps = Steps(run)
            say("waiting for its next step")
            ending = kill_at(target, failures(mtbf_s, seed), limit_s, steps.done, record)
        except KeyboardInterrupt:
            ending = "stopped"
        files = f"{run / 'chaos.jsonl'} and {run / 'events.jsonl'}"
        say(f"{ending}: {len(killed)} worker{'' if len(killed) == 1 else 's'} killed; see {files}")
    return len(killed)


def kill_at(
    target: Target, plan: Iterator[Failure], limit_s: float | None, trains: Callable[[], bool], record: Callable[[Worker], None]
) -> str:
    """Kill by plan, from the run's next step on; why it is over.

    Args:
        limit_s: for how long, from that step.
        trains: whether that step was done.
        record: takes each that was killed.
    """
    while not trains():
        if not target.alive():
            return "the run has ended"
        time.sleep(POLL_S)
    now = time.monotonic()
    end = float("inf") if limit_s is None else now + limit_s
    for after_s, pick in plan:
        due, struck = now + after_s, False
        while not struck:
            now = time.monotonic()
            if now >= end:
                return "the time is over"
            if not target.alive():
                return "the run has ended"
            if now < due:
                time.sleep(min(POLL_S, due - now, end - now))
                continue
            # Between a worker's death and its successor perhaps nobody is there: then the blow falls on the successor.
            living = target.living()
            struck = bool(living) and target.kill(victim := choose(living, pick))
            if struck:
                record(victim)
            else:
                time.sleep(POLL_S)
    return "the plan is over"
