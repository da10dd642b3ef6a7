"""Worker processes that outlive a run and serve the next one in the same placement group."""

import gc
import logging

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from rich.console import Console

from rayllp.cluster.actor_pool import ActorPool
from rayllp.cluster.ray_group import RayGroup
from rayllp.report import RunDirectory
from rayllp.training.driver import Driver
from rayllp.training.inputs import BuildContext, Network
from tests.conftest import losses_over_threads, tiny, train_by
from tests.test_train import living_actors, losses, placement_groups, read, wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Watched(Driver):
    """Notes the process ids of the workers."""

    def _begin(self, found):
        step = super()._begin(found)
        self.pids = [actor["Pid"] for actor in living_actors()]
        return step


def train(config, path, pool):
    workers = RayGroup.for_run(config, path, "cpu", pool)
    return train_by(Watched, config, RunDirectory.create(path, config), workers, console=Console(quiet=True))[1]


def test_the_next_run_takes_the_same_processes_and_nothing_else_of_the_last(tmp_path):
    first = tiny(workers=2, steps=12, snapshot_every=2, spare_workers=False, checkpoint={"every": 5})
    second = tiny(workers=2, steps=8, seed=3, model={"layers": 20}, snapshot_every=2, spare_workers=False)
    group = placement_group([{"CPU": 1}] * 2)
    pool = ActorPool(2, "cpu", group, lasting=True)
    try:
        one = train(first, tmp_path / "first", pool)
        two = train(second, tmp_path / "second", pool)
        assert len(one.pids) == 2
        assert set(two.pids) == set(one.pids)
        alone = pytest.approx(losses_over_threads(second, 8), rel=1e-12)
        assert losses(tmp_path / "second") == alone
        assert [event["kind"] for event in read(tmp_path / "second" / "events.jsonl")] == ["checkpoint"]

        # One that died meanwhile costs a new start, and a new process.
        ray.kill(next(iter(pool._idle.values())))
        three = train(second, tmp_path / "third", pool)
        assert losses(tmp_path / "third") == alone
        assert not set(three.pids) & set(one.pids)  # after a fault at the start all are new
        assert [event["kind"] for event in read(tmp_path / "third" / "events.jsonl")] == ["fault", "checkpoint"]
    finally:
        pool.close()
        remove_placement_group(group)
    wait_until(lambda: not living_actors())
    assert not placement_groups()


def test_a_spare_that_fails_while_it_warms_is_as_if_there_were_none():
    said = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    config, node, pool = tiny(workers=1), ray.get_runtime_context().get_node_id(), ActorPool(1, "cpu")
    logging.getLogger("ray._private.worker").addHandler(listener)
    try:
        for end in (lambda: pool.take_spare(node), pool.dismiss_idle):
            pool.keep_spares([node], config, BuildContext(Network(None)), "no batches")
            ready = pool._spares[node].ready
            assert ray.wait([ready], timeout=120)[0]
            del ready
            assert end() is None
            assert not pool._spares
        gc.collect()
        wait_until(lambda: not living_actors())
    finally:
        logging.getLogger("ray._private.worker").removeHandler(listener)
        pool.close()
    assert not said, said
