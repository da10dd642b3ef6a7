"""`rayllp chaos`: kill workers of a run at random times, to see how the run and the cluster recover."""

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
from ray.util import list_named_actors, placement_group_table

from rayllp.cluster.actor_names import NAMESPACE, is_group, number_of, run_name
from rayllp.config import check_run
from rayllp.errors import ClusterError

POLL_S = 0.5
ANSWER_S = 10.0
"""How long to wait for an answer of the cluster. Ray itself waits a minute for a cluster that is gone, and then ends the process."""

T = TypeVar("T")


# When to kill whom: pure computation ----------------------------------------------------------------------------------------------


class Worker(NamedTuple):
    """A live worker, by its number in the run and its name in Ray."""

    number: int
    name: str


class PlannedKill(NamedTuple):
    """A planned kill.

    Attributes:
        after_s: seconds after the previous kill.
        pick: chooses one of the workers that are alive then; a number in [0, 1).
    """

    after_s: float
    pick: float


def planned_kills(mtbf_s: float, seed: int) -> Iterator[PlannedKill]:
    """Yield kills without end. The times between them are exponentially distributed, as for independent failures."""
    generator = random.Random(seed)
    while True:
        yield PlannedKill(generator.expovariate(1 / mtbf_s), generator.random())


def choose_victim(living: Sequence[Worker], pick: float) -> Worker:
    """Return the worker to kill. The choice does not depend on the order in which Ray lists the workers."""
    return sorted(living)[int(pick * len(living))]


class TrainingWatch:
    """Watches metrics.jsonl to see whether a run trains.

    Kills wait for that, because a run that loses a worker before its first step has no state to recover, and ends.
    """

    def __init__(self, run: Path) -> None:
        self._path, self._least = run / "metrics.jsonl", self._size(run / "metrics.jsonl")

    def has_trained(self) -> bool:
        """True if a step was done since this object was created. The file may shrink first, if the run resumes from a checkpoint."""
        size = self._size(self._path)
        self._least = min(size, self._least)
        return size > self._least

    @staticmethod
    def _size(path: Path) -> int:
        return path.stat().st_size if path.is_file() else 0


# On Ray ---------------------------------------------------------------------------------------------------------------------------


class RayTarget:
    """The workers of the run with this name, on the cluster that this process has joined."""

    def __init__(self, run: str) -> None:
        self.run = run

    def alive(self) -> bool:
        """True if the run has a placement group of its own or live workers; False, too, if the cluster does not answer."""
        states = _answer(lambda: [group["state"] for group in placement_group_table().values() if is_group(group["name"], self.run)])
        return states is not None and (any(state != "REMOVED" for state in states) or bool(self.living()))

    def living(self) -> list[Worker]:
        """Return the workers that Ray does not know to be dead, including those that are still starting."""
        actors = _answer(lambda: list_named_actors(all_namespaces=True)) or []
        names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
        return [Worker(number, name) for name in names if (number := number_of(name, self.run)) is not None]

    def kill(self, worker: Worker) -> bool:
        """Kill the worker's process, on whatever node it runs."""

        def find_it() -> Any:
            try:
                return ray.get_actor(worker.name, namespace=NAMESPACE)
            except ValueError:  # no actor has this name any more
                return None

        actor = _answer(find_it)  # only the look-up has a time limit: a kill that was given up could still happen later
        if actor is None:
            return False
        ray.kill(actor, no_restart=True)
        return True


