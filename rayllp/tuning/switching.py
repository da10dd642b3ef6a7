"""A Tune scheduler that wraps another one. It switches trials whose probes exceed a limit to serial mode, and may shrink serial trials.

Tune has no public call to change a running trial. So, as in Tune's population based training, the trial is paused just after it has
reported a checkpoint, its config and resources are changed, and it is resumed. All such calls are in this file.
"""

from collections.abc import Callable
from typing import Any

from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from rayllp.tuning.sweep import Sweep

FORCED, SHRUNK = "forced_serial", "shrunk"
"""Keys in a trial's config that say what was done to it."""


class SwitchingScheduler(TrialScheduler):
    """Wraps the scheduler that compares trials.

    Args:
        inner: that scheduler; None: trials are not compared.
        resources: returns the resources of a trial with a given number of workers.
    """

    def __init__(self, inner: TrialScheduler | None, sweep: Sweep, resources: Callable[[int], PlacementGroupFactory]) -> None:
        super().__init__()
        self.inner, self.sweep, self.resources = inner or FIFOScheduler(), sweep, resources

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Return the inner scheduler's decision. A trial that goes on and is to be changed is paused and changed first."""
        decision = self.inner.on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.CONTINUE:
            return decision
        config, workers = self._changed(trial.config, result)
        if config == trial.config:
            return decision
        tune_controller.pause_trial(trial, should_checkpoint=False)
        trial.set_config(config)
        if workers is not None:
            trial.update_resources(self.resources(workers))
        return TrialScheduler.NOOP

    def _changed(self, config: dict[str, Any], result: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
        """Return the trial's config from now on, and its number of workers if that changes."""
        settings, limits, workers = dict(config["settings"]), self.sweep.limits, None
        marks = {name: config.get(name, False) for name in (FORCED, SHRUNK)}
        serial = result["last_mode"] == "serial"
        measured = ((limits.rho, result["largest_rho"]), (limits.bias, result["bias"]))
        over = any(limit is not None and value is not None and value > limit for limit, value in measured)
        if over and not serial and not marks[FORCED]:
            settings["mode"], marks[FORCED], serial = "serial", True, True
        if serial and self.sweep.on_serial == "shrink" and not marks[SHRUNK]:
            before = self.sweep.config(settings).world
            if self.sweep.serial_workers < before:
                workers = self.sweep.serial_workers
                # The trial stays serial, since a controller that switched back to parallel steps would have no workers to do them.
                settings |= {"workers": workers, "mesh.layer": None, "mesh.blocks": None, "mode": "serial"}
            marks[SHRUNK] = True
        return {**config, "settings": settings, **{name: True for name, set_ in marks.items() if set_}}, workers

    # Calls that are passed on to the inner scheduler -------------------------------------------------------------------------------

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Pass the call on to the inner scheduler."""
        return bool(self.inner.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Pass the call on to the inner scheduler."""
        self.inner.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Pass the call on to the inner scheduler."""
        self.inner.on_trial_error(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Pass the call on to the inner scheduler."""
        self.inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Pass the call on to the inner scheduler."""
        self.inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Pass the call on to the inner scheduler."""
        return self.inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """Pass the call on to the inner scheduler."""
        return str(self.inner.debug_string())
