"""Read YAML by version 1.2, each value by its setting's type, so that a path which looks like a number stays a path."""

import io
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from rayllp.errors import SettingsError

Kinds = Callable[[tuple[str, ...]], Any]
"""Function that returns the type of the setting at a path of keys; None: any type."""
_TAG = "tag:yaml.org,2002:"


def parse_yaml(text: str, kinds: Kinds, path: tuple[str, ...] = ()) -> Any:
    """Return the content of a YAML document.

    Args:
        text: the document.
        kinds: types of the settings in it.
        path: keys under which the document stands among the settings.

    Raises:
        SettingsError: it is not YAML, or a key is given twice; the message begins with the line.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
        return None if node is None else _Reader(yaml, kinds).value(node, path, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = ": indent by spaces, not by tabs" if "\\t" in str(error.problem) else ""
        raise SettingsError(f"line {mark.line + 1 if mark else '?'}: {error.problem}{hint}") from None
    except (YAMLError, ValueError) as error:
        raise SettingsError(str(error)) from None


def parse_value(text: str, kinds: Kinds, path: tuple[str, ...]) -> Any:
    """Return a value given on the command line.

    For a setting that takes text, that is the text itself, unless it is quoted or null; for any other, what YAML makes of it.

    Raises:
        SettingsError: there is no value. An empty text is written "", and "not set" is written null.
    """
    text, kind = text.strip(), kinds(path)
    plain = is_text(kind) and not _takes_list(kind)
    if not text or (text.startswith("#") and not plain):
        raise SettingsError("no value: write null for none, or quote the text")
    if plain and text[0] not in "'\"":
        return None if text in ("null", "~") else text
    try:
        return parse_yaml(text, kinds, path)
    except SettingsError:
        return text  # checking the setting will say what it takes


def to_text(values: Any) -> str:
    """Write plain values as YAML that every YAML parser reads alike."""
    yaml = YAML(typ="safe", pure=True)
    options = {"default_flow_style": False, "allow_unicode": False, "sort_base_mapping_type_on_output": False, "width": 2**20}
    for name, value in options.items():
        setattr(yaml, name, value)
    out = io.StringIO()
    yaml.dump(values, out)
    return out.getvalue()


def kind_in(model: type[BaseModel], path: tuple[str, ...]) -> Any:
    """Return the type of the setting at a path of names within a group of settings; None if there is none."""
    kind: Any = model
    for name in path:
        field = kind.model_fields.get(name) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        if field is None:
            return None
        kind = field.annotation
    return kind


def is_text(kind: Any) -> bool:
    """True if a setting of this type (or each element, if it is a list) is text and never a number or a boolean."""
    return _scalars(kind) == {str}


def _takes_list(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list) or (get_origin(kind) in (Union, UnionType) and any(map(_takes_list, get_args(kind))))


def _scalars(kind: Any) -> set[Any]:
    """Return the types of all single values that a setting of this type may hold."""
    origin = get_origin(kind)
    if origin is Literal:
        return {type(value) for value in get_args(kind)}
    if origin in (Union, UnionType, tuple, list):
        return {scalar for part in get_args(kind) if part is not Ellipsis for scalar in _scalars(part)}
    return set() if kind in (None, NoneType) else {kind}


class _Reader:
    """Converts YAML nodes to values."""

    def __init__(self, yaml: YAML, kinds: Kinds) -> None:
        self.yaml, self.kinds = yaml, kinds

    def value(self, node: Node, path: tuple[str, ...], around: tuple[Node, ...]) -> Any:
        """Return the value of a node; `around` are the nodes that contain it."""
        if any(node is outer for outer in around):
            raise SettingsError(f"line {node.start_mark.line + 1}: {'.'.join(path)} contains itself")
        if isinstance(node, MappingNode):
            return self._mapping(node, path, (*around, node))
        if isinstance(node, SequenceNode):
            return [self.value(item, path, (*around, node)) for item in node.value]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, self.kinds(path))

    def _mapping(self, node: MappingNode, path: tuple[str, ...], around: tuple[Node, ...]) -> dict[str, Any]:
        """Return a mapping, with the mappings that it merges by `<<` beneath its own keys."""
        inherited: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise SettingsError(f"line {line}: a key is a {key.id}; write a name, such as steps: 100")
            if key.tag == f"{_TAG}merge":
                for other in value.value if isinstance(value, SequenceNode) else [value]:
                    merged = self.value(other, path, around)
                    if not isinstance(merged, dict):
                        raise SettingsError(f"line {line}: << takes a mapping, or a list of them")
                    inherited = {**merged, **inherited}
                continue
            name = str(key.value)
            if name in lines:
                raise SettingsError(f"line {line}: {name} is given again, after line {lines[name]}: keep one of the two")
            lines[name] = line
            own[name] = self.value(value, (*path, name), around)
        return {**inherited, **own}

    def _scalar(self, node: ScalarNode, kind: Any) -> Any:
        """Return a single value: as YAML 1.2 has it, but as text if the setting takes text."""
        tag = str(node.tag).removeprefix(_TAG)
        if node.style is not None or tag not in ("null", "bool", "int", "float") or (tag != "null" and is_text(kind)):
            return str(node.value)
        constructor = self.yaml.constructor
        return getattr(constructor, f"construct_yaml_{tag}")(node)
