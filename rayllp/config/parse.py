"""YAML by the rules of version 1.2, and each value by its setting's type: a path that looks like a number stays a path."""

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
"""The type of the setting at a path of keys; None: anything."""
_TAG = "tag:yaml.org,2002:"


def parse_yaml(text: str, kinds: Kinds, path: tuple[str, ...] = ()) -> Any:
    """What a YAML document says.

    Args:
        kinds: types of the settings in it.
        path: keys that lead to the whole document.

    Raises:
        SettingsError: no YAML, or a key that is given twice; begins with the line.
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
    """A value from the command line: for a setting that takes text the text itself, unless it is quoted or null; else as YAML has it.

    Raises:
        SettingsError: it is empty; text for such a setting would be "", and none is null.
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
        return text  # the setting says what it takes


def to_text(values: Any) -> str:
    """YAML of plain values, which any YAML parser reads alike."""
    yaml = YAML(typ="safe", pure=True)
    options = {"default_flow_style": False, "allow_unicode": False, "sort_base_mapping_type_on_output": False, "width": 2**20}
    for name, value in options.items():
        setattr(yaml, name, value)
    out = io.StringIO()
    yaml.dump(values, out)
    return out.getvalue()


def kind_in(model: type[BaseModel], path: tuple[str, ...]) -> Any:
    """The type of the setting at a path of names within a group of settings; None: there is none."""
    kind: Any = model
    for name in path:
        field = kind.model_fields.get(name) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        if field is None:
            return None
        kind = field.annotation
    return kind


def is_text(kind: Any) -> bool:
    """Whether a setting of this type, or each part of a list, is text and never a number or a truth value."""
    return _scalars(kind) == {str}


def _takes_list(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list) or (get_origin(kind) in (Union, UnionType) and any(map(_takes_list, get_args(kind))))


def _scalars(kind: Any) -> set[Any]:
    origin = get_origin(kind)
    if origin is Literal:
        return {type(value) for value in get_args(kind)}
    if origin in (Union, UnionType, tuple, list):
        return {found for part in get_args(kind) if part is not Ellipsis for found in _scalars(part)}
    return set() if kind in (None, NoneType) else {kind}


class _Reader:
    """Makes values of YAML's nodes."""

    def __init__(self, yaml: YAML, kinds: Kinds) -> None:
        self.yaml, self.kinds = yaml, kinds

    def value(self, node: Node, path: tuple[str, ...], around: tuple[Node, ...]) -> Any:
        """What a node says; `around` are those that it is in."""
        if any(node is outer for outer in around):
            raise SettingsError(f"line {node.start_mark.line + 1}: {'.'.join(path)} contains itself")
        if isinstance(node, MappingNode):
            return self._mapping(node, path, (*around, node))
        if isinstance(node, SequenceNode):
            return [self.value(item, path, (*around, node)) for item in node.value]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, self.kinds(path))

    def _mapping(self, node: MappingNode, path: tuple[str, ...], around: tuple[Node, ...]) -> dict[str, Any]:
        inherited: dict[str, Any] = {}
        found: dict[str, Any] = {}
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
            found[name] = self.value(value, (*path, name), around)
        return {**inherited, **found}

    def _scalar(self, node: ScalarNode, kind: Any) -> Any:
        tag = str(node.tag).removeprefix(_TAG)
        if node.style is not None or tag not in ("null", "bool", "int", "float") or (tag != "null" and is_text(kind)):
            return str(node.value)
        constructor = self.yaml.constructor
        return getattr(constructor, f"construct_yaml_{tag}")(node)