def _answer(question: Callable[[], T]) -> T | None:
    """Ask the cluster something; return its answer, or None if there is none in time."""
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()  # a daemon: waiting for a lost cluster must not keep this process alive
    try:
        return answer.result(ANSWER_S)
    except TimeoutError:
        return None
    except Exception as error:
        raise ClusterError(f"the Ray cluster failed to answer: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def find_run(run: Path) -> Iterator[RayTarget]:
    """Find the run on a cluster: that of this process, else that of RAY_ADDRESS, else any on this machine.

    Raises:
        ClusterError: no cluster has the run, or none can be joined.
    """
    # To look up an actor Ray imports its class, which takes seconds for this one. Do it now rather than within a time limit.
    import rayllp.cluster.worker  # noqa: F401

    target = RayTarget(run_name(run))
    if ray.is_initialized():
        if not target.alive():
            raise ClusterError(_not_found(run, ["the one that this process is in"], []))
        yield target
        return
    searched: list[str] = []
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
        searched.append(address)
    raise ClusterError(_not_found(run, searched, refused))


def _addresses() -> list[str]:
    """Return the addresses of the clusters to search."""
    if os.environ.get("RAY_ADDRESS"):
        return [os.environ["RAY_ADDRESS"]]
    # Several clusters may run on this machine, as each `rayllp train` may start one. address="auto" would take any one of them, so look at
    # all, with the functions that "auto" itself uses. "auto" also turns token authentication on where there is a token; an explicit
    # address does not.
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.services import find_gcs_addresses

    logging.getLogger("ray").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return sorted(find_gcs_addresses())


def _not_found(run: Path, searched: list[str], refused: list[str]) -> str:
    where = f"looked at: {', '.join(searched)}" if searched else "found no Ray cluster to look at"
    if refused:
        where += (
            f"; could not join {', '.join(refused)}: run this as the user who started it; where RAY_ADDRESS names a cluster with token "
            "authentication, set RAY_AUTH_MODE=token, and have its token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    return (
        f"no worker of {run.resolve()} is alive ({where}). Only a run that is training has workers to kill: resume it with "
        f"rayllp train --resume {run}. If it trains on another machine, run this on a machine of its cluster, with RAY_ADDRESS set, and "
        "give the directory by the path that it has there"
    )


def inject_failures(run: Path, mtbf_s: float, seed: int = 0, limit_s: float | None = None, say: Callable[[str], None] = print) -> int:
    """Kill random workers of a run that trains, until it ends, the time limit is reached, or Ctrl-C; return how many were killed.

    Each kill is recorded as a line of RUN/chaos.jsonl.

    Args:
        mtbf_s: mean time between two kills, in seconds.
        limit_s: time limit in seconds; None: until the run ends.
        say: is called with each line for the user.

    Raises:
        SettingsError: `run` is not a run directory.
        ClusterError: the run is not alive on any cluster that can be joined.
    """
    check_run(run)
    with find_run(run) as target:
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
            watch = TrainingWatch(run)
            say("waiting for its next step")
            ending = kill_as_planned(target, planned_kills(mtbf_s, seed), limit_s, watch.has_trained, record)
        except KeyboardInterrupt:
            ending = "stopped"
        files = f"{run / 'chaos.jsonl'} and {run / 'events.jsonl'}"
        say(f"{ending}: {len(killed)} worker{'' if len(killed) == 1 else 's'} killed; see {files}")
    return len(killed)


def kill_as_planned(
    target: RayTarget, plan: Iterator[PlannedKill], limit_s: float | None, has_trained: Callable[[], bool], record: Callable[[Worker], None]
) -> str:
    """Kill workers according to a plan that starts with the run's next step; return why it ended.

    Args:
        limit_s: time limit in seconds from that step on; None: no limit.
        has_trained: returns True once that step was done.
        record: is called with each worker that was killed.
    """
    while not has_trained():
        if not target.alive():
            return "the run has ended"
        time.sleep(POLL_S)
    now = time.monotonic()
    end = float("inf") if limit_s is None else now + limit_s
    for after_s, pick in plan:
        due, killed = now + after_s, False
        while not killed:
            now = time.monotonic()
            if now >= end:
                return "the time is up"
            if not target.alive():
                return "the run has ended"
            if now < due:
                time.sleep(min(POLL_S, due - now, end - now))
                continue
            # Between the death of a worker and its replacement there may be none: the kill then waits for the replacement.
            living = target.living()
            killed = bool(living) and target.kill(victim := choose_victim(living, pick))
            if killed:
                record(victim)
            else:
                time.sleep(POLL_S)
    return "the plan is over"
