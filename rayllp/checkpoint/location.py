"""Where checkpoints are: a folder of this machine's, or one of any file system that fsspec knows, by its URL (s3://, gs://, abfs://, …).

A local checkpoint appears by a rename. Object stores have none: there a checkpoint is complete once its manifest is there, which is written
last and goes first. Credentials and endpoints come from where the file system looks for them, or from fsspec's own settings
(FSSPEC_S3_ENDPOINT_URL, …), on every node.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upath import UPath

from rayllp.errors import SettingsError

Folder = Path | UPath


def locate(text: str | Folder) -> Folder:
    """A local path as a Path, a URL as a UPath.

    Raises:
        SettingsError: no file system for this URL.
    """
    if "://" not in str(text):
        return Path(str(text))
    try:
        place = UPath(str(text))
        place.fs  # noqa: B018 (made here: its package may be missing)
    except (ImportError, ValueError) as error:
        raise SettingsError(
            f"checkpoint.path {text}: {error}; install fsspec's package for it (s3fs, gcsfs, adlfs, …), or give a folder that all nodes see"
        ) from None
    return place


def place_of_checkpoints(run: Path, path: str | None) -> Folder:
    """Where a run's checkpoints are.

    Args:
        path: the setting checkpoint.path.
    """
    return run / "checkpoints" if path is None else locate(path)


def remove(folder: Folder) -> None:
    """Remove a folder and what is in it; nothing where it is not."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            folder.fs.rm(folder.path, recursive=True)


def sync(folder: Path) -> None:
    """Make the names in a local folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Folder, content: bytes) -> None:
    """Write a file, and make it last."""
    if not isinstance(path, Path):
        path.write_bytes(content)
        return
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_writable(folder: Folder) -> None:
    """Write and remove a small file.

    Raises:
        SettingsError: that fails.
    """
    probe = folder / f".write_test_{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(probe, b"rayllp")
        probe.unlink()
    except Exception as error:  # whatever a file system's package raises
        raise SettingsError(f"checkpoint.path {folder} cannot be written ({type(error).__name__}: {error}): choose another") from None


@contextlib.contextmanager
def at_hand(folder: Folder) -> Iterator[Path]:
    """A folder's files on this machine: its own, or copies for as long as they are needed."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copies:
        found: Any = folder.fs
        found.get(folder.path.rstrip("/") + "/", copies + "/", recursive=True)
        yield Path(copies)
