"""`LayerParallelTrainer`: Ray's options as settings, and Ray's `Result`; one run on a cluster."""

import pytest
import ray.train
import ray.tune
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

import rayllp
from rayllp import LayerParallelTrainer
from rayllp.config import make_config
from rayllp.errors import NonFiniteError, SettingsError
from tests.conftest import tiny


def settings(**options):
    trainer = LayerParallelTrainer(**options)
    return trainer.config, trainer.output


def test_rays_options_are_settings(tmp_path):
    assert settings() == (rayllp.TrainConfig(), None)
    config, _ = settings(config={"steps": 7}, scaling_config=ScalingConfig(num_workers=3))
    assert (config.steps, config.world, config.device, config.resize_check_s) == (7, 3, "cpu", 10)
    elastic = ScalingConfig(num_workers=(1, 4), use_gpu=True, elastic_resize_monitor_interval_s=5)
    config, _ = settings(scaling_config=elastic)
    assert (config.workers.min, config.workers.max, config.device, config.resize_check_s) == (1, 4, "cuda", 5)
    kept = RunConfig(
        name="mine", storage_path=str(tmp_path), checkpoint_config=CheckpointConfig(num_to_keep=5), failure_config=FailureConfig(-1)
    )
    config, output = settings(config={"checkpoint": {"every": 3}}, run_config=kept)
    assert (config.checkpoint.keep, config.checkpoint.every, output) == (5, 3, tmp_path / "mine")
    assert config.max_failures > 10**6
    config, output = settings(run_config=RunConfig(name="mine", storage_path="s3://bucket/runs/"))
    assert (config.checkpoint.path, config.max_failures, output) == ("s3://bucket/runs/mine", 10, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling_config": ScalingConfig(num_workers=0)}, "num_workers=0: .*give at least 1"),
        ({"scaling_config": ScalingConfig(resources_per_worker={"CPU": 2})}, r"ScalingConfig\(resources_per_worker=.*has no meaning"),
        ({"scaling_config": ScalingConfig(placement_strategy="SPREAD")}, "placement_strategy='SPREAD'.*leave it out"),
        ({"scaling_config": {"num_workers": 2}}, "scaling_config is a dict: give a ray.train.ScalingConfig"),
        ({"run_config": ray.tune.RunConfig()}, "run_config is a ray.tune.*: give a ray.train.RunConfig"),
        ({"run_config": RunConfig(worker_runtime_env={"pip": ["x"]})}, r"RunConfig\(worker_runtime_env=.*listeners"),
        ({"run_config": RunConfig(checkpoint_config=CheckpointConfig(checkpoint_score_attribute="x"))}, "checkpoint_score_attribute='x'"),
        (
            {"config": make_config({"workers": 4}), "scaling_config": ScalingConfig(num_workers=2)},
            "workers=4 in the settings, and scaling_config says 2: leave it out in one of them",
        ),
        (
            {"config": {"checkpoint": {"keep": 4}}, "run_config": RunConfig(checkpoint_config=CheckpointConfig(num_to_keep=1))},
            "checkpoint.keep=4 in the settings, and run_config says 1",
        ),
        ({"scaling_config": ScalingConfig(num_workers=40)}, "scaling_config: .*40 layer-parallel workers for 16 middle layers"),
    ],
)
def test_options_that_do_not_apply_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        LayerParallelTrainer(**options)


def test_a_run_gives_rays_result(kept_workers, tmp_path):
    config = tiny(steps=6, workers=None, eval={"every": 2, "batches": 1, "sample": 0}, checkpoint={"every": 2, "best": True})
    run = RunConfig(name="mine", storage_path=str(tmp_path), checkpoint_config=CheckpointConfig(num_to_keep=9))
    result = LayerParallelTrainer(config, scaling_config=ScalingConfig(num_workers=2), run_config=run).fit()
    assert isinstance(result, ray.train.Result)
    assert (result.path, result.error) == (str(tmp_path / "mine"), None)
    frame, found = result.metrics_dataframe, result.return_value
    assert list(frame["training_iteration"]) == [1, 2, 3, 4, 5, 6]
    assert frame["validation_loss"].isna().tolist() == [True, False] * 3
    assert result.metrics["validation_loss"] == found.validation_loss
    assert result.metrics["loss"] == frame["loss"].iloc[-1]
    assert result.checkpoint.path == str(tmp_path / "mine" / "checkpoints" / "step_6")
    steps = [metrics["training_iteration"] for _, metrics in result.best_checkpoints]
    assert steps == [2, 4, 6]
    best = min((2, 4, 6), key=lambda step: frame["validation_loss"][step - 1])
    assert result.get_best_checkpoint("validation_loss", "min").path.endswith(f"step_{best}")
    with pytest.raises(SettingsError, match="holds another run"):
        LayerParallelTrainer(config, run_config=run).fit()


def test_a_failure_is_rays_with_ours_as_its_cause(monkeypatch):
    def failing(*_, **__):
        raise NonFiniteError("step 3: the loss is not finite")

    monkeypatch.setattr("rayllp.cluster.trainer.train", failing)
    with pytest.raises(ray.train.TrainingFailedError, match="step 3: the loss is not finite") as caught:
        LayerParallelTrainer().fit()
    assert isinstance(caught.value.__cause__, NonFiniteError)
