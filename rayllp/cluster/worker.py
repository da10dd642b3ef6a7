"""The Ray actor that owns a block of layers. It is called once per chunk of steps; within a step, workers exchange messages directly."""

import functools
import gc
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import ray
import torch

from rayllp.channel.base import Channel
from rayllp.channel.interfaces import LOOPBACK, ConnectAttempt, Endpoint, try_connect
from rayllp.channel.pmi import Rendezvous
from rayllp.channel.timing import Link, time_messages
from rayllp.checkpoint import PieceWriter, Prolongation, load_pieces, locate
from rayllp.checkpoint.memory import HeldStates, Inventory
from rayllp.checkpoint.shared import Mark
from rayllp.checkpoint.states import StateLayout
from rayllp.cluster.cpus import usable_cpus
from rayllp.cluster.placement import WorkerLocation
from rayllp.cluster.process_groups import Connections
from rayllp.config import TrainConfig
from rayllp.control import Accuracy, ProbePlan
from rayllp.data import Batches, PairBatches
from rayllp.engine import Engine, StepStats
from rayllp.engine.memory import keep_freed_memory, peak_memory
from rayllp.engine.profiling import profiled
from rayllp.errors import ChannelError, DataError, RayllpError
from rayllp.models import build_architecture
from rayllp.timeline import TimedStep, Timeline
from rayllp.training.inputs import BuildContext
from rayllp.training.worker_group import StepReport, WorkerShare

REMEMBERED = 512
"""Number of recent steps whose statistics a worker remembers, in case the driver's call for them fails."""
LIVENESS = "liveness"
"""Name of the concurrency group (in Ray's sense) whose thread answers calls while the worker's main thread computes."""

P = ParamSpec("P")
R = TypeVar("R")


def disconnects_on_failure(method: Callable[P, R]) -> Callable[P, R]:
    """Wrap a method that exchanges messages: if it fails, close this worker's connections, so that others do not wait for it."""

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
            # The traceback's frames refer to the connections and would keep them open. Clearing the frames would not free their closures.
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
        worker = arguments[0]
        assert isinstance(worker, BlockWorker)
        worker.disconnect(failure)
        raise failure

    return checked


