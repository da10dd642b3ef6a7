"""The loggers that the setting `log_to` names: TensorBoard, and the services Weights & Biases and MLflow, which get settings and curves.

A resumed run continues its run in the service, whose identifier is stored in RUN/loggers.json. If a service fails during training, the
user is warned, and training goes on without it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any, ClassVar

from rayllp.config import TrainConfig
from rayllp.errors import SettingsError
from rayllp.report.journal import SCALARS, Listener
from rayllp.report.run_directory import RunDirectory, changed_settings, flatten
from rayllp.report.tensorboard import TensorBoard

KNOWN = "loggers.json"
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
"""For each name in log_to, the package that it needs. rayllp has an extra of the same name that installs it."""


def check_loggers(config: TrainConfig) -> None:
    """Check that the packages of all services in `log_to` are installed.

    Raises:
        SettingsError: a package is missing.
    """
    for name in config.log_to:
        if name not in PACKAGES:
            continue
        spec = find_spec(PACKAGES[name])
        if spec is None or spec.origin is None:  # a plain folder, such as wandb creates, is found, too, but is not the package
            raise SettingsError(
                f"log_to has {name}, and the package {PACKAGES[name]} is not installed here: pip install 'rayllp[{name}]', or leave it out"
            )


@contextmanager
def opened_loggers(config: TrainConfig, run: RunDirectory, say: Callable[[str], None], first_step: int = 0) -> Iterator[list[Listener]]:
    """Open the loggers of `log_to` for one session of a run, and close them at the end; yields them as listeners.

    Args:
        say: shows the user a line of text.
        first_step: number of steps that are done already.

    Raises:
        SettingsError: a service cannot be started.
    """
    path = run.path / KNOWN
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    with ExitStack() as stack:
        loggers: list[Listener] = []
        if "tensorboard" in config.log_to:
            board = TensorBoard(config, run, first_step)
            stack.callback(board.close)
            loggers.append(board)
        begun = False
        for kind in (Wandb, MLflow):
            if kind.name in config.log_to:
                service = kind(config, run, known.get(kind.name), say)
                stack.callback(service.close)
                known[kind.name] = service.id
                loggers.append(service)
                begun = True
        if begun:
            run.write_text(KNOWN, json.dumps(known) + "\n")
        yield loggers


class Service(Listener):
    """A logging service. Subclasses define `begin`, `log` and `end`.

    Attributes:
        id: identifier of the run in the service.
    """

    name: ClassVar[str]

    def __init__(self, config: TrainConfig, run: RunDirectory, known: str | None, say: Callable[[str], None]) -> None:
        self._say, self._is_open = say, True
        try:
            self.id = self.begin(config, run, known)
        except Exception as error:  # packages raise errors of their own
            raise SettingsError(f"log_to: {self.name} cannot begin: {error}; leave it out, or see its documentation") from error

    def begin(self, config: TrainConfig, run: RunDirectory, known: str | None) -> str:
        """Start a run in the service, or continue the one with the identifier `known`; return its identifier."""
        raise NotImplementedError

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""
        raise NotImplementedError

    def end(self) -> None:
        """Finish at the end of the session."""
        raise NotImplementedError

    def on_step(self, metric: Mapping[str, Any]) -> None:
        """Log the curves of a step."""
        values = {f"train/{name}": metric[name] for name in SCALARS if metric[name] is not None}
        self._try(lambda: self.log({**values, "train/serial": float(metric["mode"] == "serial")}, metric["step"]))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the validation loss and metrics."""
        self._try(lambda: self.log({f"validation/{name}": value for name, value in metrics.items()}, step))

    def close(self) -> None:
        """Finish at the end of the session, unless the service has failed."""
        self._try(self.end)

    def _try(self, do: Callable[[], None]) -> None:
        if not self._is_open:
            return
        try:
            do()
        except Exception as error:  # packages raise errors of their own
            self._is_open = False
            self._say(f"WARNING: {self.name} failed ({error}): nothing more is logged there, and training goes on")


class Wandb(Service):
    """Weights & Biases. It reads environment variables such as WANDB_PROJECT and WANDB_MODE itself."""

    name = "wandb"

    def begin(self, config: TrainConfig, run: RunDirectory, known: str | None) -> str:
        """Start or continue the run. Its local files are in RUN/wandb."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rayllp"), name=run.path.name, dir=run.path, id=known, resume="allow",
            config=config.model_dump(mode="json"),
        )  # fmt: skip
        # By default points of steps that are repeated, after a failure or a resume, would be dropped.
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log points with our own step as the x-axis."""
        self._run.log({**values, "step": step})

    def end(self) -> None:
        """Send what has not been sent yet."""
        self._run.finish()


class MLflow(Service):
    """MLflow. It reads environment variables such as MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME itself."""

    name = "mlflow"

    def begin(self, config: TrainConfig, run: RunDirectory, known: str | None) -> str:
        """Start or continue the run. Settings that differ from their defaults become parameters; all are in the artifact config.json."""
        import mlflow

        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            mlflow.set_experiment("rayllp")
        self._mlflow, begun = mlflow, mlflow.start_run(run_id=known, run_name=run.path.name)
        if known is None:
            mlflow.log_params({name: str(value)[:500] for name, value in changed_settings(config).items()})
        mlflow.log_dict(flatten(config.model_dump(mode="json")), "config.json")
        return str(begun.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log points in the background."""
        self._mlflow.log_metrics(dict(values), step=step, synchronous=False)

    def end(self) -> None:
        """Send what has not been sent yet."""
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()
