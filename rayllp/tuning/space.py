"""The space of a sweep: which settings vary, which values each can have, and on what conditions. Does no I/O and needs no cluster."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rayllp.errors import SettingsError

KINDS = ("choice", "int", "float", "log")
FORMS = "{choice: [a, b]}, {int: [low, high]}, {float: [low, high]}, {log: [low, high]} or {same: other.setting}"


@dataclass(frozen=True)
class Parameter:
    """A setting that varies.

    Attributes:
        name: dotted name of the setting.
        kind: "choice", "int", "float" (uniform) or "log" (its logarithm is uniform).
        values: the values of a choice; the two ends of a range.
        when: pairs of another setting's name and the values it must have for this one to vary. Otherwise this one keeps the value of the
            base config.
    """

    name: str
    kind: str
    values: tuple[Any, ...]
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def suggest(self, trial: Any) -> Any:
        """Return a value that an Optuna trial suggests."""
        if self.kind == "choice":  # Optuna's choices are scalars, so a list (of coarsening factors, say) is passed as JSON text
            return json.loads(trial.suggest_categorical(self.name, [json.dumps(value) for value in self.values]))
        low, high = self.values
        if self.kind == "int":
            return trial.suggest_int(self.name, low, high)
        return trial.suggest_float(self.name, low, high, log=self.kind == "log")

    def decode(self, suggested: Any) -> Any:
        """Return the setting's value for a suggestion of Optuna."""
        return json.loads(suggested) if self.kind == "choice" else suggested

    def encode(self, value: Any) -> Any:
        """Return Optuna's form of a value, the inverse of `decode`."""
        return json.dumps(value) if self.kind == "choice" else value

    def has(self, value: Any) -> bool:
        """True if the setting can have this value."""
        if self.kind == "choice":
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    def all(self) -> list[Any]:
        """Return all values, for a grid.

        Raises:
            SettingsError: it is a range of real numbers.
        """
        if self.kind == "choice":
            return list(self.values)
        if self.kind == "int":
            return list(range(self.values[0], self.values[1] + 1))
        raise SettingsError(f"space: {self.name} is a range of real numbers, too many for a grid: use choice, or another searcher")


@dataclass(frozen=True)
class Space:
    """All settings that differ between trials. A condition, or an alias, can only refer to settings before its own in the sweep file.

    Attributes:
        varying: the settings that vary, in the order of the file.
        aliases: maps each setting that is always the same as another one to that one.
    """

    varying: tuple[Parameter, ...]
    aliases: dict[str, str]

    @classmethod
    def parse(cls, written: Mapping[str, Any]) -> "Space":
        """Parse the `space` of a sweep file.

        Raises:
            SettingsError: it is empty, or an entry has none of the FORMS.
        """
        if not written:
            raise SettingsError("space is empty: name a setting and what it may be, such as mgrit.coarsening: {choice: [4, 8]}")
        varying: list[Parameter] = []
        aliases: dict[str, str] = {}
        before: list[str] = []
        for name, rule in written.items():
            if isinstance(rule, dict) and "same" in rule:
                aliases[name] = _alias(name, rule, before)
            else:
                varying.append(_parameter(name, rule, before))
            before.append(name)
        return cls(tuple(varying), aliases)

    def complete(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values, with those of the aliases added."""
        completed = dict(values)
        for name, other in self.aliases.items():
            if other in completed:
                completed[name] = completed[other]
        return completed

    def __call__(self, trial: Any) -> None:
        """Suggest all values to an Optuna trial: this is Optuna's define-by-run function."""
        values: dict[str, Any] = {}
        for parameter in self.active(values):
            values[parameter.name] = parameter.suggest(trial)

    def active(self, values: Mapping[str, Any]) -> Iterator[Parameter]:
        """Yield the parameters whose conditions hold. The caller must add each one's value to `values`, where later conditions look."""
        for parameter in self.varying:
            if all(values.get(name) in allowed for name, allowed in parameter.when):
                yield parameter

    def decode(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings for Optuna's suggestions."""
        known = {parameter.name: parameter for parameter in self.varying}
        return self.complete({name: known[name].decode(value) for name, value in suggested.items()})

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the suggestions of Optuna that give these settings; None if they are not in the space."""
        point: dict[str, Any] = {}
        for parameter in self.active(values):
            if not parameter.has(values.get(parameter.name)):
                return None
            point[parameter.name] = parameter.encode(values[parameter.name])
        return point

    def grid(self) -> list[dict[str, Any]]:
        """Return all combinations, each once."""
        choices: list[dict[str, Any]] = []
        axes = [(parameter.name, parameter.all()) for parameter in self.varying]
        for values in itertools.product(*(axis for _, axis in axes)):
            chosen = dict(zip((name for name, _ in axes), values, strict=True))
            active = {parameter.name for parameter in self.active(chosen)}
            settings = self.complete({name: value for name, value in chosen.items() if name in active})
            if settings not in choices:
                choices.append(settings)
        return choices

    def all_values(self, name: str) -> list[Any]:
        """Return the values of a choice or the two ends of a range; empty if the setting does not vary."""
        return [value for parameter in self.varying if parameter.name == name for value in parameter.values]


def _alias(name: str, rule: dict[str, Any], before: list[str]) -> str:
    other = rule["same"]
    if len(rule) != 1:
        raise SettingsError(f"space: {name} is {rule!r}: a setting that is the same as another one takes nothing beside `same`")
    if other not in before:
        raise SettingsError(f"space: {name} is the same as {other}, which is not in the space before it")
    return str(other)


def _parameter(name: str, rule: Any, before: list[str]) -> Parameter:
    where = f"space: {name}"
    if not isinstance(rule, dict):
        raise SettingsError(f"{where} is {rule!r}: write {FORMS}; a fixed value goes into `settings`")
    rule = dict(rule)
    when = rule.pop("when", {})
    if not isinstance(when, dict):
        raise SettingsError(f"{where}: when {when!r}: write the other setting and what it must be, {{other.setting: value}}")
    if len(rule) != 1 or next(iter(rule)) not in KINDS:
        raise SettingsError(f"{where} is {rule!r}: write one of {FORMS}, and `when` beside it if it does not always matter")
    ((kind, values),) = rule.items()
    if not isinstance(values, list) or not values:
        raise SettingsError(f"{where}: {kind} {values!r} is empty or no list: write {FORMS}")
    if kind != "choice":
        _check_range(where, kind, values)
    return Parameter(name, kind, tuple(values), tuple(_condition(where, other, allowed, before) for other, allowed in when.items()))


def _check_range(where: str, kind: str, values: list[Any]) -> None:
    number = int if kind == "int" else (int, float)
    if len(values) != 2 or not all(isinstance(value, number) and not isinstance(value, bool) and math.isfinite(value) for value in values):
        raise SettingsError(f"{where}: {kind} {values!r}: give two {'whole ' if kind == 'int' else ''}numbers, [low, high]")
    if values[0] > values[1] or (kind != "int" and values[0] == values[1]):
        raise SettingsError(f"{where}: {kind} {values!r} is an empty range: the first number must be below the second")
    if kind == "log" and values[0] <= 0:
        raise SettingsError(f"{where}: log {values!r}: a logarithm needs numbers above 0")


def _condition(where: str, other: str, allowed: Any, before: list[str]) -> tuple[str, tuple[Any, ...]]:
    if other not in before:
        raise SettingsError(f"{where}: when {other}: a condition is on a setting that stands before it in the space ({', '.join(before)})")
    return other, tuple(allowed) if isinstance(allowed, list) else (allowed,)
