"""Recovery from lost workers: states in memory, the failure budget, and real workers that are killed in every phase of a step."""

import io
import os
import threading
import time
from types import SimpleNamespace

import pytest
import ray
import torch
from rich.console import Console

import rayllp
from rayllp.channel import run_workers
from rayllp.channel.torch_dist import TorchChannel
from rayllp.checkpoint.memory import CopyPlacement, HeldStates, Inventory, Source, copy_offset
from rayllp.checkpoint.states import split_state
from rayllp.config import make_config
from rayllp.control import Controller
from rayllp.engine.block import BoundBlock
from rayllp.errors import ClusterError, WorkerLostError
from rayllp.report import Journal, RunDirectory
from rayllp.training.driver import Driver
from rayllp.training.failure_budget import FailureBudget, choose_interval
from rayllp.training.recovery import Recovery
from rayllp.training.resizing import Resizing
from rayllp.training.run_state import RunState
from tests.conftest import make_engine, run_processes, tiny, train_by, train_engine
from tests.test_train import read

# States in memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "optimizer"), [(0, "adamw"), (3, "adamw"), (0, "muon"), (3, "muon")])
def test_a_state_in_memory_is_the_whole_state(steps, optimizer):
    engine, twin = (make_engine(tiny(seed=seed, optimizer={"name": optimizer})) for seed in (0, 1))
    train_engine(engine, steps)
    states, others = HeldStates(engine, lambda limit: None), HeldStates(twin, lambda limit: None)
    states.keep(steps)
    train_engine(twin, 2)
    others.state.restore(states.give(steps, neighbour=False))
    assert all(torch.equal(p, twin.block.parameters[name]) for name, p in engine.block.parameters.items())
    after = [stats.grad_norm for stats in train_engine(engine, 2)]
    states.restore(steps)
    assert [stats.grad_norm for stats in train_engine(engine, 2)] == after
    with pytest.raises(ClusterError, match=r"a state of \(3,\) numbers"):
        split_state(torch.zeros(3, dtype=torch.float64), others.state.layout)


def test_the_next_worker_has_the_last_states():
    def work(channel):
        engine = make_engine(tiny(workers=3), channel)
        # A channel of their own: threads share this one, so nothing is trained here.
        states = HeldStates(engine, lambda limit: channel)
        for step in range(4):
            with torch.no_grad():
                for parameter in engine.block.parameters.values():
                    parameter.fill_(10 * channel.rank + step)
            states.keep(step)
        states.wait()
        found = states.inventory()
        states.close()
        return found, states.give(3, neighbour=True)[0].item(), states.give(3, neighbour=False)[0].item()

    for rank, (found, before, own) in enumerate(run_workers(3, work)):
        assert found == Inventory((3,), (3,))
        assert (before, own) == (10 * ((rank - 1) % 3) + 3, 10 * rank + 3)


def test_an_exchange_that_fails_is_told_at_the_next_state():
    class Broken:
        rank, size = 0, 2

        def all_reduce(self, tensor, tag):
            return tensor

        def exchange(self, *_):
            raise RuntimeError("gone")

    states = HeldStates(make_engine(tiny()), lambda limit: Broken())
    states.keep(1)
    states.wait()
    with pytest.raises(rayllp.errors.ChannelError, match="gone"):
        states.keep(2)
    assert states.inventory() == Inventory((1,), ())
    states.close()


def test_the_step_to_come_back_to():
    placement = CopyPlacement(blocks=3)
    held = {0: Inventory((4, 5), (4,)), 1: Inventory((4, 5), (4, 5)), 2: Inventory((4,), (4, 5))}
    assert placement.common_step(held) == 4
    without = {rank: held[rank] for rank in (0, 2)}
    assert placement.common_step(without) == 4
    assert placement.sources(1, 4, without) == [Source(2, 1)]
    assert placement.common_step({0: held[0]}) is None  # worker 1's copy was on worker 2


def test_the_step_to_come_back_to_with_replicas():
    placement, held = CopyPlacement(blocks=2, replicas=2), {0: Inventory((7,), ()), 3: Inventory((6, 7), ()), 2: Inventory((7,), ())}
    assert placement.common_step(held) == 7
    assert placement.sources(1, 7, held) == [Source(3, 3)]
    assert placement.sources_of_all(7, held) == [Source(0, 0), Source(3, 3)]
    assert placement.common_step({0: held[0], 2: held[2]}) is None  # both of the second block are lost


def test_the_step_to_come_back_to_where_the_optimizers_state_is_shared_out():
    """A lost worker's weights are on every replica that has its block; its share of the optimizer state is in one copy only."""
    placement, all_of = CopyPlacement(blocks=2, replicas=2, sharded=True, offset=2), Inventory((6, 7), (6, 7))
    held = {0: all_of, 2: Inventory((7,), (7,)), 3: all_of}
    assert placement.sources(1, 7, held) == [Source(3, 3), Source(3, 1, has_weights=False)]
    assert placement.common_step(held) == 7
    # Of each block one gives the weights.
    assert [tuple(source) for source in placement.sources_of_all(7, held)] == [(0, 0, True), (2, 2, False), (3, 1, False), (3, 3, True)]
    assert placement.common_step({**held, 3: Inventory((6, 7), (6,))}) is None  # its share of step 7 had not arrived, 6 is not on worker 2
    assert placement.common_step({0: all_of, 2: all_of}) is None


