"""What MkDocs is told beside its pages: links that serve on a forge and here, source files, settings by group, the changelog."""

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllp.report.settings import settings_table

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SOURCE_LINK = re.compile(r"\[(`?)([^\]`]+)\1\]\(\.\./([\w/]+\.py)\)")
"""[`name`](../path.py): a class, function or constant that a page sends its readers to; without backticks the file as a whole."""


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """CHANGELOG.md stands at the top of the repository, and source files beside docs/; here they are pages."""
    from mkdocs.structure.files import File, InclusionLevel

    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    for path, names in sorted(linked_sources().items()):
        file = File.generated(config, f"source/{path}.md", content=listing(path, names))
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def linked_sources() -> dict[str, set[str]]:
    """Source files that pages link to, and the names in each."""
    found: dict[str, set[str]] = {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        for tick, name, path in SOURCE_LINK.findall(page.read_text(encoding="utf-8")):
            found.setdefault(path, set()).update({name} if tick else ())
    return found


def listing(path: str, names: set[str]) -> str:
    """A page of a source file, with a heading before each definition that is linked to; left out of the site's search."""
    text = (ROOT / path).read_text(encoding="utf-8")
    lines, where = text.splitlines(), definitions(text)
    marks = sorted((where[name], name) for name in names & where.keys())
    parts = ["---\nsearch: {exclude: true}\n---\n", f"# {path}\n"]
    begins, titles = [1, *(line for line, _ in marks)], ["", *(f"## {name}\n" for _, name in marks)]
    for begin, end, title in zip(begins, [*begins[1:], len(lines) + 1], titles, strict=True):
        code = "\n".join(lines[begin - 1 : end - 1])
        parts += [title, f'~~~~~~ {{.python linenums="{begin}"}}\n{code}\n~~~~~~\n' if code.strip() else ""]
    return "\n".join(parts)


def on_page_markdown(markdown: str, *, page: "Page", **_: Any) -> str:
    """A page as it is meant here, of one that is readable on a forge."""
    if page.file.src_uri == "settings.md":
        return by_group(settings_table())
    markdown = SOURCE_LINK.sub(_source_link, markdown)
    # "docs/method.md" and "(families.md)" in plain words become links; what is a link, or code, is left as it is.
    return re.sub(r"(?<![\[\]`/(\w])\(?docs/(\w+)\.md(?=[\s,;:.)])", lambda found: _link(found, page), markdown)


def by_group(table: str) -> str:
    """The settings, a heading for each group."""
    head, rule, *rows = table.splitlines()
    groups: dict[str, list[str]] = {}
    for row in rows:
        name = row.split("`")[1]
        groups.setdefault(name.split(".")[0] if "." in name else "run", []).append(row)
    intro = "# Every setting\n\nSet by YAML or `--set name=value`. Made from the code, as `rayllp settings` prints it.\n"
    return "\n".join([intro, *("\n".join([f"\n## {group}\n", head, rule, *mine]) for group, mine in groups.items())]) + "\n"


def _link(found: "re.Match[str]", page: "Page") -> str:
    name = found.group(1)
    if page.file.src_uri == f"{name}.md" or not (ROOT / "docs" / f"{name}.md").is_file():
        return found.group(0)
    return f"{'(' if found.group(0).startswith('(') else ''}[{name}.md]({name}.md)"


def _source_link(found: "re.Match[str]") -> str:
    """A link into the repository as one to the page of that file, at the heading of the name."""
    tick, name, path = found.groups()
    anchor = "#" + re.sub(r"\W", "", name.lower()) if tick else ""
    return f"[{tick}{name}{tick}](source/{path}.md{anchor})"


def definitions(source: str) -> dict[str, int]:
    """The line on which each class, function and constant of a module begins, decorators included; methods as `Class.method`."""
    found: dict[str, int] = {}

    def enter(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[prefix + node.name] = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            if isinstance(node, ast.ClassDef):
                enter(node.body, f"{prefix}{node.name}.")
            for target in node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []:
                if isinstance(target, ast.Name):
                    found[prefix + target.id] = node.lineno

    enter(ast.parse(source).body, "")
    return found
