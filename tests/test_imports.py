"""The direction of imports within rayllp: rooms point one way, and no modules import each other in a circle (docs/design.md)."""

import ast
from functools import cache
from pathlib import Path

ROOMS = [
    "version", "errors", "quantities", "state", "keys", "hf_config", "channel", "mgrit", "timeline", "config", "data", "models", "control",
    "engine", "checkpoint", "plan", "report", "training", "cluster", "bench", "tuning", "cli", "__main__", "__init__",
]  # fmt: skip
"""From below to above: a module may import its own room, and rooms before it."""

RAY = {"cluster", "tuning"}
"""Rooms that import Ray; all others run without."""

PACKAGE = Path(__file__).parents[1] / "rayllp"


def find_imports(package: Path) -> dict[str, set[str]]:
    """Return for each module what it imports, inside functions and under TYPE_CHECKING too; modules of the package have full names."""
    paths = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                source = node.module or ""
                if node.level:  # relative: from the package that the module is in, or is
                    base = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                    source = ".".join([*base[: len(base) - node.level + 1], *filter(None, [source])])
                # `from package import module` imports the module, all else what `source` is.
                found[module] |= {name if (name := f"{source}.{alias.name}") in paths else source for alias in node.names}
    return found


@cache
def ours() -> dict[str, set[str]]:
    """Return the imports of rayllp."""
    return find_imports(PACKAGE)


def room_of(module: str) -> str:
    """Return the first part of a module's name below the package; "__init__" for the package itself."""
    return [*module.split("."), "__init__"][1]


def wrong_way(imports: dict[str, set[str]], rooms: list[str]) -> set[tuple[str, str]]:
    """Return imports by a module from a room that is above its own."""
    package = next(iter(imports)).split(".")[0]
    inner = [(module, other) for module, others in imports.items() for other in others if other.split(".")[0] == package]
    return {(module, other) for module, other in inner if rooms.index(room_of(other)) > rooms.index(room_of(module))}


def in_circles(imports: dict[str, set[str]]) -> set[str]:
    """Return the modules that import themselves by way of others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = imports.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
        return seen

    return {module for module in imports if module in reached(module)}


def test_every_room_has_its_place():
    rooms = {room_of(module) for module in ours()}
    assert rooms == set(ROOMS), "a new room wants a place in ROOMS, and a line in docs/design.md"


def test_rooms_point_one_way():
    assert wrong_way(ours(), ROOMS) == set()


def test_no_modules_import_each_other():
    assert in_circles(ours()) == set()


def test_the_solver_and_the_engine_know_neither_cluster_nor_ray():
    for module, others in ours().items():
        if room_of(module) not in RAY:
            assert not {other for other in others if other.split(".")[0] == "ray"}, module
        if room_of(module) in ("mgrit", "engine", "models", "channel", "control"):
            assert not {other for other in others if other.startswith("rayllp.cluster")}, module
        if room_of(module) == "mgrit":
            assert {room_of(other) for other in others if other.startswith("rayllp")} <= {"mgrit", "channel", "state", "errors"}, module


def made_up(folder: Path, files: dict[str, str]) -> dict[str, set[str]]:
    """Return the imports of a package that consists of these files."""
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return find_imports(folder / "house")


def test_a_wrong_import_is_found(tmp_path):
    right = {
        "low/__init__.py": "",
        "low/a.py": "import torch",
        "high/__init__.py": "",
        "high/b.py": "from house.low import a\nimport ray.tune",
    }
    imports = made_up(tmp_path / "right", right)
    assert imports["house.high.b"] == {"house.low.a", "ray.tune"}
    assert wrong_way(imports, ["low", "high", "__init__"]) == set()
    assert in_circles(imports) == set()
    for name, wrong in {
        "plain": "import house.high.b",
        "from": "from house.high.b import thing",
        "from the package": "from house.high import b",
        "relative": "from ..high.b import thing",
        "for types only": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.high.b import thing",
        "late": "def f():\n    from house.high.b import thing",
    }.items():
        imports = made_up(tmp_path / name, {**right, "low/a.py": wrong})
        assert wrong_way(imports, ["low", "high", "__init__"]) == {("house.low.a", "house.high.b")}, name
        assert in_circles(imports) == {"house.low.a", "house.high.b"}, name


def test_a_circle_within_a_room_is_found(tmp_path):
    imports = made_up(
        tmp_path, {"low/__init__.py": "", "low/a.py": "from house.low.b import x", "low/b.py": "from . import c", "low/c.py": ""}
    )
    assert in_circles(imports) == set()
    (tmp_path / "house" / "low" / "c.py").write_text("from .a import y")
    assert in_circles(find_imports(tmp_path / "house")) == {"house.low.a", "house.low.b", "house.low.c"}
