"""Whether several hosts see one folder: one writes a mark, the others look for it and leave theirs."""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from rayllp.checkpoint.location import Folder, locate


@dataclass(frozen=True)
class Mark:
    """A file that one host wrote for others to find.

    Attributes:
        folder: an absolute path or a URL.
        token: its content, and the beginning of the names of all marks beside it.
    """

    folder: str
    token: str

    def look(self) -> str:
        """Look for it from another host, and leave a mark there; "ok", or what went wrong in a word or two."""
        folder = locate(self.folder)
        try:
            if (folder / f"{self.token}.driver").read_text(encoding="utf-8") != self.token:
                return "another file"
            (folder / f"{self.token}.{uuid.uuid4().hex}").write_text(self.token, encoding="utf-8")
        except Exception as error:  # whatever a file system's package raises
            return f"{type(error).__name__}: {error.strerror}" if isinstance(error, OSError) and error.strerror else type(error).__name__
        return "ok"

    def answers(self) -> int:
        """How many others left a mark that is seen from here."""
        return sum(1 for _ in locate(self.folder).glob(f"{self.token}.*")) - 1


@contextlib.contextmanager
def leave_mark(folder: Folder) -> Iterator[Mark]:
    """A mark in a folder, which is made if need be; what was made for it is removed at the end."""
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
