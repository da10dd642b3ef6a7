"""The released wheel and source distribution contain what they need and have the right metadata."""

import ast
import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rayllp
from rayllp.cli import app

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "build", "dist", "site", "__pycache__", "*.egg-info")
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'), build_meta.build_sdist('dist'))"


def test_the_command_line_and_the_package_say_the_same_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"rayllp {rayllp.__version__}\n")
    assert re.fullmatch(r"\d+\.\d+\.\d+", rayllp.__version__)
    assert f"\n## {rayllp.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_type_checkers_see_the_names_that_the_package_has():
    (block,) = (node for node in ast.parse(Path(rayllp.__file__).read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    assert {alias.asname: node.module for node in block.body for alias in node.names} == rayllp._HOMES


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build both distributions from a copy, by setuptools alone: no network is used and nothing is left behind."""
    setuptools = pytest.importorskip("setuptools", "77", reason="setuptools before 77 does not read the licence as pyproject.toml gives it")
    copy = tmp_path_factory.mktemp("release") / "rayllp"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"setuptools {setuptools.__version__}: {done.stderr}"
    wheel, sdist = done.stdout.split()[-2:]
    return copy / "dist" / wheel, copy / "dist" / sdist


def test_the_wheel_has_every_file_of_the_package(built):
    wheel = zipfile.ZipFile(built[0])
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "rayllp").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert inside == ours
    assert "rayllp/py.typed" in inside
    assert any(name.endswith(".jinja") for name in inside)  # the report's page


def test_the_wheel_says_what_it_is(built):
    wheel = zipfile.ZipFile(built[0])
    read = {name.partition("/")[2]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    metadata = email.message_from_string(read["METADATA"])
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == ("rayllp", rayllp.__version__, "Apache-2.0")
    assert "rayllp = rayllp.cli:main" in read["entry_points.txt"]
    assert "licenses/LICENSE" in read
    description = metadata.get_payload()
    assert description.startswith("# rayllp")
    assert metadata["Description-Content-Type"] == "text/markdown"
    # A package index resolves no path of the repository.
    assert not re.findall(r"\]\((?!https?:)[^)]*\)", description)


def test_the_source_distribution_is_a_checkout(built):
    with tarfile.open(built[1]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = ["README.md", "CHANGELOG.md", "LICENSE", "Makefile", "mkdocs.yml", "setup.py", "docs/hooks.py", "docs/images/levels.svg"]
    for folder in ("tests", "examples", "tune_configs", "rayllp"):
        files = (ROOT / folder).rglob("*")
        wanted += [str(path.relative_to(ROOT)) for path in files if path.is_file() and "__pycache__" not in path.parts]
    assert inside.issuperset(wanted), sorted(set(wanted) - inside)
    assert not [name for name in inside if "__pycache__" in name or name.endswith(".pyc")]
