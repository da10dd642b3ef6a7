"""Helpers and fixtures that tests share: tiny settings, workers as threads or as processes over Gloo, one local Ray cluster."""

import contextlib
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from rayllp.channel import LocalChannel, MessageTag, run_workers
from rayllp.config import DataSettings, make_config
from rayllp.control import Controller
from rayllp.data import load_data
from rayllp.data.files import BadRows
from rayllp.data.sources import joined, sources
from rayllp.engine import Engine
from rayllp.engine.pipeline import Pipeline
from rayllp.models import build_architecture

os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would leave workers behind whatever else this machine does
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
if "RAYLLP_CACHE" not in os.environ:  # else this is a process that tests have started: it has theirs
    CACHE = tempfile.TemporaryDirectory(prefix="rayllp-cache-")  # removed when this process ends
    os.environ["RAYLLP_CACHE"] = CACHE.name
torch.set_num_threads(1)
PROCESS_LIMIT_S = 120


def merge(base, changes):
    merged = dict(base)
    for name, value in changes.items():
        merged[name] = merge(merged[name], value) if isinstance(value, dict) and isinstance(merged.get(name), dict) else value
    return merged


def read_text(settings: DataSettings) -> bytes:
    """Return the training text that the settings name, in bytes, as the tokenizer gets it."""
    source, _ = sources(settings)
    return "".join(joined(source.documents(BadRows(settings.on_error == "skip")), source.max_bytes)).encode()


def tiny(**changes):
    """Return settings of a small GPT-2 in float64, with these changes."""
    base = {
        "model": {"layers": 12, "width": 16, "heads": 2},
        "buffers": {"open": 2, "close": 2},
        "sequence_length": 16,
        "batch_size": 4,
        "steps": 30,
        "dtype": "float64",
        "eval": {"every": 0, "batches": 2, "sample": 0, "final_translate": 0},
        "checkpoint": {"best": False},
        "adaptive": {"probe_every": 0, "rule": "convergence", "switch_at": 1.0},
        "mode": "parallel",
        "solver": "mgrit",
        "workers": 1,
        "spare_workers": False,  # a spare is a process more, which imports for seconds: only where it is what is tested
    }
    return make_config(merge(base, changes))


IN_TURN = {"mode": "adaptive", "solver": "windows", "adaptive": {"switch_at": 0}}
"""Settings of exact steps by layers in turn."""


def make_engine(config, layer_channel=None, data_channel=None):
    data = load_data(config)
    architecture = build_architecture(config, data.facts)
    layer_channel, data_channel = layer_channel or LocalChannel.alone(), data_channel or LocalChannel.alone()
    return Engine(architecture, config, data, layer_channel, data_channel, torch.device("cpu"))


def how_it_went(solution, channel):
    """Return how a solve converged, over all workers of the channel; each of them has to call this."""
    shares = solution.residuals
    return shares.convergence(channel.all_reduce(shares.flat, MessageTag(0, "residuals")))


def train_engine(engine, steps, first=0):
    controller = Controller(engine.config)
    stats = []
    for step in range(first, first + steps):
        plan = controller.plan_probe(step)
        stats.append(engine.train_step(step, controller.accuracy, plan))
        if plan is not None:
            controller.observe(step, stats[-1].findings)
    return stats


def one_pass(batches, split, size):
    """Return the inputs and targets of one pass through a split, all batches joined."""
    parts = [batches.batch(split, step, size) for step in range(-(-batches.count(split) // size))]
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts])


def losses_over_threads(config, steps):
    """Return the losses of `steps` steps, with the workers of the layer group as threads (one replica)."""

    def work(channel):
        return [stats.loss for stats in train_engine(make_engine(config, channel), steps)]

    return run_workers(config.layer_workers, work)[0]


def losses_over_gloo(rank, size, config, steps):
    """Return losses of this Gloo process, and whether exact steps use the pipeline; for `run_processes`."""
    from rayllp.channel.torch_dist import TorchChannel

    engine = make_engine(config, TorchChannel(timeout_s=60))
    losses = [stats.loss for stats in train_engine(engine, steps)]
    return losses, isinstance(engine.gradients.exact, Pipeline)


def _process(work, rank, size, folder, outcomes, heard, arguments):
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        outcomes.put((rank, work(rank, size, *arguments), None))
        heard.wait(PROCESS_LIMIT_S)  # tensors are handed over by the process that made them
        with contextlib.suppress(RuntimeError):  # a test may have broken the connection on purpose
            dist.destroy_process_group()
    except BaseException:
        outcomes.put((rank, None, traceback.format_exc()))


def run_processes(size, work, *arguments):
    """Run `work(rank, size, *arguments)` in `size` Gloo processes; return the results by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rayllp.engine", "rayllp.models.transformer", "rayllp.channel.torch_dist"])
    outcomes, heard, results = context.Queue(), context.Event(), {}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_process, args=(work, rank, size, folder, outcomes, heard, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + PROCESS_LIMIT_S
        try:
            while len(results) < size:
                try:
                    rank, value, error = outcomes.get(timeout=1)
                except queue.Empty:
                    died = [rank for rank, process in enumerate(processes) if process.exitcode and rank not in results]
                    if died or time.monotonic() > deadline:
                        raise AssertionError(
                            f"only {sorted(results)} of {size} processes answered in {PROCESS_LIMIT_S} s; {died} died"
                        ) from None
                    continue
                if error:
                    raise AssertionError(f"process {rank} failed:\n{error}")
                results[rank] = value
        finally:
            heard.set()
            for process in processes:
                process.join(5)
                process.kill()
    return [results[rank] for rank in range(size)]


def run_mpi_processes(size, work, *arguments):
    """Like `run_processes`, for `work(world, *arguments)`: the processes form an MPI world without MPI's launcher, as Ray's actors do."""
    from rayllp.channel.pmi import ProcessManager

    manager = ProcessManager("127.0.0.1", ["here"] * size)
    try:
        return run_processes(size, _in_mpi_world, manager.rendezvous, work, *arguments)
    finally:
        manager.close()


_worlds = []
"""The MPI worlds of this process, kept until it ends: ending one tells the others that a worker is gone, while they may be at work."""


def _in_mpi_world(rank, size, rendezvous, work, *arguments):
    from rayllp.channel.mpi import MPIWorld

    _worlds.append(MPIWorld.join(rendezvous, rank, timeout_s=30))
    return work(_worlds[-1], *arguments)


def train_by(kind, config, run, workers=None, resume_from=(), console=None, **attributes):
    """Train with a driver of class `kind` with these attributes, on Ray actors or the given workers; return the result and the driver."""
    from rayllp.cluster.ray_group import RayGroup
    from rayllp.training.driver import train_session
    from rayllp.training.prepare import validate

    made = []

    def make(*arguments):
        driver = kind(*arguments)
        vars(driver).update(attributes)
        made.append(driver)
        return driver

    workers = workers or RayGroup.for_run(config, run.path, "cpu")
    result = train_session(config, run, workers, validate(config), resume_from, console=console, make_driver=make)
    return result, made[0]


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray cluster for the whole suite; with `make test`, one for each of the processes that share the suite."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


def pytest_collection_modifyitems(items):
    """Run modules that use `kept_workers` last, since that fixture holds all CPUs from its first use to the end."""
    keeping = {item.path for item in items if "kept_workers" in item.fixturenames}
    items.sort(key=lambda item: item.path in keeping)


@pytest.fixture(scope="session")
def kept_workers(ray_cluster):
    """Let trainings share their worker processes, whose start takes most of the time of such short runs."""
    from rayllp import keep_workers

    with keep_workers(4):
        yield
