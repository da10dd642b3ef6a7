"""A scheduler around another one: makes trials whose probes look bad go on in serial mode, and serial ones give workers back.

Both change a running trial, for which Tune has no public call: as its population based training does, the trial is paused (it has just
reported a checkpoint), its config and resources are changed, and it is continued. These calls are all in this file.
"""

from collections.abc import Callable
from typing import Any

from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from rayllp.tuning.sweep import Sweep

FORCED, SHRUNK = "forced_serial", "shrunk"
"""Marks in a trial's config."""


class SwitchingScheduler(TrialScheduler):
    """Wraps the scheduler that compares trials.

    Args:
        resources: of a trial, by its number of workers.
    """

    def __init__(self, inner: TrialScheduler | None, sweep: Sweep, resources: Callable[[int], PlacementGroupFactory]) -> None:
        super().__init__()
        self.inner, self.sweep, self.resources = inner or FIFOScheduler(), sweep, resources

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """The inner scheduler's decision; a trial that is to be forced or to shrink is paused."""
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
        """The trial's config from now on, and its number of workers, if that changes too."""
        settings, limits, workers = dict(config["settings"]), self.sweep.limits, None
        marks = {name: config.get(name, False) for name in (FORCED, SHRUNK)}
        serial = result["last_mode"] == "serial"
        found = ((limits.rho, result["largest_rho"]), (limits.bias, result["bias"]))
        over = any(limit is not None and value is not None and value > limit for limit, value in found)
        if over and not serial and not marks[FORCED]:
            settings["mode"], marks[FORCED], serial = "serial", True, True
        if serial and self.sweep.on_serial == "shrink" and not marks[SHRUNK]:
            before = self.sweep.config(settings).world
            if self.sweep.serial_workers < before:
                workers = self.sweep.serial_workers
                # For good: a controller that came back to parallel steps would have nobody to do them with.
                settings |= {"workers": workers, "mesh.layer": None, "mesh.blocks": None, "mode": "serial"}
            marks[SHRUNK] = True
        return {**config, "settings": settings, **{name: True for name, set_ in marks.items() if set_}}, workers

    # As the inner one has it ------------------------------------------------------------------------------------------------------

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Passed on."""
        return bool(self.inner.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Passed on."""
        self.inner.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Passed on."""
        self.inner.on_trial_error(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Passed on."""
        self.inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Passed on."""
        self.inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Passed on."""
        return self.inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """Passed on."""
        return str(self.inner.debug_string())
