"""Traces of the steps that `profile.steps` chooses. One worker in this process, without Ray."""

import gzip
import json

import pytest

from rayllp.cluster.worker import BlockWorker
from rayllp.config import load_config
from rayllp.control import Controller
from rayllp.errors import SettingsError
from rayllp.report import RunDirectory
from tests.conftest import make_engine, tiny


def test_chosen_steps_are_traced(tmp_path):
    config = tiny(profile={"steps": [1]}, model={"layers": 8}, mgrit={"coarsening": 2}, mode="serial")
    worker, accuracy = BlockWorker(0, config, 1), Controller(config).accuracy
    worker.engine = make_engine(config)
    reports = worker.run([(step, accuracy, None) for step in range(3)])
    assert [each.trace is not None for each in reports] == [False, True, False]
    assert not any(each.trace for each in worker.step_reports(0, 3))  # they are too large to be remembered
    run = RunDirectory.create(tmp_path / "run", config)
    run.trace(1, 0, reports[1].trace)
    (file,) = (run.path / "profile").iterdir()
    assert file.name == "step_1_worker_0.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert {"aten::embedding", "aten::native_layer_norm", "aten::addmm"} <= names
    plain = make_engine(tiny(model={"layers": 8}, mgrit={"coarsening": 2}, mode="serial"))
    assert [each.stats.loss for each in reports] == [plain.train_step(step, accuracy).loss for step in range(3)]


def test_steps_that_there_are_not():
    with pytest.raises(SettingsError, match=r"profile.steps \[3, 250\]: a run of 250 steps has steps 0 to 249"):
        load_config(None, ["profile.steps=[3, 250]"])
