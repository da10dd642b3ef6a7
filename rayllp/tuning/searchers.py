"""Who chooses trials: Optuna through Ray Tune, or a grid. Settings that do not go together never become a trial."""

import pickle
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from rayllp.errors import SettingsError
from rayllp.tuning.sweep import Sweep

MOST_INFEASIBLE = 200
"""Suggestions in a row that are refused, or were tried before, after which the search ends."""


def build_searcher(sweep: Sweep) -> "FeasibleSearch | GridSearch":
    """The sweep's searcher.

    Raises:
        SettingsError: optuna is missing.
    """
    if sweep.searcher == "grid":
        return GridSearch(sweep)
    try:
        import optuna
    except ImportError:
        raise SettingsError(f"searcher {sweep.searcher} needs optuna: pip install 'rayllp[tune]', or use searcher: grid") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    metrics = list(sweep.objective.metrics)
    # Pareto's front is found by NSGA-II or TPE; the latter needs fewer trials.
    kinds = {"optuna": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    inner = OptunaSearch(
        space=sweep.parameters,
        metric=metrics if len(metrics) > 1 else metrics[0],
        mode=["min"] * len(metrics) if len(metrics) > 1 else "min",
        sampler=kinds[sweep.searcher](seed=sweep.seed),
    )
    return FeasibleSearch(inner, sweep)


class _Search(Searcher):
    """What both have in common.

    Attributes:
        infeasible: choices that were refused, and why; no actor was started for them.
    """

    def __init__(self, sweep: Sweep) -> None:
        metrics = sweep.objective.metrics
        super().__init__(metric=metrics[0], mode="min")
        self.sweep = sweep
        self.infeasible: list[tuple[dict[str, Any], str]] = []
        self.given = 0

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        """The space and the objective are the sweep's own."""
        return True

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))  # as Tune's own state: tune.run refuses others' folders

    def on_trial_result(self, trial_id: str, result: Any) -> None: ...

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None: ...


class FeasibleSearch(_Search):
    """Asks Optuna again where a suggestion is no valid config, and tells it so."""

    def __init__(self, inner: OptunaSearch, sweep: Sweep) -> None:
        super().__init__(sweep)
        self.inner = inner
        self._names: dict[str, str] = {}  # trials as the inner searcher knows them
        self._keys: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """The next settings that can be a trial: the base first, nothing twice, nothing that does not go together."""
        if self.given >= self.sweep.trials:
            return Searcher.FINISHED
        if not self.given and self.sweep.begins_with_base:
            return self._give(trial_id, self._default(trial_id))
        for attempt in range(MOST_INFEASIBLE):
            name = f"{trial_id}.{attempt}"
            found = self.inner.suggest(name)
            if found is None or found == Searcher.FINISHED:
                return found
            chosen = self.sweep.parameters.decode(found)
            why = self.sweep.problem(chosen)
            if why is None and self._is_new(chosen):
                self._names[trial_id] = name
                return self._give(trial_id, chosen)
            if why is not None:
                self.infeasible.append((chosen, why))
            self.inner.on_trial_complete(name, error=True)
        return Searcher.FINISHED

    def _is_new(self, chosen: dict[str, Any]) -> bool:
        """Whether no trial has these settings: one says as much of them as two, since runs are functions of their settings."""
        key = self.sweep.config(chosen).model_dump_json()
        if key in self._keys:
            return False
        self._keys.add(key)
        return True

    def _give(self, trial_id: str, chosen: dict[str, Any]) -> dict[str, Any]:
        self.given += 1
        return {"settings": chosen}

    def _default(self, trial_id: str) -> dict[str, Any]:
        """The base config; Optuna is told of it where it is a point of the space."""
        self._is_new({})
        point = self.sweep.parameters.encode(self.sweep.base_values())
        if point is not None:
            self.inner._ot_study.enqueue_trial(point)
            self._names[trial_id] = f"{trial_id}.default"
            self.inner.suggest(self._names[trial_id])
        return {}

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        """Passed on, for trials that are the searcher's own."""
        if trial_id in self._names:
            self.inner.on_trial_result(self._names[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Passed on, likewise."""
        name = self._names.pop(trial_id, None)
        if name is not None:
            self.inner.on_trial_complete(name, result, error)


class GridSearch(_Search):
    """All combinations that are valid configs, in order."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        self.points: list[dict[str, Any]] = []
        for chosen in sweep.parameters.grid():
            why = sweep.problem(chosen)
            if why is None:
                self.points.append(chosen)
            else:
                self.infeasible.append((chosen, why))

    def suggest(self, trial_id: str) -> Any:
        """The next point, until all were given."""
        if self.given >= len(self.points):
            return Searcher.FINISHED
        self.given += 1
        return {"settings": self.points[self.given - 1]}
