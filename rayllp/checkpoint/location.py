"""Where checkpoints are: a local folder, or one on any file system that fsspec supports, given by its URL (s3://, gs://, abfs://, …).

A local checkpoint appears by renaming its folder. Object stores cannot rename: there a checkpoint is complete once it has its manifest,
which is written last and removed first. On every node, credentials and endpoints come from where the file system's package looks for them,
or from fsspec's own settings (FSSPEC_S3_ENDPOINT_URL, …).
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
    """Return a local path as a Path, and a URL as a UPath.

    Raises:
        SettingsError: there is no file system for this URL.
    """
    if "://" not in str(text):
        return Path(str(text))
    try:
        folder = UPath(str(text))
        folder.fs  # noqa: B018 (made here: its package may be missing)
    except (ImportError, ValueError) as error:
        raise SettingsError(
            f"checkpoint.path {text}: {error}; install fsspec's package for it (s3fs, gcsfs, adlfs, …), or give a folder that all nodes see"
        ) from None
    return folder


def checkpoint_folder(run: Path, path: str | None) -> Folder:
    """Return the folder of a run's checkpoints.

    Args:
        run: the run directory.
        path: the setting checkpoint.path.
    """
    return run / "checkpoints" if path is None else locate(path)


def remove(folder: Folder) -> None:
    """Remove a folder and its contents. Do nothing if it does not exist."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            folder.fs.rm(folder.path, recursive=True)


def sync(folder: Path) -> None:
    """Flush a local folder's entries to disk, so that new and renamed files survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Folder, content: bytes) -> None:
    """Write a file and, if it is local, flush it to disk."""
    if not isinstance(path, Path):
        path.write_bytes(content)
        return
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_writable(folder: Folder) -> None:
    """Refuse a folder that cannot be written, by writing a small file there and removing it. A missing folder is created.

    Raises:
        SettingsError: the folder cannot be written.
    """
    probe = folder / f".write_test_{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(probe, b"rayllp")
        probe.unlink()
    except Exception as error:  # each fsspec implementation raises errors of its own
        raise SettingsError(f"checkpoint.path {folder} cannot be written ({type(error).__name__}: {error}): choose another") from None


@contextlib.contextmanager
def at_hand(folder: Folder) -> Iterator[Path]:
    """Provide a folder's files on this machine: the folder itself if it is local, else temporary copies."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copies:
        file_system: Any = folder.fs
        file_system.get(folder.path.rstrip("/") + "/", copies + "/", recursive=True)
        yield Path(copies)
