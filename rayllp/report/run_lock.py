"""One process at a time writes to the directory of a run or of a sweep, or to a place of checkpoints, which may be behind a URL."""

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
"""The lock itself, which the system frees when its process is gone, and who holds it, whose time of change is the last sign of life."""
BEAT_S = 5.0
SILENT_S = 30.0
"""A holder on another machine, where this one's locks may not reach, is gone when it was not heard of for so long."""


def _machine() -> str:
    """This boot of this machine, and this container on it: where process numbers mean the same."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode()}"


@dataclass(frozen=True)
class Holder:
    """Who writes to a directory: a line of `driver.json`.

    Attributes:
        since: seconds since 1970.
        token: tells this hold from any other.
        beats: signs of life behind a URL, where the file is written anew for each.
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
    """A directory that is held. A listener of the run (`rayllp.report.Listener`), which it ends when the hold was lost.

    Args:
        lock: None where the file system has no locks.
    """

    def __init__(self, directory: Folder, lock: BaseFileLock | None) -> None:
        self.directory, self.me = directory, Holder()
        self._lock, self._over = lock, threading.Event()
        self._taken_by: Holder | None = None
        self._write()
        self._heart = threading.Thread(target=self._beat, name="hold of a run directory", daemon=True)
        self._heart.start()

    def _write(self) -> None:
        """Name the holder, by a file that is whole at any time."""
        text = json.dumps(asdict(self.me)) + "\n"
        if isinstance(self.directory, Path):
            beside = self.directory / f".{HOLDER}.{self.me.token}"
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self.directory / HOLDER)
        else:
            (self.directory / HOLDER).write_text(text, encoding="utf-8")

    def _beat(self) -> None:
        """Give signs of life. On a disk they change the file's time, not its content, for which a full one would have no room."""
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(Exception):  # for the time being; behind a URL, whatever a file system's package raises
                self._look()
                if isinstance(self.directory, Path):
                    os.utime(self.directory / HOLDER)
                elif not self._over.is_set():
                    self.me = replace(self.me, beats=self.me.beats + 1)
                    self._write()

    def _look(self) -> None:
        found = read_holder(self.directory)
        if found is not None and found[0].token != self.me.token:
            self._taken_by = found[0]
            self._over.set()

    def check(self) -> None:
        """See that the directory is still this process's.

        Raises:
            HeldError: another process has taken this one for gone.
        """
        if self._taken_by is not None:
            raise HeldError(
                f"{self.directory} was taken over by {self._taken_by}, while this process was not heard of for {SILENT_S:g} s, or as both "
                "began; it ends here, without writing to it again"
            )

    def step(self, metric: Mapping[str, Any]) -> None:
        """As `check`."""
        self.check()

    def event(self, step: int, kind: str, details: Mapping[str, Any]) -> None:
        """As `check`."""
        self.check()

    def evaluation(self, step: int, found: Mapping[str, float]) -> None:
        """As `check`."""
        self.check()

    def release(self) -> None:
        """Let others have it."""
        self._over.set()
        self._heart.join()
        with contextlib.suppress(Exception):
            found = read_holder(self.directory)
            if found is not None and found[0].token == self.me.token:
                (self.directory / HOLDER).unlink()
        if self._lock is not None:
            self._lock.release()


@contextlib.contextmanager
def hold(directory: Folder, say: Callable[[str], None]) -> Iterator[Hold]:
    """Be the only process that writes to `directory` while inside.

    A lock of the file system keeps others on this machine away, and ends with this process however that ends. Machines that share the
    directory may not share its locks, and there are none behind a URL: there the holder's signs of life count.

    Args:
        say: is told if it is to be waited whether another holder is alive.

    Raises:
        HeldError: another process holds it; says which.
        SettingsError: it cannot be written.
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
    except (OSError, NotImplementedError):  # no locks here
        lock = None
    try:
        found = read_holder(directory)
        if found is not None and is_alive(directory, found, locked=lock is not None, say=say):
            raise _refusal(directory, found)
        return Hold(directory, lock)
    except BaseException as error:
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            raise SettingsError(f"{directory} cannot be written: {error.strerror}; make room or choose another") from None
        raise


def is_alive(directory: Folder, found: tuple[Holder, float], *, locked: bool, say: Callable[[str], None]) -> bool:
    """Whether whoever the directory names as its holder is there.

    Args:
        found: the holder and its last sign of life, as `read_holder` gave them.
        locked: this process has the lock, which nobody else on this machine has then.
    """
    holder, heard = found
    if holder.machine == _machine():
        return not locked and _runs(holder.pid)
    if isinstance(directory, Path):
        (directory / LOCK).touch()  # the file system's clock: ours may differ
        if (directory / LOCK).stat().st_mtime - heard >= SILENT_S:
            return False
    say(f"{directory} is held by {holder}: waiting up to {SILENT_S:g} s for a sign of life")
    deadline = time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENT_S / 10))
        now = read_holder(directory)
        if now is None:
            return False
        if now != found:
            return True
    return False


def read_holder(directory: Folder) -> tuple[Holder, float] | None:
    """Who holds a directory, and the file system's time of its last sign of life (0 behind a URL); None: nobody, or it does not say."""
    try:
        if not isinstance(directory, Path):
            directory.fs.invalidate_cache()  # others have written there
            return Holder(**json.loads((directory / HOLDER).read_text(encoding="utf-8"))), 0.0
        with (directory / HOLDER).open() as file:  # opened anew: a network file system then looks anew
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


def _refusal(directory: Folder, found: tuple[Holder, float] | None) -> HeldError:
    who = "another process" if found is None else str(found[0])
    return HeldError(
        f"{directory} is in use by {who}: wait for its end or stop it (Ctrl-C leaves a checkpoint), or choose another directory"
    )
