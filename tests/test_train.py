"""Whole runs on a real Ray cluster, which share processes: what a run writes, meshes, resuming, damaged checkpoints, refusals."""

import json
import shutil
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rayllp
from rayllp.checkpoint.torchbraid import TorchBraidWeights
from rayllp.cluster import session
from rayllp.errors import CheckpointError, ClusterError, DataError, SettingsError
from rayllp.report import RunDirectory
from tests import test_torchbraid_weights as theirs
from tests.conftest import losses_over_threads, tiny

pytestmark = pytest.mark.usefixtures("kept_workers")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    return [metric["loss"] for metric in read(run / "metrics.jsonl")]


def living_actors():
    from ray._private.state import actors  # the public listing needs a dashboard

    return [actor for actor in actors().values() if actor["State"] == "ALIVE"]


def placement_groups():
    from ray.util import placement_group_table

    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def wait_until(condition, limit_s=20):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s} s in vain"
        time.sleep(0.1)


class Heard(rayllp.Listener):
    def __init__(self):
        self.steps, self.kinds = [], set()

    def on_step(self, metric):
        self.steps.append(metric["step"])

    def on_event(self, step, kind, details):
        self.kinds.add(kind)


HEARD = Heard()


@pytest.fixture(scope="module")
def parallel_run(kept_workers, tmp_path_factory):
    adaptive = {"probe_every": 4, "lipschitz_every": 2}
    evaluations = {"every": 5, "batches": 2, "sample": 8}
    config = tiny(workers=2, steps=12, adaptive=adaptive, eval=evaluations, model={"layers": 20}, timeline_every=4)
    return config, rayllp.train(config, output=tmp_path_factory.mktemp("runs") / "parallel μ", listeners=[HEARD])


def test_a_run_records_timelines_and_tells_listeners(parallel_run):
    _, result = parallel_run
    lines = read(result.directory / "timeline.jsonl")
    assert [line["step"] for line in lines] == [2, 6, 10]
    for worker, spans in zip(lines[-1]["workers"], lines[-1]["spans"], strict=True):
        assert sum(worker[part] for part in ("compute", "send", "wait", "other")) == pytest.approx(worker["seconds"], abs=1e-4)
        assert worker["compute"] > 0
        assert worker["phases"]["forward last sweep"] > 0
        assert 2**26 < worker["peak_bytes"] < 2**34
        assert all(0 <= begin <= end <= worker["seconds"] + 1e-5 for begin, end, *_ in spans)
    assert HEARD.steps == list(range(12))
    assert "checkpoint" in HEARD.kinds


def test_a_run_writes_what_the_design_names(parallel_run):
    config, result = parallel_run
    run = result.directory
    metrics = read(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(12))
    assert set(metrics[0]) == {
        "step", "loss", "mode", "solve", "probed", "iterations_forward", "iterations_backward", "rho_forward", "rho_backward",
            "rho_by_point", "bias", "tolerance",
        "cosine", "noise", "loss_gap", "bias_by_layer", "bias_against", "consistency", "consistency_weight", "lipschitz", "grad_norm", "lr",
        "step_time_s", "tokens", "tokens_per_s", "mfu", "workers",
    }  # fmt: skip
    assert {m["mode"] for m in metrics} == {"parallel"}
    assert {m["workers"] for m in metrics} == {2}
    assert [m["step"] for m in metrics if m["rho_forward"] is not None] == [0, 3, 7, 11]
    assert [(m["step"], len(m["lipschitz"])) for m in metrics if m["lipschitz"] is not None] == [(0, 20), (7, 20)]
    assert metrics[3]["iterations_forward"] == 4
    assert metrics[4]["iterations_forward"] == 2
    assert [e["step"] for e in read(run / "evals.jsonl")] == [5, 10, 12]
    assert result.validation_loss == read(run / "evals.jsonl")[-1]["loss"]
    assert len(result.sample) > 8
    assert rayllp.load_config(run / "config.yaml") == config
    assert [e["kind"] for e in read(run / "events.jsonl")] == ["checkpoint"]
    assert (run / "checkpoints" / "step_12" / "manifest.json").exists()
    curves = EventAccumulator(str(run / "tensorboard")).Reload().Tags()["scalars"]
    assert {"train/loss", "lipschitz/layer_00000", "lipschitz/layer_00019", "validation/loss"} <= set(curves)


def test_actors_compute_what_threads_compute(parallel_run):
    config, result = parallel_run
    assert losses(result.directory) == pytest.approx(losses_over_threads(config, 12), abs=1e-12)


def test_replicas_times_layers(tmp_path):
    settings = {"steps": 8, "dtype": "float32", "model": {"dropout": 0.1}}
    config = tiny(workers=None, mesh={"data": 2, "layer": 2}, optimizer={"sharded": True}, **settings)
    run = rayllp.train(config, output=tmp_path / "run").directory
    assert losses(run) == pytest.approx(losses_over_threads(tiny(workers=2, **settings), 8), abs=1e-5)


def test_a_checkpoint_goes_on_with_any_number_of_workers(tmp_path):
    config = tiny(workers=2, steps=10, checkpoint={"every": 4, "keep": 9}, mode="serial")
    whole = rayllp.train(config, output=tmp_path / "whole").directory
    copy = RunDirectory.create(tmp_path / "copy", config)
    for name in ("metrics.jsonl", "evals.jsonl", "events.jsonl"):
        (copy.path / name).write_bytes((whole / name).read_bytes())
    copy.checkpoints.mkdir()
    (whole / "checkpoints" / "step_4").rename(copy.checkpoints / "step_4")
    resumed = rayllp.train(tiny(workers=3, steps=10, checkpoint={"every": 0, "keep": 9}, mode="serial"), resume=copy.path)
    assert resumed.steps == 10
    assert losses(copy.path) == pytest.approx(losses(whole), abs=1e-10)
    events = read(copy.path / "events.jsonl")
    assert [e["kind"] for e in events][-3:] == ["settings", "restore", "checkpoint"]
    assert events[-3]["changed"] == {"checkpoint.every": [4, 0], "workers": [2, 3]}


