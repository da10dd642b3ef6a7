"""Read settings from YAML with overrides, write them, and explain faults in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rayllp.config.parse import Kinds, kind_in, parse_value, parse_yaml, to_text
from rayllp.config.train import TrainConfig
from rayllp.errors import NotARunError, SettingsError, fault_text, nearest_name

MOVED = {
    "mesh.placement": "solver: windows takes layers in turn, mgrit blocks of neighbouring ones",
    "mgrit.window": "windows.length",
    "mgrit.recompute": "recompute",
    "adaptive.cut_windows": "windows.rolling",
    "windows.cut": "windows.rolling",
    "windows.fit": "windows.rolling",
}
"""Settings of earlier versions, and what has taken their place."""


def make_config(values: Mapping[str, Any], *, source: str = "settings") -> TrainConfig:
    """Return a checked config from nested values.

    Args:
        values: settings by name, groups as mappings.
        source: where they come from, for errors.

    Raises:
        SettingsError: lists every fault found, one per line, each with the setting's name.
    """
    try:
        return TrainConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(fault, values) for fault in error.errors()]
        raise SettingsError(f"{source}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])) from None


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read a YAML file (None: all defaults), apply `key=value` overrides, and check the result.

    Raises:
        SettingsError: the file cannot be read, an override is malformed, or a setting breaks a rule.
    """
    values: dict[str, Any] = {}
    if path is not None:
        loaded = read_yaml(path, "a YAML file")
        if loaded is not None and not isinstance(loaded, dict):
            raise SettingsError(f"{path} holds a {type(loaded).__name__}; it must be a mapping of settings")
        values = loaded or {}
    for override in overrides:
        set_value(values, override)
    return make_config(values, source=str(path) if path else "settings")


def kind_of_setting(path: tuple[str, ...]) -> Any:
    """Return the type of a run's setting, given the names that lead to it; None if there is no such setting."""
    return kind_in(TrainConfig, path)


def read_yaml(path: str | Path, wanted: str, kinds: Kinds = kind_of_setting) -> Any:
    """Return the content of a YAML file.

    Args:
        path: the file.
        wanted: what the user should give the path of, for errors.
        kinds: types of the settings in the file.

    Raises:
        SettingsError: the file cannot be read, or is not YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror or error}; give the path of {wanted}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); give the path of {wanted}") from None
    try:
        return parse_yaml(text, kinds)
    except SettingsError as error:
        raise SettingsError(f"{path} is not YAML that could be read: {error}") from None


def check_run(run: Path) -> None:
    """Refuse a directory that is not a run's.

    Raises:
        NotARunError: it has no config.yaml.
    """
    if not (run / "config.yaml").is_file():
        raise NotARunError(f"{run} is not a run directory (no config.yaml): give the directory that a run printed")


def load_run_config(run: Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read the settings of the run in this directory and apply `key=value` overrides, as `load_config` does.

    Raises:
        NotARunError: the directory is not a run's.
    """
    check_run(run)
    return load_config(run / "config.yaml", overrides)


def set_value(values: dict[str, Any], override: str, kinds: Kinds = kind_of_setting) -> None:
    """Apply one override `a.b=value` in place; the setting's type decides how the value is read.

    Raises:
        SettingsError: there is no key or no value, or the key leads into something that is not a group.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {override!r}: write key=value, such as mgrit.coarsening=8")
    *path, last = key.strip().split(".")
    try:
        value = parse_value(text, kinds, (*path, last))
    except SettingsError as error:
        raise SettingsError(f"--set {override!r}: {error}") from None
    for part in path:
        if values.get(part) is None:  # the file names this group and leaves it empty
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise SettingsError(f"--set {override!r}: {part} is not a group of settings")
    values[last] = value


def setting_names(model: type[BaseModel] = TrainConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += setting_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _explain(fault: Any, values: Mapping[str, Any]) -> str:
    """Return one fault that pydantic found as a sentence for the user, with a similar name if the setting is unknown."""
    name = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("tuple", "literal", "function", "constrained")))
    if name in MOVED:
        return f"{name} is now {MOVED[name]}"
    if fault["type"] == "extra_forbidden":
        meant = nearest_name(name, setting_names())
        return f"unknown setting {name}" + (f"; did you mean {meant}?" if meant else "; `rayllp settings` lists them all")
    message = fault_text(fault)
    given = f" (given: {fault['input']!r})" if name and not isinstance(fault["input"], dict | BaseModel) else ""
    return f"{name}: {message}{given}" if name else message


def to_yaml(config: TrainConfig) -> str:
    """Return all settings as YAML, defaults included."""
    return to_text(config.model_dump(mode="json"))
