"""Every setting as a table, made from the code: for `rayllp settings` and the docs."""

from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from rayllp.config import TrainConfig


def settings_table() -> str:
    """A Markdown table: name, type, default, meaning."""
    lines = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {kind} | `{default}` | {text} |" for name, kind, default, text in _rows(TrainConfig())]
    return "\n".join(lines)


def _rows(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _kind(field.annotation), _plain(value), (field.description or "").replace("|", "\\|")


def _kind(annotation: Any) -> str:
    arguments, origin = get_args(annotation), get_origin(annotation)
    if origin is Literal:
        return ", ".join(str(argument) for argument in arguments)
    if origin in (Union, type(int | str)):
        return " or ".join(_kind(argument) for argument in arguments if argument is not type(None))
    if origin is tuple:
        return "list of " + _kind(arguments[0])
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(annotation, str(annotation))


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)
