"""What MkDocs is told beside its pages: links that serve on a forge and here, settings by group, the changelog."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllp.report.settings import settings_table

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """CHANGELOG.md stands at the top of the repository; here it is a page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: "Page", **_: Any) -> str:
    """A page as it is meant here, of one that is readable on a forge."""
    if page.file.src_uri == "settings.md":
        return by_group(settings_table())
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
