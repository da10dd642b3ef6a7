"""`rayllp.train`: check the settings, join or start a cluster, and run a driver on it; and `keep_workers`."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from rayllp.cluster.actor_pool import ActorPool
from rayllp.cluster.joining import join_cluster
from rayllp.cluster.placement import choose_device
from rayllp.cluster.ray_group import RayGroup
from rayllp.cluster.ray_metrics import ClusterMetrics
from rayllp.config import TrainConfig
from rayllp.data import Batches
from rayllp.errors import SettingsError
from rayllp.models import Architecture
from rayllp.report import Listener
from rayllp.training.driver import train_session
from rayllp.training.interrupt import stopping
from rayllp.training.prepare import open_run, prepare
from rayllp.training.result import TrainResult


def train(
    config: TrainConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    model: Architecture | None = None,
    batches: Batches | None = None,
    console: Console | None = None,
    listeners: Sequence[Listener] = (),
) -> TrainResult:
    """Train layer-parallel on Ray: on the cluster that this process belongs to (RAY_ADDRESS, or an earlier ray.init), else on this machine.

    Args:
        config: settings; None: the embedded default.
        output: run directory; default: runs/<date>_<name>. If it holds an unfinished run with the same settings, that run is resumed.
        resume: directory of a run to resume, with its own settings unless `config` is given. These may have another number of workers, and
            other values of whatever does not change the network.
        model: a LayerStack of your own in place of config.model; needs `batches`.
        batches: the source of inputs and targets in place of config.data (see `rayllp.data.Batches`).
        console: where to show progress; default: standard error. It is a bar on a terminal, and plain lines elsewhere.
        listeners: are called with each step, event and evaluation as it happens (see `Listener`).

    Raises:
        SettingsError, DataError, ClusterError: training could not start; nothing is left behind.
        NonFiniteError: the loss or a gradient is not finite; the last good state is saved first.
        CheckpointError: there is nothing to resume, or the run directory could not be written to the end.
        LockedError: another process trains in that directory.
        Stopped: Ctrl-C, SIGTERM or a closed terminal before the first step. It is a KeyboardInterrupt.
    """
    batches = None if batches is None else Batches.of(batches)
    prepared = prepare(config, output, resume, model, batches)
    config = prepared.config
    with stopping(), open_run(prepared, output, console) as (run, locks), join_cluster(config.fewest_workers, console):
        device = choose_device(config)
        pool = _kept_workers.pool(config, device) if _kept_workers is not None else None
        workers = RayGroup.for_run(config, run.path, device, pool)
        told = [ClusterMetrics(run.path.name), *listeners]
        return train_session(config, run, workers, prepared.inputs, prepared.resume_from, console=console, listeners=told, locks=locks)


# Several runs with the same processes ---------------------------------------------------------------------------------------------


class _KeptWorkers:
    """Worker processes that are kept between runs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ActorPool | None = None

    def pool(self, config: TrainConfig, device: str) -> ActorPool:
        """Return the processes for a run with these settings.

        Raises:
            SettingsError: the run needs more processes than are kept.
        """
        fewest = config.fewest_workers
        if fewest > self.count:
            raise SettingsError(f"{fewest} workers within keep_workers({self.count}): keep {fewest}, or lower workers")
        if self._pool is None or self._pool.device != device:
            self.close()
            self._pool = ActorPool(self.count, device, lasting=True)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


_kept_workers: _KeptWorkers | None = None


@contextlib.contextmanager
def keep_workers(count: int) -> Iterator[None]:
    """Let all `train` calls inside this context use the same worker processes, up to `count` of them.

    Starting a process takes seconds, most of them for imports; several short runs in one program, such as a notebook, pay for that once.
    The results are the same. The CPUs or GPUs stay reserved until the end of the context, and `rayllp chaos` does not find these runs.

    Raises:
        SettingsError: it is used within another `keep_workers`.
        ClusterError: no cluster could be joined or started.
    """
    global _kept_workers
    if _kept_workers is not None:
        raise SettingsError("keep_workers within keep_workers: end the first, or give it the larger count")
    with join_cluster(count):
        _kept_workers = _KeptWorkers(count)
        try:
            yield
        finally:
            _kept_workers.close()
            _kept_workers = None