class BlockWorker:
    """One worker of a run. With P blocks, rank r has block r % P of replica r // P.

    Args:
        rank: rank of this worker; -1 for a process that has no layers yet.
        config: settings of the run.
        threads: number of threads to compute with, at most.
    """

    def __init__(self, rank: int, config: TrainConfig, threads: int) -> None:
        gc.freeze()  # leave the modules' objects out of garbage collection, which would take 0.2 s of every recovery for them
        self._threads = threads
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.rank, self.config = rank, config
        self.engine: Engine | None = None
        self.connections = Connections()
        self.held_states: HeldStates | None = None
        self._writer = PieceWriter()
        self._offset = 1
        self._step_reports: deque[StepReport] = deque(maxlen=REMEMBERED)

    def warm(self, context: BuildContext, batches: Batches) -> str:
        """Import and load what `build` will need, without building: a spare does this in advance. Returns this worker's node."""
        context.apply()
        self._ensure_data(batches)
        if context.network.architecture is None:
            build_architecture(self.config, batches.facts, context.network.stored_config)
        return self.location().node

    def location(self) -> WorkerLocation:
        """Return where this worker runs."""
        return WorkerLocation(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), socket.gethostname())

    def share_node(self, workers: int) -> None:
        """Set the number of threads to this worker's share of the CPUs of its node, which has `workers` workers."""
        torch.set_num_threads(max(1, min(self._threads, usable_cpus() // workers)))

    def listen(self, host: str) -> int:
        """Open the rendezvous port on the network interface with the address `host` only; return the port."""
        return self.connections.listen(host)

    def try_connections(self, endpoints: list[Endpoint]) -> list[ConnectAttempt]:
        """Try to connect to these endpoints; return the result for each."""
        return [try_connect(endpoint) for endpoint in endpoints]

    def check_visible(self, mark: Mark) -> str:
        """Check that this host sees a file that the driver's host wrote. Returns what `Mark.check_visible` does."""
        return mark.check_visible()

    def connect(
        self, host: str, port: int, backend: str, device: str, offset: int, rendezvous: Rendezvous | None = None, sharing: int = 0
    ) -> None:
        """Join the process groups, over the network interface that has this node's address in the cluster.

        Args:
            host, port: where rank 0 listens; the loopback address if all workers are on one node.
            backend: backend of the process groups, "gloo" or "nccl".
            offset: copies of states go from rank r to rank r + offset.
            rendezvous: where the workers meet to form an MPI world that sends the states; None: the process groups send them.
            sharing: number of workers on this node, which share its CPUs; 0: leave the number of threads as it is.

        Raises:
            RendezvousError: the workers could not be connected.
        """
        if sharing:
            self.share_node(sharing)
        own = LOOPBACK if host == LOOPBACK else self.location().address
        try:
            self.connections.join(self.config, self.rank, own, (host, port), backend, device, rendezvous)
        except Exception as error:
            self.disconnect(error)
            raise
        self._offset = offset
        if self.engine is not None:
            self.engine.reconnect(*self._channels())
            self._hold_states()

    def disconnect(self, failure: Exception | None = None) -> None:
        """Close this worker's connections, so that workers that wait for it fail at once. It keeps its layers.

        Args:
            failure: the error because of which it disconnects; None if the driver asked it to.
        """
        if not self.connections.is_joined:
            return
        if self.held_states is not None:
            self.held_states.close()
        if self.engine is not None:
            self.engine.disconnect()
        self.connections.disconnect()
        gc.collect()  # a connection is closed when the last reference to it is gone

    def build(self, context: BuildContext, batches: Batches, device: str) -> WorkerShare:
        """Build this worker's layers; return its share of the network. Without an architecture, the settings name the model."""
        config, (architecture, stored_config) = self.config, context.network
        context.apply()
        self._ensure_data(batches)
        where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        if architecture is None:
            architecture = build_architecture(config, batches.facts, stored_config)
        self.engine = Engine(architecture, config, batches, *self._channels(), where)
        self._hold_states()
        parameters = sum(p.numel() for p in self.engine.block.parameters.values())
        names, tied = list(self.engine.block.parameters), architecture.tied_to
        return {
            "network": architecture.transformers_config() if self.rank == 0 else None,
            "rank": self.rank, "layers": sorted(self.engine.block.layers), "parameters": parameters, "pid": os.getpid(),
            "layout": self._held_states.state.layout, "sources": {*names, *(tied[name] for name in names if name in tied)},
        }  # fmt: skip

    def _ensure_data(self, batches: Batches) -> None:
        """Make sure that this host has the tokens of the data, before other workers wait for this one in a step."""
        try:
            batches.ensure_present()
        except DataError as error:
            raise DataError(
                f"on {socket.gethostname()}: {error}. Data too large to be sent to a host (over 64 MiB of tokens) must be there already, "
                "under the same path as on the driver's host"
            ) from None

    def _channels(self) -> tuple[Channel, Channel]:
        """Return the channels to the other blocks of this replica, and to the same block of the other replicas."""
        return self.connections.channels(self.config, self.rank)

    def _hold_states(self) -> None:
        self.held_states = HeldStates(self._engine, self.connections.copies, self.held_states, self._offset)

    def reconfigure(self, config: TrainConfig, rank: int, threads: int | None = None) -> None:
        """Give up this worker's layers, and take new settings, a new rank and, if given, another number of threads."""
        if threads is not None:
            self._threads = threads
        if self.held_states is not None:
            self.held_states.close()
        self._writer.wait()
        self.rank, self.config, self.engine, self.held_states = rank, config, None, None
        gc.collect()  # two networks may not fit in memory, and an engine is freed only by the collector, as its parts refer to each other

    def release_layers(self) -> None:
        """Give up layers and connections at the end of a run, so that `reconfigure` can start another one.

        Raises:
            ChannelError: this process is in an MPI world, and cannot join another one.
        """
        self.disconnect()
        if self.connections.mpi is not None:
            raise ChannelError("a process can be in one MPI world only")
        self.reconfigure(self.config, -1)
        self._writer, self._step_reports = PieceWriter(), deque(maxlen=REMEMBERED)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @disconnects_on_failure
    def run(self, steps: list[tuple[int, Accuracy, ProbePlan | None]], snapshot_every: int = 0) -> list[StepReport]:
        """Do a chunk of training steps. It ends early after a step whose loss or gradient is not finite.

        Args:
            steps: for each step its number, its accuracy, and what to measure in it.
            snapshot_every: number of steps between states kept in memory; 0 keeps none.

        Returns: a report of each step that was done.
        """
        reports = []
        for step, accuracy, plan in steps:
            timed = peak = None
            with profiled(self._engine.device, wanted=step in self.config.profile.steps) as traces:
                if plan is None and self.config.records_timeline(step):
                    stats, timed = self._timed_step(step, accuracy)
                    peak = peak_memory(self._engine.device)
                else:
                    stats = self._engine.train_step(step, accuracy, plan)
            report = StepReport(stats, timed, peak)
            self._step_reports.append(report)
            reports.append(replace(report, trace=traces[0]) if traces else report)  # a trace is too large to be remembered
            if stats.fault is not None or not report.is_finite:
                break
            if snapshot_every and (step + 1) % snapshot_every == 0:
                self.keep(step + 1)
        return reports

    @disconnects_on_failure
    def time_steps(self, steps: list[tuple[int, Accuracy]]) -> list[tuple[StepStats, TimedStep]]:
        """Do training steps, and return of each what it did and its timeline."""
        return [self._timed_step(step, accuracy) for step, accuracy in steps]

    def _timed_step(self, step: int, accuracy: Accuracy) -> tuple[StepStats, TimedStep]:
        engine, timeline = self._engine, Timeline()
        engine.timeline = timeline
        try:
            started, begin = time.time(), timeline.clock()
            done = engine.train_step(step, accuracy)
            seconds = timeline.clock() - begin
        finally:
            engine.timeline = None
        spans = tuple(span.shifted(-begin) for span in timeline.spans)
        return done, TimedStep(started, seconds, spans)

    @disconnects_on_failure
    def time_messages(self, sizes: list[int]) -> list[Link]:
        """Measure the time of messages of these sizes (in bytes) to the next worker."""
        return time_messages(self._engine.layer_channel, sizes, self._engine.device)

    # Recovery -------------------------------------------------------------------------------------------------------------------

    @disconnects_on_failure
    def keep(self, step: int) -> None:
        """Keep the current state, after `step` steps, in this worker's memory and, as a copy, in another worker's."""
        self._held_states.keep(step)

    def cost_of_copies(self) -> tuple[float, float]:
        """Return how long copying the last state took, and exchanging it in the background, in seconds."""
        return self._held_states.seconds

    def inventory(self) -> Inventory:
        """Return which states this worker holds."""
        return Inventory((), ()) if self.held_states is None else self.held_states.inventory()

    def restore_from_memory(self, step: int) -> None:
        """Restore the state after `step` steps, and forget the reports of later ones."""
        self._held_states.restore(step)
        self._step_reports = deque((report for report in self._step_reports if report.stats.step < step), maxlen=REMEMBERED)

    def give_state(self, step: int, neighbour: bool, weights: bool) -> torch.Tensor:
        """Return a state after `step` steps, with or without weights: this worker's own, or its copy of another worker's (`neighbour`)."""
        return self._held_states.give(step, neighbour=neighbour, weights=weights)

    def restore_from_states(self, layouts: list[StateLayout], *states: torch.Tensor) -> None:
        """Restore this worker's block from states of other workers: replicas, holders of copies, or those that had its layers before."""
        self._held_states.state.restore_from(list(zip(layouts, states, strict=True)))

    def step_reports(self, start: int, stop: int) -> list[StepReport]:
        """Return the remembered reports of the steps in [start, stop). If a step was done twice, only its later report is returned."""
        by_step = {report.stats.step: report for report in self._step_reports if start <= report.stats.step < stop}
        return [by_step[step] for step in sorted(by_step)]

    def steps_done(self) -> int:
        """Return the number of steps done, as far as this worker remembers them."""
        return self._step_reports[-1].stats.step + 1 if self._step_reports else 0

    @ray.method(concurrency_group=LIVENESS)  # type: ignore[untyped-decorator]
    def ping(self) -> int:
        """Return this worker's rank. Another thread answers, since the main thread may be in a long operation."""
        return self.rank

    @ray.method(concurrency_group=LIVENESS)  # type: ignore[untyped-decorator]
    def abort_connections(self, hosts: list[str]) -> None:
        """Make the main thread fail if it waits for hosts with these addresses, which are gone."""
        self.connections.abort_connections(hosts)

    @disconnects_on_failure
    def evaluate(self, batches: int, done: int, most: int) -> tuple[int, int, dict[str, float] | None]:
        """Evaluate up to `most` more validation batches of `batches` (0: all), of which `done` are done; 0 starts an evaluation.

        Returns: number of batches evaluated so far, number of all, and loss and metrics by name once all are evaluated, else None.
        """
        if done == 0:
            self._evaluation = self._engine.evaluation(batches)
        with self._engine.averaged():
            metrics = self._evaluation.advance(most)
        return self._evaluation.done, self._evaluation.size, metrics

    @disconnects_on_failure
    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """Return `tokens` tokens that continue `prompt`, generated with the exact forward."""
        from rayllp.engine.generation import continue_text  # takes seconds to import, which few runs need

        with self._engine.averaged():
            return continue_text(self._engine.exact_forward, prompt, tokens)

    @disconnects_on_failure
    def translate(self, first: int, stop: int, beams: int) -> list[str]:
        """Return translations of the validation sentences in [first, stop), with the exact forward and beam search."""
        from rayllp.engine.generation import translate

        data = self._engine.batches
        assert isinstance(data, PairBatches)
        sources = data.encode_source(data.sources("validation")[first:stop])
        with self._engine.averaged():
            return [data.decode(tokens) for tokens in translate(self._engine.exact_forward, sources, beams)]

    @disconnects_on_failure
    def begin_save(self, folder: str) -> None:
        """Copy this worker's pieces of a checkpoint, and write them in the background."""
        self._writer.begin(self._engine, locate(folder))

    def has_saved(self) -> bool:
        """True if the pieces have been written, or could not be."""
        return self._writer.is_done()

    def finish_save(self) -> dict[str, dict[str, Any]]:
        """Wait until the pieces are written; return their files with size and checksum."""
        return self._writer.finish()

    def load(self, folder: str, files: dict[str, Any], prolongation: Prolongation | None = None) -> None:
        """Load this worker's pieces of a checkpoint (with `prolongation`, of a shallower network), checking the checksums in `files`."""
        self._step_reports.clear()
        load_pieces(self._engine, locate(folder), prolongation, files)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return copies of this worker's parameters on the CPU, by full name."""
        return {name: p.detach().cpu().clone() for name, p in self._engine.block.parameters.items()}

    @property
    def _held_states(self) -> HeldStates:
        assert self.held_states is not None, "build() comes first"
        return self.held_states

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None, "build() comes first"
        return self.engine
