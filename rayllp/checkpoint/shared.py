"""Check whether hosts share a folder: one host writes a mark there, and the others look for it and write marks of their own."""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from rayllp.checkpoint.location import Folder, locate


@dataclass(frozen=True)
class Mark:
    """A file that one host writes for others to find.

    Attributes:
        folder: an absolute path or a URL.
        token: content of the file; the names of this mark and of the others' answers begin with it.
    """

    folder: str
    token: str

    def check_visible(self) -> str:
        """Look for the mark from another host, and leave an answer; return "ok", or a few words about what went wrong."""
        folder = locate(self.folder)
        try:
            if (folder / f"{self.token}.driver").read_text(encoding="utf-8") != self.token:
                return "another file"
            (folder / f"{self.token}.{uuid.uuid4().hex}").write_text(self.token, encoding="utf-8")
        except Exception as error:  # each fsspec implementation raises errors of its own
            return f"{type(error).__name__}: {error.strerror}" if isinstance(error, OSError) and error.strerror else type(error).__name__
        return "ok"

    def answers(self) -> int:
        """Return how many answers of other hosts this host sees."""
        return sum(1 for _ in locate(self.folder).glob(f"{self.token}.*")) - 1


@contextlib.contextmanager
def leave_mark(folder: Folder) -> Iterator[Mark]:
    """Write a mark into a folder, which is created if needed. Everything that was created is removed at the end."""
    mark = Mark(str(folder.absolute()), f".mark_{uuid.uuid4().hex}")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{mark.token}.driver").write_text(mark.token, encoding="utf-8")
    try:
        yield mark
    finally:
        for leftover in folder.glob(f"{mark.token}.*"):
            with contextlib.suppress(Exception):
                leftover.unlink()
        if is_new:
            with contextlib.suppress(Exception):
                folder.rmdir()
