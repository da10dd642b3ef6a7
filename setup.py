"""The one thing that pyproject.toml cannot say: a package index shows README.md without the links that only a checkout can follow."""

import re
from pathlib import Path

from setuptools import setup


def standing_alone(markdown: str) -> str:
    """The text with links into the repository as plain words, and without pictures and the lines below them."""
    markdown = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n+(\*[^*]+\*\n+)?", "", markdown)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", markdown)


setup(
    long_description=standing_alone(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
