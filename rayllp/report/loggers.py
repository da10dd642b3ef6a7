"""Weights & Biases and MLflow, by the setting `log_to`: what TensorBoard gets of steps and evaluations, and the settings.

A run that goes on goes on in the same run there: RUN/loggers.json has its identifiers. A service that fails on the way costs a warning and
what it would have shown, never the training.
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
from rayllp.report.rundir import RunDirectory, changed_settings, flatten

KNOWN = "loggers.json"
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
"""By what log_to names, the package that it needs, and the extra of rayllp's that brings it."""


def check_loggers(config: TrainConfig) -> None:
    """Refuse a service whose package is not installed.

    Raises:
        SettingsError: as said.
    """
    for name in config.log_to:
        if name not in PACKAGES:
            continue
        spec = find_spec(PACKAGES[name])
        if spec is None or spec.origin is None:  # a folder of that name, such as wandb makes, is no package
            raise SettingsError(
                f"log_to has {name}, and the package {PACKAGES[name]} is not installed here: pip install 'rayllp[{name}]', or leave it out"
            )


@contextmanager
def opened_loggers(config: TrainConfig, run: RunDirectory, say: Callable[[str], None]) -> Iterator[list[Listener]]:
    """What is to be told of this sitting, besides TensorBoard.

    Args:
        say: shows a line to the person who watches.

    Raises:
        SettingsError: a service cannot begin.
    """
    path = run.path / KNOWN
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    with ExitStack() as stack:
        services: list[Listener] = []
        for kind in (Wandb, MLflow):
            if kind.name in config.log_to:
                service = kind(config, run, known.get(kind.name), say)
                stack.callback(service.close)
                known[kind.name] = service.id
                services.append(service)
        if services:
            run.write_text(KNOWN, json.dumps(known) + "\n")
        yield services


class Service(Listener):
    """One of them: `begin`, `log` and `end` are its own.

    Attributes:
        id: of the run, as the service has it.
    """

    name: ClassVar[str]

    def __init__(self, config: TrainConfig, run: RunDirectory, known: str | None, say: Callable[[str], None]) -> None:
        self._say, self._is_open = say, True
        try:
            self.id = self.begin(config, run, known)
        except Exception as error:  # whatever the package raises
            raise SettingsError(f"log_to: {self.name} cannot begin: {error}; leave it out, or see its documentation") from error

    def begin(self, config: TrainConfig, run: RunDirectory, known: str | None) -> str:
        """Begin the run there, or go on with the one that is known; its identifier."""
        raise NotImplementedError

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves."""
        raise NotImplementedError

    def end(self) -> None:
        """The sitting has ended."""
        raise NotImplementedError

    def step(self, metric: Mapping[str, Any]) -> None:
        """What TensorBoard shows of a step."""
        values = {f"train/{name}": metric[name] for name in SCALARS if metric[name] is not None}
        self._try(lambda: self.log({**values, "train/serial": float(metric["mode"] == "serial")}, metric["step"]))

    def event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Nothing: events are in RUN/events.jsonl."""

    def evaluation(self, step: int, found: Mapping[str, float]) -> None:
        """Loss and metrics of held-out data."""
        self._try(lambda: self.log({f"validation/{name}": value for name, value in found.items()}, step))

    def close(self) -> None:
        """The sitting has ended."""
        self._try(self.end)

    def _try(self, do: Callable[[], None]) -> None:
        if not self._is_open:
            return
        try:
            do()
        except Exception as error:  # whatever the package raises
            self._is_open = False
            self._say(f"WARNING: {self.name} failed ({error}): it is told no more, and training goes on")


class Wandb(Service):
    """Weights & Biases. WANDB_PROJECT, WANDB_MODE and the like are its own."""

    name = "wandb"

    def begin(self, config: TrainConfig, run: RunDirectory, known: str | None) -> str:
        """Files of the run there are below RUN/wandb."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rayllp"), name=run.path.name, dir=run.path, id=known, resume="allow",
            config=config.model_dump(mode="json"),
        )  # fmt: skip
        # Steps that are done again after a fault, or a resume, would otherwise be dropped.
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Points over our own step."""
        self._run.log({**values, "step": step})

    def end(self) -> None:
        """Send what is left."""
        self._run.finish()


class MLflow(Service):
    """MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the like are its own."""

    name = "mlflow"

    def begin(self, config: TrainConfig, run: RunDirectory, known: str | None) -> str:
        """As parameters the settings that are not at their default; all of them as the artifact config.json."""
        import mlflow

        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            mlflow.set_experiment("rayllp")
        self._mlflow, begun = mlflow, mlflow.start_run(run_id=known, run_name=run.path.name)
        if known is None:
            mlflow.log_params({name: str(value)[:500] for name, value in changed_settings(config).items()})
        mlflow.log_dict(flatten(config.model_dump(mode="json")), "config.json")
        return str(begun.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """In the background."""
        self._mlflow.log_metrics(dict(values), step=step, synchronous=False)

    def end(self) -> None:
        """Send what is left."""
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()
