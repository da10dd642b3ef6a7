"""What varies in a sweep: settings by dotted name, each with what it may be, and when it matters. Pure, but for Optuna's own trial."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rayllp.errors import SettingsError

KINDS = ("choice", "int", "float", "log", "same")
FORMS = "{choice: [a, b]}, {int: [low, high]}, {float: [low, high]}, {log: [low, high]} or {same: other.setting}"


@dataclass(frozen=True)
class Parameter:
    """One setting.

    Attributes:
        kind: choice, int, float (uniform), log (float, uniform in its logarithm), or same (as another one).
        values: of a choice; of a range its ends; of same the other's name.
        when: other settings' names, and what they must be for this one to vary; it keeps the base config's value otherwise.
    """

    name: str
    kind: str
    values: tuple[Any, ...]
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def suggest(self, trial: Any) -> Any:
        """A value, by an Optuna trial."""
        if self.kind == "choice":  # Optuna's choices are plain: a list of coarsening factors is written as text
            return json.loads(trial.suggest_categorical(self.name, [json.dumps(value) for value in self.values]))
        low, high = self.values
        if self.kind == "int":
            return trial.suggest_int(self.name, low, high)
        return trial.suggest_float(self.name, low, high, log=self.kind == "log")

    def decode(self, suggested: Any) -> Any:
        """The setting's value of what Optuna calls it."""
        return json.loads(suggested) if self.kind == "choice" else suggested

    def encode(self, value: Any) -> Any:
        """The reverse of `decode`."""
        return json.dumps(value) if self.kind == "choice" else value

    def has(self, value: Any) -> bool:
        """Whether this may be `value`."""
        if self.kind == "choice":
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    def all(self) -> list[Any]:
        """All values, for a grid."""
        if self.kind == "choice":
            return list(self.values)
        if self.kind == "int":
            return list(range(self.values[0], self.values[1] + 1))
        raise SettingsError(f"space: {self.name} is a range of real numbers, of which a grid has no end: use choice, or another searcher")


@dataclass(frozen=True)
class Space:
    """All that varies, in the file's order; a condition names what stands before it."""

    parameters: tuple[Parameter, ...]

    @classmethod
    def parse(cls, written: Mapping[str, Any], source: str) -> "Space":
        """Of a sweep file's `space`.

        Raises:
            SettingsError: empty, or something that is none of FORMS.
        """
        if not written:
            raise SettingsError(
                f"{source}: space is empty: name a setting and what it may be, such as mgrit.coarsening: {{choice: [4, 8]}}"
            )
        found: list[Parameter] = []
        for name, rule in written.items():
            found.append(_parameter(name, rule, [parameter.name for parameter in found], source))
        return cls(tuple(found))

    def complete(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """With those that are the same as another."""
        found = dict(values)
        for parameter in self.parameters:
            if parameter.kind == "same" and parameter.values[0] in found:
                found[parameter.name] = found[parameter.values[0]]
        return found

    def __call__(self, trial: Any) -> None:
        """Optuna's define-by-run function."""
        values: dict[str, Any] = {}
        for parameter in self.varying(values):
            values[parameter.name] = parameter.suggest(trial)

    def varying(self, values: Mapping[str, Any]) -> Iterator[Parameter]:
        """Those that vary, given what was chosen for those before them: `values` is looked at as it grows."""
        for parameter in self.parameters:
            if parameter.kind != "same" and all(values.get(name) in allowed for name, allowed in parameter.when):
                yield parameter

    def decode(self, suggested: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of what Optuna suggested."""
        known = {parameter.name: parameter for parameter in self.parameters}
        return self.complete({name: known[name].decode(value) for name, value in suggested.items()})

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """What Optuna would suggest for these settings; None: they are not in the space."""
        found: dict[str, Any] = {}
        for parameter in self.varying(values):
            if not parameter.has(values.get(parameter.name)):
                return None
            found[parameter.name] = parameter.encode(values[parameter.name])
        return found

    def grid(self) -> list[dict[str, Any]]:
        """All combinations, each once."""
        found: list[dict[str, Any]] = []
        axes = [(parameter.name, parameter.all()) for parameter in self.parameters if parameter.kind != "same"]
        for values in itertools.product(*(axis for _, axis in axes)):
            chosen = dict(zip((name for name, _ in axes), values, strict=True))
            varying = {parameter.name for parameter in self.varying(chosen)}
            kept = self.complete({name: value for name, value in chosen.items() if name in varying})
            if kept not in found:
                found.append(kept)
        return found

    def all_values(self, name: str) -> list[Any]:
        """What a setting may be; of a range its ends; nothing if it does not vary."""
        return [value for parameter in self.parameters if parameter.name == name and parameter.kind != "same" for value in parameter.values]


def _parameter(name: str, rule: Any, before: list[str], source: str) -> Parameter:
    where = f"{source}: space: {name}"
    if not isinstance(rule, dict):
        raise SettingsError(f"{where} is {rule!r}: write {FORMS}; a fixed value goes into `settings`")
    rule = dict(rule)
    when = rule.pop("when", {})
    if not isinstance(when, dict):
        raise SettingsError(f"{where}: when {when!r}: write the other setting and what it must be, {{other.setting: value}}")
    if len(rule) != 1 or next(iter(rule)) not in KINDS:
        raise SettingsError(f"{where} is {rule!r}: write one of {FORMS}, and `when` beside it if it does not always matter")
    ((kind, values),) = rule.items()
    if kind == "same":
        if values not in before:
            raise SettingsError(f"{where} is the same as {values}, which is not in the space before it")
        return Parameter(name, kind, (values,))
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
