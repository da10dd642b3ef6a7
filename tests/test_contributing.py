"""The documents for those who change the code: the tour links to functions that exist, and the examples work."""

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from rayllp.cli import app
from tests.test_documents import FENCE, load
from tests.test_imports import ROOMS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DESIGN, CONTRIBUTING = DOCS / "design.md", DOCS / "contributing.md"
TOURS = ("One training step", "A bias that is too large", "A lost worker", "A sweep's trial")
HOOKS = load("hooks")


# Names in links ------------------------------------------------------------------------------------------------------------------


def missing_names(markdown: str) -> list[str]:
    """Return the names that a text links to in source files which do not define them."""
    found = [(name, ROOT / path) for tick, name, path in HOOKS.SOURCE_LINK.findall(markdown) if tick]
    return [f"{name} in {path.name}" for name, path in found if name not in HOOKS.definitions(path.read_text())]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_names_that_documents_link_to_are_there(page):
    assert missing_names(page.read_text()) == []


def test_a_name_that_is_gone_is_found():
    driver = "../rayllp/training/driver.py"
    text = f"[`Driver._loop`]({driver}), [`Driver.loop`]({driver}), [`FAULTS`](../rayllp/training/recovery.py), [a driver]({driver})"
    assert missing_names(text) == ["Driver.loop in driver.py"]


def section(title: str) -> str:
    """Return a section of the tour, up to the next heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## )", DESIGN.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found.group(1)


@pytest.mark.parametrize("title", TOURS)
def test_a_tour_has_at_most_ten_stops_and_each_is_a_function(title):
    stops = re.split(r"^\d+\. ", section(title), flags=re.MULTILINE)[1:]
    assert 5 <= len(stops) <= 10
    for stop in stops:
        assert any(tick for tick, _, _ in HOOKS.SOURCE_LINK.findall(stop)), f"a stop that leads nowhere: {stop}"


def test_the_rooms_are_those_that_the_imports_keep_to():
    assert re.findall(r"^\| `(\w+)` \|", section("The packages"), re.MULTILINE) == [room for room in ROOMS if not room.startswith("__")]


# The site ------------------------------------------------------------------------------------------------------------------------


def test_a_link_to_a_source_file_leads_to_the_definition_on_the_site():
    path = "rayllp/training/driver.py"
    made = HOOKS.SOURCE_LINK.sub(HOOKS._source_link, f"[`Driver._loop`](../{path}), [all of it](../{path})")
    assert made == f"[`Driver._loop`](source/{path}.md#driver_loop), [all of it](source/{path}.md)"
    page = HOOKS.listing(path, {"Driver", "Driver._loop"})
    line = 1 + (ROOT / path).read_text().splitlines().index("    def _loop(self, step: int) -> int:")
    assert f'## Driver._loop\n\n~~~~~~ {{.python linenums="{line}"}}\n    def _loop(self' in page
    code = re.findall(r"^~~~~~~ .*?\n(.*?)\n~~~~~~$", page, re.MULTILINE | re.DOTALL)
    assert [text for part in code for text in part.split("\n")] == (ROOT / path).read_text().splitlines()


# The examples --------------------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return [body for found, _, body in FENCE.findall(CONTRIBUTING.read_text()) if found == language]


@pytest.fixture
def commands():
    """Restore the command line afterwards, since an example adds a command to it."""
    before = list(app.registered_commands)
    yield
    app.registered_commands[:] = before


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize("example", blocks("python"), ids=re.findall(r"^## Add (?:a|an) (.*)$", CONTRIBUTING.read_text(), re.MULTILINE))
def test_an_example_works(example):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(example, CONTRIBUTING.name, "exec"), {})
    assert printed.getvalue()


def test_every_way_of_running_tests_is_one():
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    assert commands
    for command in commands:
        if command[0] == "make":
            done = subprocess.run([*command, "--dry-run", "-C", str(ROOT)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
        else:
            (path,), wanted = re.findall(r"tests/\w+\.py", " ".join(command)), command[command.index("-k") + 1]
            assert re.search(rf"^def test_\w*{wanted}", (ROOT / path).read_text(), re.MULTILINE), f"{path} has no test of {wanted}"
