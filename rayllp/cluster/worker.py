"""The Ray actor that owns a block of layers. It is called once a chunk of steps, never once a sweep."""

import functools
import gc
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import ray
import torch

from rayllp.channel.base import Channel
from rayllp.channel.interfaces import LOOPBACK, Door, Reached, knock
from rayllp.channel.pmi import Rendezvous
from rayllp.channel.timing import Link, time_messages
from rayllp.checkpoint import PieceWriter, Prolongation, load_pieces, locate
from rayllp.checkpoint.memory import Inventory, NeighbourCopies
from rayllp.checkpoint.shared import Mark
from rayllp.checkpoint.states import Layout
from rayllp.cluster.cpus import usable_cpus
from rayllp.cluster.placement import Place
from rayllp.cluster.process_groups import Membership
from rayllp.config import TrainConfig
from rayllp.control import Accuracy, ProbePlan
from rayllp.data import Batches
from rayllp.data.cache import settle
from rayllp.engine import Engine, StepStats
from rayllp.engine.memory import keep_freed_memory, peak_memory
from rayllp.engine.profiling import profiled
from rayllp.errors import ChannelError, DataError, RayllpError
from rayllp.models import Architecture, build_architecture
from rayllp.timeline import TimedStep, Timeline
from rayllp.training.result import Plan

REMEMBERED = 512
"""Steps whose statistics a worker can still tell, for a driver whose call for them failed."""
LIVENESS = "liveness"
"""Ray's concurrency group whose thread answers while the worker's own computes."""

P = ParamSpec("P")
R = TypeVar("R")


