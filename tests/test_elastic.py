"""The number of workers changes during a run: states pass to the new owners of the layers, and training goes on where it was."""

import threading
import time

import pytest
import ray
import torch

from rayllp.channel import run_workers
from rayllp.checkpoint.states import BlockState
from rayllp.cluster.ray_group import RayGroup
from rayllp.errors import ClusterError, SettingsError
from rayllp.report import RunDirectory
from rayllp.training.driver import Driver
from tests.conftest import losses_over_threads, make_engine, tiny, train_by, train_engine
from tests.test_recovery import Faulty
from tests.test_train import living_actors, read


@pytest.mark.parametrize(
    ("before", "after", "optimizer"), [(2, 3, "adamw"), (3, 1, "adamw"), (1, 2, "adamw"), (4, 2, "adamw"), (2, 3, "muon"), (3, 1, "muon")]
)
def test_blocks_are_made_of_other_blocks_states(before, after, optimizer):
    def save(channel):
        engine = make_engine(tiny(workers=before, optimizer={"name": optimizer}), channel)
        train_engine(engine, 2)
        state = BlockState(engine)
        flat = state.new_buffer()
        state.copy_into(flat)
        return state.layout, flat, [stats.grad_norm for stats in train_engine(engine, 2, first=2)]

    saved = run_workers(before, save)

    def go_on(channel):
        engine = make_engine(tiny(workers=after, optimizer={"name": optimizer}), channel)
        with torch.no_grad():  # all must be overwritten
            for parameter in engine.block.parameters.values():
                parameter.fill_(torch.nan)
        BlockState(engine).restore_from([(layout, flat) for layout, flat, _ in saved])
        return [stats.grad_norm for stats in train_engine(engine, 2, first=2)]

    for norms in run_workers(after, go_on):
        assert norms == pytest.approx(saved[0][2], rel=1e-9)


def test_a_parameter_that_no_state_has():
    engine = make_engine(tiny())
    with pytest.raises(ClusterError, match="is not in the states of the workers"):
        BlockState(engine).restore_from([])


def test_a_range_of_workers():
    config = tiny(workers={"min": 1, "max": 3})
    assert (config.world, config.fewest_workers) == (3, 1)
    assert [config.with_workers(n).world for n in (1, 2, 3, 9)] == [1, 2, 3, 3]
    # A penalty needs whole intervals on each worker: the largest number that serves is taken.
    penalised = tiny(workers={"min": 1, "max": 2}, adaptive={"consistency": 1.0})
    assert penalised.with_workers(2).world == 2
    # More workers than intervals: no penalty, hence none to steer, with fewer of them too.
    steered = tiny(workers={"min": 1, "max": 4}, mode="adaptive", adaptive={"rule": "bias", "steer": True})
    assert (steered.consistency, steered.with_workers(2).world, steered.with_workers(2).consistency) == (0, 2, 0)
    with pytest.raises(SettingsError, match="min 3 is above max 2"):
        tiny(workers={"min": 3, "max": 2})
    with pytest.raises(SettingsError, match=r"leave out mesh\.layer"):
        tiny(workers={"min": 1, "max": 2}, mesh={"layer": 2})


def test_a_range_of_replicas():
    config = tiny(workers={"min": 2, "max": 8}, mesh={"data": 4}, batch_size=8)
    assert (config.world, config.layer_workers, config.fewest_workers) == (8, 2, 2)
    found = [config.with_workers(n) for n in range(2, 10)]
    # Three replicas do not divide the batch.
    assert [(each.mesh.data, each.layer_workers) for each in found] == [(1, 2)] * 2 + [(2, 2)] * 4 + [(4, 2)] * 2
    assert found[0].with_workers(8) == found[0]
    for workers, mesh in (
        ({"min": 2, "max": 7}, {"data": 4}),
        ({"min": 3, "max": 8}, {"data": 4}),
        ({"min": 2, "max": 8}, {"data": 4, "layer": 1}),
    ):
        with pytest.raises(SettingsError, match=r"replicas of \d workers come and go as a whole"):
            tiny(workers=workers, mesh=mesh, batch_size=8)


STEPS = 60


@ray.remote(num_cpus=2)
class Tenant:
    """An actor that takes up resources of the cluster."""

    def ping(self):
        return None


