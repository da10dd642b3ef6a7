"""Searchers, which choose the settings of trials: Optuna through Ray Tune, or a grid. Invalid combinations never become trials."""

import pickle
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from rayllp.errors import SettingsError
from rayllp.tuning.sweep import Sweep

MOST_INFEASIBLE = 200
"""The search ends after this many suggestions in a row that are invalid or were tried before."""


def build_searcher(sweep: Sweep) -> "FeasibleSearch | GridSearch":
    """Return the searcher of a sweep.

    Raises:
        SettingsError: optuna is not installed.
    """
    if sweep.searcher == "grid":
        return GridSearch(sweep)
    try:
        import optuna
    except ImportError:
        raise SettingsError(f"searcher {sweep.searcher} needs optuna: pip install 'rayllp[tune]', or use searcher: grid") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    metrics = list(sweep.objective.metrics)
    # Both NSGA-II and TPE can find a Pareto front; TPE needs fewer trials.
    kinds = {"optuna": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    inner = OptunaSearch(
        space=sweep.search_space,
        metric=metrics if len(metrics) > 1 else metrics[0],
        mode=["min"] * len(metrics) if len(metrics) > 1 else "min",
        sampler=kinds[sweep.searcher](seed=sweep.seed),
    )
    return FeasibleSearch(inner, sweep)


class _Search(Searcher):
    """Base of the searchers.

    Attributes:
        infeasible: choices of settings that were refused, each with the reason. No actor was started for them.
        given: number of trials suggested so far.
    """

    def __init__(self, sweep: Sweep) -> None:
        metrics = sweep.objective.metrics
        super().__init__(metric=metrics[0], mode="min")
        self.sweep = sweep
        self.infeasible: list[tuple[dict[str, Any], str]] = []
        self.given = 0

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        """Accept Tune's call without using it: the sweep itself says what the space and the objective are."""
        return True

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        # This is pickled, like Tune's own state. `rayllp.tune` therefore refuses to resume a sweep with files of other users.
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))

    def on_trial_result(self, trial_id: str, result: Any) -> None: ...

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None: ...


class FeasibleSearch(_Search):
    """Suggests those of Optuna's suggestions that are valid settings; Optuna is told which ones were not."""

    def __init__(self, inner: OptunaSearch, sweep: Sweep) -> None:
        super().__init__(sweep)
        self.inner = inner
        self._names: dict[str, str] = {}  # names of trials in the inner searcher, by trial id
        self._keys: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """Return the settings of the next trial. The first may be the base config; what is invalid or was tried before is skipped."""
        if self.given >= self.sweep.trials:
            return Searcher.FINISHED
        if not self.given and self.sweep.begins_with_base:
            return self._give(self._default(trial_id))
        for attempt in range(MOST_INFEASIBLE):
            name = f"{trial_id}.{attempt}"
            suggestion = self.inner.suggest(name)
            if suggestion is None or suggestion == Searcher.FINISHED:
                return suggestion
            chosen = self.sweep.search_space.decode(suggestion)
            why = self.sweep.problem(chosen)
            if why is None and self._is_new(chosen):
                self._names[trial_id] = name
                return self._give(chosen)
            if why is not None:
                self.infeasible.append((chosen, why))
            self.inner.on_trial_complete(name, error=True)
        return Searcher.FINISHED

    def _is_new(self, chosen: dict[str, Any]) -> bool:
        """True if no trial has had these settings. A second one would give the same result, since a run depends on its settings only."""
        key = self.sweep.config(chosen).model_dump_json()
        if key in self._keys:
            return False
        self._keys.add(key)
        return True

    def _give(self, chosen: dict[str, Any]) -> dict[str, Any]:
        self.given += 1
        return {"settings": chosen}

    def _default(self, trial_id: str) -> dict[str, Any]:
        """Return the choices of the base config, which are none, and tell Optuna of that trial if it is a point of the space."""
        self._is_new({})
        point = self.sweep.search_space.encode(self.sweep.base_values())
        if point is not None:
            self.inner._ot_study.enqueue_trial(point)
            self._names[trial_id] = f"{trial_id}.default"
            self.inner.suggest(self._names[trial_id])
        return {}

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        """Pass a result on to Optuna, if it has suggested the trial."""
        if trial_id in self._names:
            self.inner.on_trial_result(self._names[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Pass the final result on to Optuna, if it has suggested the trial."""
        name = self._names.pop(trial_id, None)
        if name is not None:
            self.inner.on_trial_complete(name, result, error)


class GridSearch(_Search):
    """Suggests all valid combinations of the space, in order."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        self.points: list[dict[str, Any]] = []
        for chosen in sweep.search_space.grid():
            why = sweep.problem(chosen)
            if why is None:
                self.points.append(chosen)
            else:
                self.infeasible.append((chosen, why))

    def suggest(self, trial_id: str) -> Any:
        """Return the next point, until there are no more."""
        if self.given >= len(self.points):
            return Searcher.FINISHED
        self.given += 1
        return {"settings": self.points[self.given - 1]}
