"""README and tutorial as they stand: their commands run, their links lead somewhere, drawings and tables are what the code makes.

Commands and files are taken from the fenced blocks. By default those of WAYS that run `HERE` do so in this process, with the suite's
cluster; `pytest -m study tests/test_documents.py` runs the whole documents, block after block, in a shell and with clusters of their own.
"""

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from rayllp.cli import app
from rayllp.errors import RayllpError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("README.md", "docs/tutorial.md")
HERE, SHELL, NOT = "in this process", "in a shell (study)", "not run here"


class Way(NamedTuple):
    """How a command of a document is tested.

    Attributes:
        pattern: regular expression for the commands meant; the first way that matches is used.
        where: HERE, SHELL or NOT.
        why: why it is not run in this process, or not at all.
        instead: what is changed in it (a regular expression, and what takes its place), since as it stands it would take minutes.
        adds: what is appended to it, for the same reason.
    """

    pattern: str
    where: str = HERE
    why: str = ""
    instead: tuple[tuple[str, str], ...] = ()
    adds: str = ""


SHORT = " --set steps=2 --set batch_size=2 --set eval.batches=1 --set eval.sample=4 --set checkpoint.best=false --set spare_workers=false"
WAYS = (
    Way(r"pip install|python3 -m venv|\. \.venv", NOT, "installs: CI does so at its start, by `make test`"),
    Way(r"curl ", NOT, "downloads; the tests have a text of their own under that name"),
    Way(r"tensorboard ", NOT, "serves until it is stopped; tests/test_train.py reads what it would show"),
    Way(r"ray job submit", NOT, "needs a cluster with a job server; tests/test_tuning_study.py submits jobs to one"),
    Way(r"mpiexec ", SHELL, "processes of MPI's launcher; tests/test_mpi.py starts some by default", adds=SHORT),
    Way(r"rayllp chaos", NOT, "needs a run that trains in another terminal; the tutorial's is run"),
    Way(r"make (train|test|docs)", instead=((r"^make", f"make --dry-run -C {shlex.quote(str(ROOT))}"),)),
    Way(r"rayllp train .*&\n", SHELL, "a run in the background", instead=((r"steps=1000", "steps=150"), (r"20s --for 1m", "8s --for 20s"))),
    Way(r"rayllp train .*--resume", instead=((r"steps=\d+", "steps=3"), (r"workers=3", "workers=1"))),
    Way(
        r"rayllp train .*s3://", SHELL, "tests/test_train.py does so by default",
        instead=((r"s3://bucket/run", "file://$PWD/bucket/run"),), adds=SHORT,
    ),
    Way(r"rayllp train .*lenght"),
    Way(r"rayllp train .*sweep/best", SHELL, "takes what the sweep wrote", adds=SHORT),
    Way(r"rayllp train .*workers=\{", SHELL, "a run whose workers vary has processes of its own", adds=SHORT),
    Way(r"rayllp train --output", adds=SHORT + " --set data.max_bytes=100000"),
    Way(r"rayllp train (?!--help)", adds=SHORT),
    Way(r"rayllp tune", SHELL, "a sweep: minutes, all CPUs", adds=" --set trials=2 --set settings.steps=10 --set settings.eval.every=5"),
    Way(r"(ls|head -n 1|cat) runs/(sweep|chaos|best)", SHELL, "shows what such a command wrote"),
    Way(r"rayllp plan", SHELL, "times layers, and many meshes: up to a minute"),
    Way(r"rayllp bench", SHELL, "eight processes", instead=((r"workers=8", "workers=2"), (r"layers=68", "layers=20"))),
    Way(r"rayllp doctor", SHELL, "starts a process on each CPU; tests/test_doctor.py"),
    Way(r"python examples/", SHELL, "trains twice with a cluster of its own", adds=" --set steps=4 --set eval.sample=0"),
    Way(r".*import rayllp\n(.*\n)+.*keep_workers", SHELL, "four processes twice", instead=((r'"workers": 4', '"workers": 4, "steps": 2'),)),
    Way(r".*import rayllp\n", instead=((r'"steps": 50', '"steps": 2, "eval": {"batches": 1, "sample": 0}, "data": {"max_bytes": 99999}'),)),
)  # fmt: skip