def test_a_copy_goes_to_another_node():
    assert copy_offset("aaaa") == 1
    assert copy_offset("aabb") == 2
    assert copy_offset("abab") == 1
    assert copy_offset("aaabbb") == 3
    assert copy_offset("aabbcc") == 2
    assert copy_offset("aab") == 1  # no offset serves both of node a
    assert copy_offset("aaaabbbb", 2) == 4  # of four replicas, the next but one
    assert copy_offset("abab", 2) == 2
    placement, held = CopyPlacement(blocks=4, offset=2), {0: Inventory((4,), (4,)), 1: Inventory((4,), (4,))}
    assert placement.common_step(held) == 4
    assert placement.sources(3, 4, held) == [Source(1, 3)]


# The budget --------------------------------------------------------------------------------------------------------------------


def test_the_budget_of_faults():
    budget = FailureBudget(3)
    assert [budget.spend(step, now, "lost") for step, now in ((1, 0.0), (5, 10.0), (9, 20.0))] == [0.0, 0.0, 0.0]
    with pytest.raises(ClusterError, match="max_failures is 3"):
        budget.spend(12, 30.0, "lost")
    assert FailureBudget(3).spend(1, 0.0, "lost") == 0.0
    patient = FailureBudget(2)
    assert [patient.spend(step, 3000.0 * step, "lost") for step in range(9)] == [0.0] * 9


def test_a_step_that_fails_again_and_again_is_at_fault():
    budget = FailureBudget(100)
    assert budget.spend(7, 0.0, "lost") == 0.0
    assert budget.spend(7, 1.0, "lost") > 0
    with pytest.raises(ClusterError, match="step 7 with no step done between"):
        budget.spend(7, 2.0, "lost")


def test_a_recovery_that_fails_again_is_no_fault_of_the_step():
    budget = FailureBudget(5)
    budget.spend(7, 0.0, "lost")
    waits = [budget.spend_again(attempt, float(attempt), "lost") for attempt in (1, 2, 3)]
    assert waits == sorted(waits)
    assert budget.spend(7, 9.0, "lost") > 0  # the second at this step, not the fifth
    with pytest.raises(ClusterError, match="max_failures is 5"):
        budget.spend_again(1, 10.0, "lost")


def test_states_are_kept_as_often_as_three_percent_allow():
    assert choose_interval(1.0, 0.01, 0.01, on_cpu=True) == 1
    assert choose_interval(0.1, 0.003, 0.005, on_cpu=True) == 3
    assert choose_interval(0.1, 0.003, 0.5, on_cpu=False) == 5
    assert choose_interval(0.001, 1.0, 1.0, on_cpu=True) == 100


def test_with_fewer_workers_speeds_are_measured_anew(tmp_path):
    """Workers that cannot be replaced: four become two, whose steps take other times. The group's processes play no part here."""
    config = make_config({"workers": {"min": 1, "max": 4}, "model": {"layers": 32}, "steps": 3000, "checkpoint": {"every": 0}})
    group = SimpleNamespace(
        size=4, is_halfway=False, keeps_processes=True, config=config, common_step=lambda lost: 200, steps_done=lambda lost: 200,
        step_reports=lambda *_: [], reshape=lambda *_: [], call=lambda *_: [], count_available_workers=lambda lost: 2,
    )  # fmt: skip
    run = RunDirectory.create(tmp_path / "run", config)
    with Journal.open(run, 3000, 0, Console(file=io.StringIO())) as journal:
        inputs = SimpleNamespace(network=SimpleNamespace(at_stage=lambda *_: None))
        state = RunState(config, run, group, SimpleNamespace(abandon=lambda: None), journal, inputs)
        state.step_log.start_at(0)
        state.step_log.step = 200
        for _ in range(6):
            state.step_log.times.take("serial", 1.0)
        state.step_log.controller._state.verified = True
        assert not state.step_log.controller.accuracy_at(200).serial
        recovery = Recovery(state, group, Resizing(state, group))
        assert recovery.recover(WorkerLostError("workers 2, 3 were lost", frozenset({2, 3}))) == 200
        assert state.current_config.world == 2
        assert state.step_log.times.step_s == {}
        assert [state.step_log.controller.accuracy_at(step).serial for step in (200, 204)] == [True, True]


# Real workers killed -----------------------------------------------------------------------------------------------------------


