"""A run's metrics as gauges on Ray's dashboard and in Prometheus, named ray_rayllp_… and tagged with the run's name."""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from rayllp.report import Listener

GAUGES = {
    "loss": "training loss",
    "validation_loss": "validation loss at the last evaluation, with the exact forward",
    "rho_forward": "convergence factor of the forward solve at the last probe",
    "rho_backward": "convergence factor of the adjoint solve at the last probe",
    "bias": "relative error of the gradient at the last probe",
    "step_time_s": "seconds of a training step",
    "tokens_per_s": "tokens (for images: patches) per second",
    "mfu": "model FLOPs utilisation, where the devices' peak is known",
    "parallel": "1 in layer-parallel mode, 0 in serial mode",
    "workers": "workers at work",
    "step": "steps done",
}


class ClusterMetrics(Listener):
    """A listener that sets gauges to the values of the last step and evaluation."""

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(f"rayllp_{name}", description, tag_keys=("run",)) for name, description in GAUGES.items()}
        tag = run.encode("ascii", "backslashreplace").decode()  # Ray accepts ASCII tags only
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": tag})

    def on_step(self, metric: Mapping[str, Any]) -> None:
        """Set the gauges to what a step measured."""
        same = "loss rho_forward rho_backward bias step_time_s tokens_per_s mfu workers"
        values = {name: metric[name] for name in same.split()}
        values |= {
            "parallel": float(metric["mode"] == "parallel"),
            "step": metric["step"] + 1,
        }
        for name, value in values.items():
            if value is not None:
                self._gauges[name].set(float(value))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauge of the validation loss."""
        self._gauges["validation_loss"].set(metrics["loss"])