def _leaving(method: Callable[P, R]) -> Callable[P, R]:
    """A method that talks to other workers: if it fails, this worker's connections are closed, so that nobody waits for it in vain."""

    @functools.wraps(method)
    def checked(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return method(*arguments, **named)
        except Exception as raised:
            failure = raised
        if not isinstance(failure, RayllpError):
            failure.add_note("".join(traceback.format_exception(failure)))
        error: BaseException | None = failure
        while error is not None:
            # What its frames hold would keep the connections open, and a frame that is cleared still holds its function's closure.
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
        worker = arguments[0]
        assert isinstance(worker, BlockWorker)
        worker.leave(failure)
        raise failure

    return checked


class BlockWorker:
    """One worker: replica `rank // P`, block `rank % P` of the layers."""

    def __init__(self, rank: int, config: TrainConfig, threads: int) -> None:
        gc.freeze()  # the modules' objects stay: without this, a collection after a loss looks through them all, for 0.2 s
        self._threads = threads
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.rank, self.config = rank, config
        self.engine: Engine | None = None
        self.membership = Membership()
        self._copies: NeighbourCopies | None = None
        self._writer = PieceWriter()
        self._offset = 1
        self._done: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)

    def warm(self, architecture: Architecture | None, batches: Batches, plan: Plan) -> str:
        """Load what `build` will need, without building: a spare's share of the work, done beforehand. The node that this worker is on."""
        plan.apply()
        self._settle(batches)
        if architecture is None:
            build_architecture(self.config, batches.facts, plan.kept)  # type: ignore[attr-defined]
        return self.place().node

    def place(self) -> Place:
        """Where this worker is."""
        return Place(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), socket.gethostname())

    def share_node(self, workers: int) -> None:
        """Compute with as many threads as this node has CPUs for beside its other workers, `workers` with this one."""
        torch.set_num_threads(max(1, min(self._threads, usable_cpus() // workers)))

    def listen(self, host: str) -> int:
        """Open the rendezvous port on `host`'s interface alone; the port."""
        return self.membership.listen(host)

    def reach(self, doors: list[Door]) -> list[Reached]:
        """Which of these ports this host gets a connection to."""
        return [knock(door) for door in doors]

    def look(self, mark: Mark) -> str:
        """Whether this host sees a file that the driver's wrote; see `Mark.look`."""
        return mark.look()

    def connect(
        self, host: str, port: int, backend: str, device: str, offset: int, rendezvous: Rendezvous | None = None, sharing: int = 0
    ) -> None:
        """Join the process groups, over the interface that holds this node's address in the cluster.

        Args:
            host: where the first worker listens; the loopback address where all are on one node.
            offset: copies of states go to the worker so many ranks on.
            rendezvous: of the MPI world that is to carry states; None: torch's groups do.
            sharing: workers on this node, which share its CPUs; 0: this one's share is known.

        Raises:
            RendezvousError: they could not be made.
        """
        if sharing:
            self.share_node(sharing)
        own = LOOPBACK if host == LOOPBACK else self.place().address
        try:
            self.membership.join(self.config, self.rank, own, (host, port), backend, device, rendezvous)
        except Exception as error:
            self.leave(error)
            raise
        self._offset = offset
        if self.engine is not None:
            self.engine.reconnect(*self._channels())
            self._keep_copies()

    def leave(self, failure: Exception | None = None) -> None:
        """Close this worker's connections, so that others who wait for it are told at once; its layers stay.

        Args:
            failure: why, if it is not the driver's wish.
        """
        if not self.membership.is_joined:
            return
        if self._copies is not None:
            self._copies.close()
        if self.engine is not None:
            self.engine.disconnect()
        self.membership.leave()
        gc.collect()  # a connection closes when nothing refers to it any more

    def build(self, architecture: Architecture | None, batches: Batches, device: str, plan: Plan) -> dict[str, Any]:
        """Make this worker's layers; its share of the model, in words and numbers.

        Its "layout" is that of its states; "sources" are the parameters that these are made of when layers are shared out anew.
        """
        config = self.config
        plan.apply()
        self._settle(batches)
        where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        if architecture is None:
            facts = batches.facts  # type: ignore[attr-defined]  # a data set of ours, where the model is named by settings
            architecture = build_architecture(config, facts, plan.kept)
        self.engine = Engine(architecture, config, batches, *self._channels(), where)
        self._keep_copies()
        parameters = sum(p.numel() for p in self.engine.block.parameters.values())
        names, tied = list(self.engine.block.parameters), architecture.tied_to
        return {
            "network": architecture.transformers_config() if self.rank == 0 else None,
            "rank": self.rank, "layers": sorted(self.engine.block.layers), "parameters": parameters, "pid": os.getpid(),
            "layout": self._memory.state.layout, "sources": {*names, *(tied[name] for name in names if name in tied)},
        }  # fmt: skip

    def _settle(self, batches: Batches) -> None:
        """See that this host has the data's tokens: made here if there are none, before anybody waits for a step."""
        try:
            settle(batches)
        except DataError as error:
            raise DataError(
                f"on {socket.gethostname()}: {error}. A host needs the data's files under the same path as the driver, where they are more "
                "than can be sent to it (64 MiB of tokens)"
            ) from None

    def _channels(self) -> tuple[Channel, Channel]:
        """To the other blocks, and to the other replicas."""
        return self.membership.channels(self.config, self.rank)

    def _keep_copies(self) -> None:
        self._copies = NeighbourCopies(self._engine, self.membership.copies, self._copies, self._offset)

    def reconfigure(self, config: TrainConfig, rank: int, threads: int | None = None) -> None:
        """Give up this worker's layers and its place; those that `build` makes next are of other settings."""
        if threads is not None:
            self._threads = threads
        if self._copies is not None:
            self._copies.close()
        self._writer.wait()
        self.rank, self.config, self.engine, self._copies = rank, config, None, None
        gc.collect()  # two networks at once may not fit, and an engine and its parts refer to each other

    def release_layers(self) -> None:
        """Give up layers and connections, and forget the run: `reconfigure` begins another one.

        Raises:
            ChannelError: this process is in an MPI world, and can be in no other.
        """
        self.leave()
        if self.membership.mpi is not None:
            raise ChannelError("a process can be in one MPI world only")
        self.reconfigure(self.config, -1)
        self._writer, self._done = PieceWriter(), deque(maxlen=REMEMBERED)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @_leaving
    def run(self, steps: list[tuple[int, Accuracy, ProbePlan | None]], snapshot_every: int = 0) -> list[dict[str, Any]]:
        """A chunk of training steps; ends early after a step whose loss or gradient is not finite.

        Args:
            snapshot_every: steps between states kept in memory; 0: none.
        """
        stats = []
        for step, accuracy, plan in steps:
            timed = peak = None
            with profiled(self._engine.device, wanted=step in self.config.profile.steps) as traces:
                if plan is None and self.config.is_timed(step):
                    done, timed = self._timed_step(step, accuracy)
                    peak = peak_memory(self._engine.device)
                else:
                    done = self._engine.train_step(step, accuracy, plan)
            stats.append(done.as_dict() | {"timed": timed, "peak_memory": peak})
            self._done.append(stats[-1])
            if traces:  # too large to be remembered
                stats[-1] = stats[-1] | {"trace": traces[0]}
            if done.fault is not None or not _is_finite(done.loss, done.grad_norm):
                break
            if snapshot_every and (step + 1) % snapshot_every == 0:
                self.keep(step + 1)
        return stats

    @_leaving
    def time_steps(self, steps: list[tuple[int, Accuracy]]) -> list[TimedStep]:
        """Do training steps with a timeline each."""
        return [self._timed_step(step, accuracy)[1] for step, accuracy in steps]

    def _timed_step(self, step: int, accuracy: Accuracy) -> tuple[StepStats, TimedStep]:
        engine, timeline = self._engine, Timeline()
        engine.timeline = timeline
        try:
            started, begin = time.time(), timeline.clock()
            done = engine.train_step(step, accuracy)
            seconds = timeline.clock() - begin
        finally:
            engine.timeline = None
        spans = tuple(span._replace(begin=span.begin - begin, end=span.end - begin) for span in timeline.spans)
        return done, TimedStep(started, seconds, spans)

    @_leaving
    def time_messages(self, sizes: list[int]) -> list[Link]:
        """Times of messages of so many bytes to the next worker."""
        return time_messages(self._engine.layers, sizes, self._engine.device)

    # Coming back after a loss ---------------------------------------------------------------------------------------------------

    @_leaving
    def keep(self, step: int) -> None:
        """Keep the state that `step` steps have made, here and with the next worker."""
        self._memory.take(step)

    def cost_of_copies(self) -> tuple[float, float]:
        """Seconds of the last state taken, and of its exchange in the background."""
        return self._memory.seconds

    def inventory(self) -> Inventory:
        """States that this worker holds."""
        return Inventory((), ()) if self._copies is None else self._copies.inventory()

    def roll_back(self, step: int) -> None:
        """Make the block what it was after `step` steps."""
        self._memory.roll_back(step)
        self._done = deque((stats for stats in self._done if stats["step"] < step), maxlen=REMEMBERED)

    def give(self, step: int, neighbour: bool, weights: bool) -> torch.Tensor:
        """A state after `step` steps: the copy of another worker's, or the own one, with or without its weights."""
        return self._memory.give(step, neighbour=neighbour, weights=weights)

    def gather(self, layouts: list[Layout], *states: torch.Tensor) -> None:
        """Make the block what it was when other workers, of these layouts and states, had its layers."""
        self._memory.state.gather(list(zip(layouts, states, strict=True)))

    def report(self, start: int, stop: int) -> list[dict[str, Any]]:
        """What the steps from `start` up to `stop` did, as far as it is remembered; the last time that each was done."""
        found = {stats["step"]: stats for stats in self._done if start <= stats["step"] < stop}
        return [found[step] for step in sorted(found)]

    def reached(self) -> int:
        """Steps done, as far as they are remembered."""
        return int(self._done[-1]["step"]) + 1 if self._done else 0

    @ray.method(concurrency_group=LIVENESS)  # type: ignore[untyped-decorator]
    def ping(self) -> int:
        """This worker's rank: it answers from another thread than the one that computes, which may be at one operation for long."""
        return self.rank

    @ray.method(concurrency_group=LIVENESS)  # type: ignore[untyped-decorator]
    def break_off(self, gone: list[str]) -> None:
        """Hosts with these addresses are gone: whatever the computing thread waits for from there fails now."""
        self.membership.break_off(gone)

    @_leaving
    def evaluate(self, batches: int, done: int, most: int) -> tuple[int, int, dict[str, float] | None]:
        """Up to `most` held-out batches more, when `done` are: how many are now, of how many; loss and metrics when all are."""
        if done == 0:
            self._evaluation = self._engine.evaluation(batches)
        with self._engine.averaged():
            found = self._evaluation.advance(most)
        return self._evaluation.done, self._evaluation.size, found

    @_leaving
    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """A continuation of `prompt`, exact forward."""
        from rayllp.engine.generation import continue_text  # transformers' generation takes seconds to import, which start no worker

        with self._engine.averaged():
            return continue_text(self._engine.exact_forward, prompt, tokens)

    @_leaving
    def translate(self, first: int, stop: int, beams: int) -> list[str]:
        """Translations of held-out sentences `first` up to `stop`, exact forward."""
        from rayllp.engine.generation import translate

        data = self._engine.batches
        sources = data.encode_source(data.sources("validation")[first:stop])  # type: ignore[attr-defined]
        with self._engine.averaged():
            return [data.decode(tokens) for tokens in translate(self._engine.exact_forward, sources, beams)]  # type: ignore[attr-defined]

    @_leaving
    def begin_save(self, folder: str) -> None:
        """Copy this worker's pieces of a checkpoint, and write them in the background."""
        self._writer.begin(self._engine, locate(folder))

    def has_saved(self) -> bool:
        """Whether all is written, or has failed."""
        return self._writer.is_done()

    def finish_save(self) -> dict[str, dict[str, Any]]:
        """Wait until all is written; the files with size and checksum."""
        return self._writer.finish()

    def load(self, folder: str, files: dict[str, Any], prolongation: Prolongation | None = None) -> None:
        """Load this worker's pieces of a checkpoint, and check them against its manifest's files; with a prolongation, of a shallower
        network's.
        """
        self._done.clear()
        load_pieces(self._engine, locate(folder), prolongation, files)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Copies of this worker's parameters by full name."""
        return {name: p.detach().cpu().clone() for name, p in self._engine.block.parameters.items()}

    def set_parameter(self, name: str, value: torch.Tensor) -> bool:
        """Overwrite one parameter, if it is this worker's."""
        parameter = self._engine.block.parameters.get(name)
        if parameter is not None:
            parameter.data.copy_(value)
        return parameter is not None

    @property
    def _memory(self) -> NeighbourCopies:
        assert self._copies is not None, "build() comes first"
        return self._copies

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None, "build() comes first"
        return self.engine


def _is_finite(*values: float) -> bool:
    return all(abs(value) < float("inf") for value in values)