def fail_at(worker, step, phase):
    """Have the worker process end itself in `phase` of `step`, as if it were killed; with phase "hang" it runs forever."""

    def install(self):
        engine, begun = self.engine, -1

        def end(*_):
            while phase == "hang":
                time.sleep(0.1)
            os._exit(1)

        class Ending(BoundBlock):
            layer = end

        if phase in ("forward", "hang"):
            inner = engine.block.bind

            def bind(batch):
                bound = inner(batch)
                return Ending(**vars(bound)) if batch.step == step else bound

            engine.block.bind = bind
        elif phase == "adjoint":
            parameter = next(iter(engine.block.layers[engine.block.indices[0]].parameters()))
            parameter.register_hook(lambda gradient: end() if begun == step else None)
            inner_batch = engine.step_batch

            def step_batch(at, *arguments, **named):
                nonlocal begun
                begun = at
                return inner_batch(at, *arguments, **named)

            engine.step_batch = step_batch
        else:
            inner_update = engine.update

            def update(at, norm, lr):
                inner_update(at, norm, lr)  # the others may have done theirs, or not
                if at == step:
                    end()

            engine.update = update

    ray.get(worker.__ray_call__.remote(install))


class Faulty(Driver):
    """A driver whose workers fail where `pending` says: (rank, step, phase)."""

    def _next_chunk(self, step):
        chunk = super()._next_chunk(step)
        for fault in list(self.pending):
            if step <= fault[1] < step + len(chunk):
                fail_at(self.workers.workers[fault[0]], fault[1], fault[2])
                self.pending.remove(fault)
        return chunk


def drive(config, path, faults=()):
    run = RunDirectory.create(path, config)
    return train_by(Faulty, config, run, pending=list(faults))


def undisturbed(rank, size, config):
    """Return the same run's result as one of `size` Gloo processes, without Ray or faults; for `run_processes`."""
    engine = make_engine(config, TorchChannel(timeout_s=60))
    stats = train_engine(engine, config.steps)
    return [(step.loss, step.findings.rho_forward) for step in stats], {
        name: p.detach().numpy().copy() for name, p in engine.block.parameters.items()
    }


def weights(run):
    from safetensors.torch import load_file

    folder = max((run / "checkpoints").glob("step_*"))
    return {f"{path.name}/{name}": value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "kind", [pytest.param("serial", marks=pytest.mark.study), "parallel", pytest.param("windows", marks=pytest.mark.study)]
)
def test_a_run_whose_workers_are_killed_ends_bit_equal(kind, tmp_path):
    mode, solver = ("parallel", "windows") if kind == "windows" else (kind, "mgrit")
    config = tiny(
        workers=3, steps=24, dtype="float32", mode=mode, snapshot_every=1, adaptive={"probe_every": 6}, model={"dropout": 0.1},
        spare_workers=True, solver=solver,
    )  # fmt: skip
    whole = run_processes(3, undisturbed, config)
    # The last worker's loss in the forward leaves the first one waiting for the one between.
    faults = [(1, 7, "adjoint"), (2, 17, "optimizer")] if kind == "serial" else [(2, 7, "forward"), (0, 17, "optimizer")]
    broken, _ = drive(config, tmp_path / "broken", faults)
    events = read(broken.directory / "events.jsonl")
    assert [e["ranks"] for e in events if e["kind"] == "fault"] == [[rank] for rank, _, _ in faults]
    restores = [e for e in events if e["kind"] == "restore"]
    assert [e["source"] for e in restores] == ["memory"] * 2
    assert all(e["steps_lost"] <= 1 for e in restores)
    assert [(m["loss"], m["rho_forward"]) for m in read(broken.directory / "metrics.jsonl")] == whole[0][0]
    expected = {name: value for _, parameters in whole for name, value in parameters.items()}
    found = {name.partition("/weight/")[2]: value for name, value in weights(broken.directory).items() if "/weight/" in name}
    assert expected.keys() - found.keys() == {"lm_head.weight"}  # the embedding's
    assert all(torch.equal(found[name], torch.from_numpy(expected[name])) for name in found)
    assert threading.active_count() < 50


@pytest.mark.study
@pytest.mark.usefixtures("ray_cluster")
def test_an_adaptive_run_whose_workers_are_killed_ends_bit_equal(tmp_path, monkeypatch):
    """A worker that joins gets what the others know of the layers' responses to changes."""
    monkeypatch.setattr(Controller, "_heed_times", lambda *_: None)  # measured times differ from run to run, and so may decisions
    adaptive = {"rule": "bias", "switch_at": None, "bias_limit": 10.0, "probe_every": 6}
    config = tiny(
        workers=3, steps=32, dtype="float32", mode="adaptive", solver="windows", snapshot_every=1, adaptive=adaptive, spare_workers=True,
        step={"middle": 1.0},
    )  # fmt: skip
    whole, _ = drive(config, tmp_path / "whole")
    broken, _ = drive(config, tmp_path / "broken", [(2, 13, "forward"), (0, 24, "optimizer")])
    events = read(broken.directory / "events.jsonl")
    assert [e["source"] for e in events if e["kind"] == "restore"] == ["memory"] * 2
    metrics = [read(run.directory / "metrics.jsonl") for run in (whole, broken)]
    assert [each["solve"] for each in metrics[0]].count("rolling") > 20
    for name in ("loss", "iterations_forward", "iterations_backward"):
        assert [each[name] for each in metrics[1]] == [each[name] for each in metrics[0]]
    wanted, found = weights(whole.directory), weights(broken.directory)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