class Piece(NamedTuple):
    """Something that a reader of a document does: run a command or a Python block, or write a file."""

    document: str
    kind: str
    text: str
    title: str = ""

    @property
    def way(self) -> Way:
        return next((way for way in WAYS if re.match(way.pattern, self.text)), Way(""))

    def shortened(self) -> str:
        text = self.text
        for old, new in self.way.instead:
            text = re.sub(old, new, text)
        return text + self.way.adds

    def refusal(self) -> str | None:
        """Return the message with which the document says that it is refused."""
        found = re.search(r"# refused: (.*)", self.text)
        return found.group(1) if found else None


FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pieces(document: str) -> list[Piece]:
    """Return the pieces of a document, in its order."""
    found = []
    for language, title, body in FENCE.findall((ROOT / document).read_text()):
        if language == "yaml" and title:
            found.append(Piece(document, "file", body, title))
        elif language == "python":
            found.append(Piece(document, "python", body))
        elif language == "bash" and re.search(r"&$", body, re.MULTILINE):
            found.append(Piece(document, "command", body))  # what runs in the background belongs together
        elif language == "bash":
            found += [Piece(document, "command", line) for line in body.replace("\\\n", " ").splitlines() if line.strip()]
        else:
            assert language in ("text", "yaml"), f"{document}: a block of {language} that no test runs"
    return found


EVERYTHING = [piece for document in RUN for piece in pieces(document)]


def without_comment(piece: Piece) -> str:
    """Return a command without its comment, since nothing can be appended behind a comment."""
    if piece.kind != "command" or "\n" in piece.text:
        return piece.shortened()
    return piece._replace(text=re.sub(r"\s+# .*$", "", piece.text)).shortened()


def name_of(piece: Piece) -> str:
    return f"{piece.document}: {piece.title or piece.text.strip().splitlines()[0][:60]}"


# What a reader does ------------------------------------------------------------------------------------------------------------


def furnish(folder: Path) -> Path:
    """Make a folder with a checkout's folders, and the files that a reader brings."""
    for name in ("examples", "tune_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "input.txt").write_text("To be, or not to be, that is the question:\n" * 400)
    (folder / "my.yaml").write_text("data: {path: input.txt}\n")  # the README's; the tutorial writes its own
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("reader"))


def once(where: str) -> list[Piece]:
    """Return the pieces to run there; of a command that both documents have, only the first."""
    found: dict[str, Piece] = {}
    for piece in EVERYTHING:
        if piece.way.where == where:
            found.setdefault(without_comment(piece), piece)
    return list(found.values())


def absolute(text: str, folder: Path) -> str:
    """Make paths absolute, since the workers of the suite's cluster were started in another folder."""
    text = text.replace("$PWD", str(folder))
    return re.sub(r"(?<=path[=:])( ?)(\w+\.txt)", lambda found: f"{found.group(1)}{folder / found.group(2)}", text)


@pytest.mark.usefixtures("kept_workers")
@pytest.mark.parametrize("piece", once(HERE), ids=name_of)
def test_what_a_document_says_works(piece, folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = absolute(without_comment(piece), folder)
    if piece.kind == "file":
        Path(piece.title).write_text(text, encoding="utf-8")
    elif piece.kind == "python":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(text, piece.document, "exec"), {})
        assert printed.getvalue()
    elif text.startswith("rayllp "):
        result = CliRunner().invoke(app, shlex.split(text)[1:])
        if refusal := piece.refusal():
            assert isinstance(result.exception, RayllpError)
            assert refusal in str(result.exception)
        else:
            assert result.exit_code == 0, f"{text}\n{result.output}\n{result.exception}"
    else:
        done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.study