def test_more_workers_or_gpus_than_the_cluster_has(tmp_path):
    with pytest.raises(ClusterError, match="needs 2 GPUs, but the cluster has 0"):
        rayllp.train(tiny(workers=2, device="cuda"), output=tmp_path / "a")
    with pytest.raises(ClusterError, match="8 workers need 8 CPUs, but the cluster has 4"):
        rayllp.train(tiny(workers=8), output=tmp_path / "b")
    assert not (tmp_path / "a").exists()


def test_an_output_directory_with_another_run(parallel_run, tmp_path):
    config, result = parallel_run
    before = sorted(path.name for path in result.directory.iterdir())
    with pytest.raises(SettingsError, match="holds another run: choose another with --output"):
        rayllp.train(config, output=result.directory)
    assert sorted(path.name for path in result.directory.iterdir()) == before
    with pytest.raises(CheckpointError, match="not a run directory"):
        rayllp.train(resume=tmp_path)


def test_texts_that_do_not_serve(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    for path, message in (("missing.txt", "no such file"), ("empty.txt", "holds no text"), ("short.txt", "fewer than one sequence of 16")):
        with pytest.raises(DataError, match=message):
            rayllp.train(tiny(data={"path": str(tmp_path / path)}), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Checkpoints that are damaged or cannot be written ---------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    run = rayllp.train(tiny(workers=1, steps=6, checkpoint={"every": 2, "keep": 3}), output=tmp_path / "run").directory
    before = losses(run)
    piece = run / "checkpoints" / "step_6" / "head.safetensors"
    piece.write_bytes(piece.read_bytes()[:-8])  # cut short
    assert rayllp.train(resume=run).steps == 6
    events = read(run / "events.jsonl")
    assert "damaged checkpoint" in next(e for e in events if e["kind"] == "fault")["reason"]
    assert next(e for e in events if e["kind"] == "restore")["path"].endswith("step_4")
    assert losses(run) == before
    for folder in (run / "checkpoints").iterdir():
        data = bytearray((folder / "layer_00003.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "layer_00003.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layer_00003.*altered"):
        rayllp.train(resume=run)


def test_a_run_goes_on_by_its_output_directory_or_its_checkpoints(tmp_path):
    place = tmp_path / "elsewhere"
    settings = {"steps": 6, "checkpoint": {"every": 3, "keep": 3, "path": place.as_uri()}}  # through fsspec, as an object store
    config = tiny(workers=1, **settings)
    run = rayllp.train(config, output=tmp_path / "run").directory
    before = losses(run)
    assert sorted(path.name for path in place.iterdir()) == ["step_3", "step_6"]
    assert not (run / "checkpoints").exists()
    (run / "evals.jsonl").unlink()  # as if its driver had been killed, in the middle of two lines and of a write
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 6, "lo')
    (place / "step_6" / "manifest.json").unlink()
    assert rayllp.train(config, output=run).steps == 6
    assert losses(run) == before
    read(run / "events.jsonl")
    # Its directory is lost: the same command goes on from the checkpoints; another run's are refused.
    shutil.rmtree(place / "step_6")
    again = rayllp.train(tiny(workers=2, **settings), output=tmp_path / "new").directory
    assert losses(again) == pytest.approx(before[3:], abs=1e-10)
    with pytest.raises(SettingsError, match=r"holds checkpoints of a run with other seed: give each run a place"):
        rayllp.train(tiny(workers=1, seed=1, **settings), output=tmp_path / "other")
    with pytest.raises(SettingsError, match="Unsupported filesystem"):
        rayllp.train(tiny(checkpoint={"path": "nowhere://bucket/run"}), output=tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be written"):
        rayllp.train(tiny(checkpoint={"path": str(tmp_path / "file" / "below")}), output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_goes_on_from_torchbraids_weights_and_back(tmp_path):
    weights = TorchBraidWeights.of(theirs.rank_states(theirs.network(theirs.StepLayer)))
    config = theirs.settings(workers=2, checkpoint={"every": 3})
    run = rayllp.train(config, output=tmp_path / "run", model=theirs.stack(weights, theirs.StepLayer), batches=theirs.Points())
    back = TorchBraidWeights.of_run(run.directory)
    assert len(back.layers) == theirs.LAYERS
    assert back.ends.keys() == weights.ends.keys()
    assert all(a.keys() == b.keys() for a, b in zip(back.layers, weights.layers, strict=True))
    assert not torch.equal(back.layers[3]["mix.weight"], weights.layers[3]["mix.weight"])  # it was trained


def test_these_runs_had_the_same_processes(parallel_run):
    before = {actor["ActorID"] for actor in living_actors()}
    rayllp.train(tiny(workers=1, steps=1), output=parallel_run[1].directory.parent / "one more")
    assert len(before) >= 4
    assert {actor["ActorID"] for actor in living_actors()} == before
    with pytest.raises(SettingsError, match=r"5 workers within keep_workers\(4\): keep 5, or lower workers"):
        session._kept_workers.pool(tiny(workers=5), "cpu")
    with pytest.raises(SettingsError, match="keep_workers within keep_workers"), rayllp.keep_workers(1):
        pass