class Patient(Driver):
    """Waits at step 20 until workers were added, so that this happens on a slow machine too."""

    def _next_chunk(self, step):
        chunk = super()._next_chunk(step)
        return chunk[: 20 - step] if step < 20 else chunk

    def _between_chunks(self, step):
        super()._between_chunks(step)
        deadline = time.monotonic() + 90
        while step == 20 and self.workers.size < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
            self.resizing.grow(step)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_grows_into_room_that_comes_free(tmp_path):
    settings = {"steps": STEPS, "dtype": "float32", "adaptive": {"probe_every": 50}, "eval": {"every": 0}}
    config = tiny(workers={"min": 2, "max": 4}, resize_check_s=0.2, **settings)
    tenant = Tenant.remote()
    ray.get(tenant.ping.remote(), timeout=60)
    run = RunDirectory.create(tmp_path / "run", config)

    trained = []

    def leave():
        deadline = time.monotonic() + 60
        while not (run.path / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        trained.append((run.path / "metrics.jsonl").exists())
        ray.kill(tenant)

    threading.Thread(target=leave, daemon=True).start()
    train_by(Patient, config, run)
    assert trained == [True]  # beside the tenant, on the workers that there was room for
    resizes = [e for e in read(run.path / "events.jsonl") if e["kind"] == "resize"]
    assert (resizes[0]["workers_before"], resizes[-1]["workers"]) == (2, 4)
    metrics = read(run.path / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(STEPS))
    assert (metrics[0]["workers"], metrics[-1]["workers"]) == (2, 4)
    alone = losses_over_threads(tiny(workers=2, **settings), STEPS)
    # float32 sums in another order part company slowly
    assert [m["loss"] for m in metrics] == pytest.approx(alone, rel=1e-3)
    assert not living_actors()
    assert torch.isfinite(torch.tensor([m["loss"] for m in metrics])).all()


class Shrinking(RayGroup):
    """A group in which the slot of the first lost worker is lost as well, as if its node had gone."""

    replaced = 0

    def count_available_workers(self, lost):
        self.replaced += 1
        return super().count_available_workers(lost) if self.replaced > 1 else self.size - len(lost)


class Waiting(Driver):
    """Waits at step 16 until all four workers are there again."""

    def _next_chunk(self, step):
        chunk = super()._next_chunk(step)
        return chunk[: 16 - step] if step < 16 else chunk

    def _between_chunks(self, step):
        super()._between_chunks(step)
        deadline = time.monotonic() + 90
        while step == 16 and self.workers.size < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
            self.resizing.grow(step)


class Growing(Faulty, Waiting):
    """Like `Waiting`, with failures before that step and after it."""


@pytest.mark.study
@pytest.mark.usefixtures("ray_cluster")
def test_replicas_that_are_lost_come_back(tmp_path):
    """A replica is lost with one of its workers, and comes back; then a worker's share of the optimizer state is restored from its copy."""
    settings = {"model": {"dropout": 0.1}, "steps": 24, "optimizer": {"sharded": True}}
    config = tiny(workers={"min": 2, "max": 4}, mesh={"data": 2}, snapshot_every=1, resize_check_s=0.2, **settings)
    run = RunDirectory.create(tmp_path / "run", config)
    train_by(Growing, config, run, Shrinking.for_run(config, run.path, "cpu"), pending=[(1, 7, "adjoint"), (2, 20, "optimizer")])
    events = read(run.path / "events.jsonl")
    resizes = [(e["workers_before"], e["workers"], e["replicas"]) for e in events if e["kind"] == "resize"]
    assert resizes == [(4, 2, 1), (2, 4, 2)]
    assert [e["ranks"] for e in events if e["kind"] == "fault"] == [[1], [2]]
    assert [(e["source"], e["steps_lost"] <= 1) for e in events if e["kind"] == "restore"] == [("memory", True)] * 2
    metrics = read(run.path / "metrics.jsonl")
    alone = losses_over_threads(tiny(workers=2, **settings), 24)
    assert [m["loss"] for m in metrics] == pytest.approx(alone, abs=1e-10)
    assert {m["workers"] for m in metrics} == {2, 4}
