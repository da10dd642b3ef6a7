"""Locks that let one process at a time write to a run directory, a sweep directory, or a place of checkpoints, even on object storage."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from rayllp.checkpoint.location import Folder
from rayllp.errors import LockedError, SettingsError

LOCK_FILE, OWNER_FILE = ".driver.lock", "driver.json"
"""The lock file, which the system unlocks when its process ends; and a file that names the owner, whose modification time shows that the
owner was alive then.
"""
BEAT_S = 5.0
SILENT_S = 30.0
"""An owner on another machine, where file locks may have no effect, is taken to be gone after no sign of life for this many seconds."""


def _machine() -> str:
    """Return an identifier of this machine since its last boot, and of the container. Where it is the same, process ids can be compared."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode()}"


@dataclass(frozen=True)
class LockOwner:
    """The process that writes to a directory; content of `driver.json`.

    Attributes:
        host: name of its host.
        pid: its process id.
        since: when it took the lock, in seconds since 1970.
        machine: see `_machine`.
        token: distinguishes this lock from all others.
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


class RunLock:
    """A lock of this process on a directory.

    Args:
        lock: the acquired file lock; None if the file system has no locks.
    """

    def __init__(self, directory: Folder, lock: BaseFileLock | None) -> None:
        self.directory, self.me = directory, LockOwner()
        self._lock, self._over = lock, threading.Event()
        self._taken_by: LockOwner | None = None
        self._write()
        self._heart = threading.Thread(target=self._beat, name="lock of a run directory", daemon=True)
        self._heart.start()

    def _write(self) -> None:
        """Write the file that names the owner. Readers find the old file or the new one, never a part of it."""
        text = json.dumps(asdict(self.me)) + "\n"
        if isinstance(self.directory, Path):
            beside = self.directory / f".{OWNER_FILE}.{self.me.token}"
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self.directory / OWNER_FILE)
        else:
            (self.directory / OWNER_FILE).write_text(text, encoding="utf-8")

    def _beat(self) -> None:
        """Give signs of life in a loop. Locally this changes only the file's time, which works even if the disk is full."""
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(Exception):  # it may work the next time
                self._look()
                if isinstance(self.directory, Path):
                    os.utime(self.directory / OWNER_FILE)
                elif not self._over.is_set():
                    self.me = replace(self.me, beats=self.me.beats + 1)
                    self._write()

    def _look(self) -> None:
        owner = read_owner(self.directory)
        if owner is not None and owner[0].token != self.me.token:
            self._taken_by = owner[0]
            self._over.set()

    def check(self) -> None:
        """Check that this process still has the lock.

        Raises:
            LockedError: another process has taken it over, believing this one to be gone.
        """
        if self._taken_by is not None:
            raise LockedError(
                f"{self.directory} was taken over by {self._taken_by}, because this process gave no sign of life for {SILENT_S:g} s, or "
                "both began at once; this process ends, and writes nothing there any more"
            )

    def release(self) -> None:
        """Release the directory."""
        self._over.set()
        self._heart.join()
        with contextlib.suppress(Exception):
            owner = read_owner(self.directory)
            if owner is not None and owner[0].token == self.me.token:
                (self.directory / OWNER_FILE).unlink()
        if self._lock is not None:
            self._lock.release()


@contextlib.contextmanager
def lock_directory(directory: Folder, say: Callable[[str], None]) -> Iterator[RunLock]:
    """Make this process the only one that writes to `directory` inside this context.

    A file lock excludes other processes on this machine, and is released whenever this process ends. Machines that share the directory may
    not share its locks, and object storage has none: there it counts whether the owner gives signs of life.

    Args:
        say: is called with a line for the user before waiting for a sign of life of another owner.

    Raises:
        LockedError: another process has the lock; the message says which.
        SettingsError: the directory cannot be written.
    """
    lock = _acquire(directory, say)
    try:
        yield lock
    finally:
        lock.release()


def _acquire(directory: Folder, say: Callable[[str], None]) -> RunLock:
    lock: BaseFileLock | None = None
    try:
        if isinstance(directory, Path):
            lock = FileLock(directory / LOCK_FILE, timeout=0)
            lock.acquire()
    except Timeout:
        raise _refusal(directory, read_owner(directory)) from None
    except (OSError, NotImplementedError):  # this file system has no locks
        lock = None
    try:
        owner = read_owner(directory)
        if owner is not None and is_alive(directory, owner, locked=lock is not None, say=say):
            raise _refusal(directory, owner)
        return RunLock(directory, lock)
    except BaseException as error:
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            raise SettingsError(f"{directory} cannot be written: {error.strerror}; make room or choose another") from None
        raise


def is_alive(directory: Folder, seen: tuple[LockOwner, float], *, locked: bool, say: Callable[[str], None]) -> bool:
    """Return whether the process that the directory names as its owner is alive. May wait up to `SILENT_S` seconds.

    Args:
        seen: the owner and the time of its last sign of life, as `read_owner` returned them.
        locked: True if this process has the file lock, so that no other process on this machine can have it.
    """
    owner, heard = seen
    if owner.machine == _machine():
        return not locked and _runs(owner.pid)
    if isinstance(directory, Path):
        (directory / LOCK_FILE).touch()  # to compare two times of the file system's clock, as this machine's may differ
        if (directory / LOCK_FILE).stat().st_mtime - heard >= SILENT_S:
            return False
    say(f"{directory} is in use by {owner}: waiting up to {SILENT_S:g} s for a sign of life")
    deadline = time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENT_S / 10))
        now = read_owner(directory)
        if now is None:
            return False
        if now != seen:
            return True
    return False


def read_owner(directory: Folder) -> tuple[LockOwner, float] | None:
    """Return the owner of a directory and the time of its last sign of life; None if there is no owner.

    The time is that of the file system's clock, and 0 on object storage.
    """
    try:
        if not isinstance(directory, Path):
            directory.fs.invalidate_cache()  # other processes may have written there
            return LockOwner(**json.loads((directory / OWNER_FILE).read_text(encoding="utf-8"))), 0.0
        with (directory / OWNER_FILE).open() as file:  # network file systems check for changes when a file is opened
            return LockOwner(**json.load(file)), os.fstat(file.fileno()).st_mtime
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


def _refusal(directory: Folder, owner: tuple[LockOwner, float] | None) -> LockedError:
    who = "another process" if owner is None else str(owner[0])
    return LockedError(
        f"{directory} is in use by {who}: wait until it ends or stop it (Ctrl-C leaves a checkpoint), or choose another directory"
    )
