"""Locks that let one process at a time write to a run directory, a sweep directory, or a place of checkpoints, even on object storage."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from rayllp.checkpoint.location import Folder
from rayllp.errors import HeldError, SettingsError

LOCK, HOLDER = ".driver.lock", "driver.json"
"""The lock file, which the system unlocks when its process ends; and a file that names the holder, whose modification time shows that the
holder was alive then.
"""
BEAT_S = 5.0
SILENT_S = 30.0
"""A holder on another machine, where file locks may have no effect, is taken to be gone after no sign of life for this many seconds."""


def _machine() -> str:
    """Return an identifier of this boot of this machine, and of the container: process ids can be compared where it is the same."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode()}"


@dataclass(frozen=True)
class Holder:
    """The process that writes to a directory; content of `driver.json`.

    Attributes:
        host: name of its host.
        pid: its process id.
        since: when it began, in seconds since 1970.
        machine: see `_machine`.
        token: distinguishes this hold from all others.
        beats: number of signs of life; counted only on object storage, where the file is rewritten for each.
    """

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.time)
    machine: str = field(default_factory=_machine)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {datetime.fromtimestamp(self.since, UTC):%Y-%m-%d %H:%M:%S} UTC"


class Hold:
    """A directory that this process holds. As a listener of the run it ends the run if the hold was lost.

    Args:
        lock: the acquired file lock; None if the file system has no locks.
    """

    def __init__(self, directory: Folder, lock: BaseFileLock | None) -> None:
        self.directory, self.me = directory, Holder()
        self._lock, self._over = lock, threading.Event()
        self._taken_by: Holder | None = None
        self._write()
        self._heart = threading.Thread(target=self._beat, name="hold of a run directory", daemon=True)
        self._heart.start()

    def _write(self) -> None:
        """Write the file that names the holder. Readers find the old file or the new one, never a part of it."""
        text = json.dumps(asdict(self.me)) + "\n"
        if isinstance(self.directory, Path):
            beside = self.directory / f".{HOLDER}.{self.me.token}"
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self.directory / HOLDER)
        else:
            (self.directory / HOLDER).write_text(text, encoding="utf-8")

    def _beat(self) -> None:
        """Give signs of life in a loop. Locally this changes only the file's time, which works even if the disk is full."""
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(Exception):  # it may work the next time
                self._look()
                if isinstance(self.directory, Path):
                    os.utime(self.directory / HOLDER)
                elif not self._over.is_set():
                    self.me = replace(self.me, beats=self.me.beats + 1)
                    self._write()

    def _look(self) -> None:
        holder = read_holder(self.directory)
        if holder is not None and holder[0].token != self.me.token:
            self._taken_by = holder[0]
            self._over.set()

    def check(self) -> None:
        """Check that this process still holds the directory.

        Raises:
            HeldError: another process has taken it over, believing this one to be gone.
        """
        if self._taken_by is not None:
            raise HeldError(
                f"{self.directory} was taken over by {self._taken_by}, while this process was not heard of for {SILENT_S:g} s, or as both "
                "began; it ends here, without writing to it again"
            )

    def step(self, metric: Mapping[str, Any]) -> None:
        """Check that the directory is still held; see `check`."""
        self.check()

    def event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """Check that the directory is still held; see `check`."""
        self.check()

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Check that the directory is still held; see `check`."""
        self.check()

    def release(self) -> None:
        """Release the directory."""
        self._over.set()
        self._heart.join()
        with contextlib.suppress(Exception):
            holder = read_holder(self.directory)
            if holder is not None and holder[0].token == self.me.token:
                (self.directory / HOLDER).unlink()
        if self._lock is not None:
            self._lock.release()


@contextlib.contextmanager
def hold(directory: Folder, say: Callable[[str], None]) -> Iterator[Hold]:
    """Make this process the only one that writes to `directory` inside this context.

    A file lock excludes other processes on this machine, and is released whenever this process ends. Machines that share the directory may
    not share its locks, and object storage has none: there it counts whether the holder gives signs of life.

    Args:
        say: is called with a line for the user before waiting for a sign of life of another holder.

    Raises:
        HeldError: another process holds the directory; the message says which.
        SettingsError: the directory cannot be written.
    """
    held = _acquire(directory, say)
    try:
        yield held
    finally:
        held.release()


def _acquire(directory: Folder, say: Callable[[str], None]) -> Hold:
    lock: BaseFileLock | None = None
    try:
        if isinstance(directory, Path):
            lock = FileLock(directory / LOCK, timeout=0)
            lock.acquire()
    except Timeout:
        raise _refusal(directory, read_holder(directory)) from None
    except (OSError, NotImplementedError):  # this file system has no locks
        lock = None
    try:
        holder = read_holder(directory)
        if holder is not None and is_alive(directory, holder, locked=lock is not None, say=say):
            raise _refusal(directory, holder)
        return Hold(directory, lock)
    except BaseException as error:
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            raise SettingsError(f"{directory} cannot be written: {error.strerror}; make room or choose another") from None
        raise


def is_alive(directory: Folder, seen: tuple[Holder, float], *, locked: bool, say: Callable[[str], None]) -> bool:
    """Return whether the process that the directory names as its holder is alive. May wait up to `SILENT_S` seconds.

    Args:
        seen: the holder and the time of its last sign of life, as `read_holder` returned them.
        locked: True if this process has the file lock, so that no other process on this machine can have it.
    """
    holder, heard = seen
    if holder.machine == _machine():
        return not locked and _runs(holder.pid)
    if isinstance(directory, Path):
        (directory / LOCK).touch()  # to compare two times of the file system's clock, as this machine's may differ
        if (directory / LOCK).stat().st_mtime - heard >= SILENT_S:
            return False
    say(f"{directory} is held by {holder}: waiting up to {SILENT_S:g} s for a sign of life")
    deadline = time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENT_S / 10))
        now = read_holder(directory)
        if now is None:
            return False
        if now != seen:
            return True
    return False


def read_holder(directory: Folder) -> tuple[Holder, float] | None:
    """Return the holder of a directory and the time of its last sign of life; None if there is no holder.

    The time is that of the file system's clock, and 0 on object storage.
    """
    try:
        if not isinstance(directory, Path):
            directory.fs.invalidate_cache()  # other processes may have written there
            return Holder(**json.loads((directory / HOLDER).read_text(encoding="utf-8"))), 0.0
        with (directory / HOLDER).open() as file:  # network file systems check for changes when a file is opened
            return Holder(**json.load(file)), os.fstat(file.fileno()).st_mtime
    except (OSError, ValueError, TypeError):
        return None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _refusal(directory: Folder, holder: tuple[Holder, float] | None) -> HeldError:
    who = "another process" if holder is None else str(holder[0])
    return HeldError(
        f"{directory} is in use by {who}: wait for its end or stop it (Ctrl-C leaves a checkpoint), or choose another directory"
    )
