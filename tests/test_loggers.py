"""`log_to`: TensorBoard, Weights & Biases and MLflow; the latter two where they are installed, without a network."""

import io
import json

import pytest
from rich.console import Console

from rayllp.config import load_config, make_config
from rayllp.errors import SettingsError
from rayllp.report import Journal, RunDirectory
from rayllp.report import loggers as module
from rayllp.report.loggers import Service, opened_loggers
from rayllp.report.run_directory import changed_settings
from rayllp.training.prepare import validate
from tests.conftest import tiny
from tests.synthetic import metric


@pytest.mark.parametrize("there", [False, True], ids=["nothing", "a folder of that name"])
def test_a_missing_package_is_refused_before_any_actor(monkeypatch, tmp_path, there):
    monkeypatch.setattr(module, "PACKAGES", {"wandb": "not_a_package_at_all"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if there:
        (tmp_path / "not_a_package_at_all").mkdir()
    with pytest.raises(SettingsError, match=r"log_to has wandb, and the package .* is not installed here: pip install 'rayllp\[wandb\]'"):
        validate(tiny(log_to=["tensorboard", "wandb"]))
    assert validate(tiny()).data_set is not None


def test_a_service_that_is_not_known_is_refused():
    with pytest.raises(SettingsError, match=r"log_to.*'tensorboard', 'wandb' or 'mlflow'.*'comet'"):
        load_config(None, ["log_to=[comet]"])
    assert load_config(None, ["log_to=[mlflow, wandb]"]).log_to == ("mlflow", "wandb")


def test_tensorboard_can_be_left_out(tmp_path):
    for name, drawn in (("a", True), ("b", False)):
        config = tiny(log_to=["tensorboard"] if drawn else [])
        run = RunDirectory.create(tmp_path / name, config)
        with opened_loggers(config, run, print) as loggers, Journal.open(run, 3, 0, Console(file=io.StringIO()), loggers) as journal:
            journal.step(metric(0))
        assert (run.path / "tensorboard").exists() is drawn


class Failing(Service):
    """A service that fails after its first point."""

    name = "wandb"

    def begin(self, config, run, known):
        self.told = []
        return "7"

    def log(self, values, step):
        if self.told:
            raise OSError("no route to host")
        self.told.append((step, values["train/loss"]))

    def end(self):
        raise AssertionError("nothing more is logged there")


def test_a_service_that_fails_costs_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Wandb", Failing)
    heard = []
    config = tiny(log_to=["wandb"])
    with opened_loggers(config, RunDirectory.create(tmp_path / "run", config), heard.append) as (service,):
        for step in range(3):
            service.on_step(metric(step))
        service.on_evaluation(3, {"loss": 1.0})
    assert service.told == [(0, 4.0)]
    assert heard == ["WARNING: wandb failed (no route to host): nothing more is logged there, and training goes on"]

    def cannot(*_):
        raise OSError("no key")

    monkeypatch.setattr(Failing, "begin", cannot)
    with (
        pytest.raises(SettingsError, match="log_to: wandb cannot begin: no key; leave it out"),
        opened_loggers(config, RunDirectory.create(tmp_path / "other", config), heard.append),
    ):
        pass


def two_sittings(path, name):
    """Log a run and its resumption; return what the run has stored about the services."""
    config = tiny(log_to=[name], steps=3, optimizer={"lr": 0.125})
    run, heard = RunDirectory.create(path / "run", config), []
    for steps in ((0, 1), (1, 2)):  # the second is done again
        with opened_loggers(config, run, heard.append) as (service,):
            for step in steps:
                service.on_step(metric(step, loss=4.0 - step))
            service.on_evaluation(steps[-1] + 1, {"loss": 2.5})
    assert heard == []
    return json.loads((run.path / "loggers.json").read_text())[name]


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    try:
        number = two_sittings(tmp_path, "mlflow")
        client = mlflow.MlflowClient()
        found = client.get_run(number)
        assert found.info.status == "FINISHED"
        assert found.info.run_name == "run"
        assert found.data.params["optimizer.lr"] == "0.125"
        assert "seed" not in found.data.params  # at its default
        assert [(point.step, point.value) for point in client.get_metric_history(number, "train/loss")] == [(0, 4), (1, 3), (1, 3), (2, 2)]
        assert {point.step for point in client.get_metric_history(number, "validation/loss")} == {2, 3}
    finally:
        mlflow.set_tracking_uri(before)


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    number = two_sittings(tmp_path, "wandb")
    kept = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{number}"))
    assert kept
    assert any(b"train/tokens_per_s" in file.read_bytes() for folder in kept for file in folder.glob("*.wandb"))


def test_settings_that_have_no_default_are_among_those_that_differ():
    """A range of workers flattens to two names, which the defaults do not have."""
    changed = changed_settings(make_config({"workers": {"min": 1, "max": 2}, "seed": 3}))
    assert changed == {"workers.min": 1, "workers.max": 2, "seed": 3}