@pytest.mark.parametrize("document", RUN)
def test_a_document_from_its_beginning_to_its_end_in_a_shell(document, tmp_path):
    """Runs everything that can be run as a reader would, with clusters of their own; commands are shortened as WAYS says."""
    folder = furnish(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for piece in pieces(document):
        text = without_comment(piece)
        if piece.way.where == NOT:
            continue
        if piece.kind == "file":
            (folder / piece.title).write_text(text)
            continue
        command = [sys.executable, "-c", text] if piece.kind == "python" else ["bash", "-ec", text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        print(f"{done.returncode} {text}")
        if refusal := piece.refusal():
            assert done.returncode != 0
            assert refusal in done.stderr
        else:
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_every_way_is_of_some_command_and_says_why():
    for way in WAYS:
        assert any(piece.way is way for piece in EVERYTHING), f"no command is meant by {way.pattern!r} any more"
        assert way.where == HERE or way.why
    commands = [piece for piece in EVERYTHING if piece.kind == "command"]
    assert sum(piece.way.where != NOT for piece in commands) > 0.7 * len(commands)


@pytest.mark.parametrize("document", RUN)
def test_no_command_hides_from_the_tests(document):
    """An indented block, or a fence that is not one of ours, would not be run."""
    outside = FENCE.sub("", (ROOT / document).read_text())
    assert "```" not in outside
    assert not re.search(r"^\n {4}\S", outside, re.MULTILINE)


# Links, the site's pages -------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of a document's headings, as code forges and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT)
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}, which {there.name} does not have"


def test_the_site_has_every_page_and_no_other():
    class Loader(yaml.SafeLoader):
        """A YAML loader that reads tags for Python as nothing."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    pages = re.findall(r"[\w/]+\.md", str(config["nav"]))
    assert sorted(pages) == sorted([*(path.name for path in (ROOT / "docs").glob("*.md")), "changelog.md"])
    assert config["strict"]
    assert config["theme"]["font"] is False
    for asset in (*config["extra_css"], *config["extra"]["polyfills"]):
        assert (ROOT / "docs" / asset).is_file()
    for hook in config["hooks"]:
        assert (ROOT / hook).is_file()


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drawings_and_tables_are_what_the_code_makes():
    for name, text in load("drawings").drawings().items():
        assert (ROOT / "docs" / "images" / name).read_text() == text, f"{name} is behind: python docs/drawings.py"
    pays = load("pays")
    assert pays.PAGE.read_text() == pays.page(), "docs/pays.md is behind: python docs/pays.py"


def test_the_figures_of_the_readme_are_those_of_the_frontier():
    def cells(text):
        return [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]

    title = "**GPT-2 of width 16, Shakespeare, 2 + N + 2 layers, Δt = 1/N, by Muon**\n"
    frontier = (ROOT / "docs" / "frontier.md").read_text().partition(title)[2]
    found = {(row[0], int(row[1])): row[3:] for row in cells(frontier.partition("\n**")[0])}  # loss, gap, depth kept, hours, speed-up, …
    deep, shallow = (found["serial", middle] for middle in (64, 16))
    wanted = [(1.0, "")]
    for way in ("adaptive", "adaptive 16"):
        gap, speedup = (float(found[way, 64][column].split()[0]) for column in (1, 4))
        wanted.append((round(speedup, 1), f"{gap:+.1f} %".replace("-", "−")))
    losses = [float(row[0].split()[0]) for row in (deep, shallow)]
    wanted.append((round(float(deep[3]) / float(shallow[3]), 1), f"{100 * (losses[1] / losses[0] - 1):+.1f} %"))
    table = (ROOT / "README.md").read_text().partition("| GPT-2, 2 + 64 + 2")
    said = [(float(row[2]), row[3]) for row in cells("".join(table[1:]).partition("\n\n")[0])]
    assert said == wanted


def test_settings_stand_by_group_on_the_site():
    from rayllp.config import setting_names
    from rayllp.report.settings import settings_table

    page = load("hooks").by_group(settings_table())
    assert all(page.count(f"| `{name}` |") == 1 for name in setting_names())
    assert page.index("## mgrit") < page.index("| `mgrit.coarsening` |") < page.index("## buffers")


@pytest.mark.study
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not loaded, f"{page.name} needs {loaded}"


# What docstrings and types cover -----------------------------------------------------------------------------------------------


def test_the_public_interface_is_documented():
    interrogate = pytest.importorskip("interrogate.coverage")
    from interrogate.config import InterrogateConfig, parse_pyproject_toml

    settings = parse_pyproject_toml(str(ROOT / "pyproject.toml"))
    limit, paths = settings.pop("fail_under"), [str(ROOT / "rayllp")]
    found = interrogate.InterrogateCoverage(paths=paths, conf=InterrogateConfig(**settings)).get_coverage()
    assert limit >= 95
    assert found.perc_covered >= limit


def test_every_function_is_typed():
    """Covers parameters and results of all functions, private ones too."""
    for path in (ROOT / "rayllp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
                bare = [argument.arg for argument in given if argument and not argument.annotation and argument.arg not in ("self", "cls")]
                assert not bare, f"{path.name}: {node.name} has parameters without a type: {bare}"
                assert node.returns is not None, f"{path.name}: {node.name} says no type for what it returns"
