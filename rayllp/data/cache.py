"""A cache of tokenised data, in files that all processes of a host map: data may exceed main memory, and are not sent to workers.

An entry is a folder of flat arrays, `NAME.bin`, and `entry.json`, which describes them. It is named by a fingerprint of all that it was
made from, so it never changes once written. A process that needs a missing entry writes it; others on the host wait meanwhile.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from rayllp.errors import DataError

FORMAT = 1
ENTRY = "entry.json"
HASHED = 2**24
"""Total bytes up to which files are identified by content as well: a small file may be rewritten with neither size nor time changing."""
CARRIED = 2**26
"""Size of an entry, in bytes, up to which it is sent to hosts that lack the data it is made from."""
REPORT_EVERY_S = 10.0


def cache_folder(setting: str | None = None) -> Path:
    """Return this host's cache folder: `data.cache`, else RAYLLP_CACHE, else rayllp/ in the user's cache folder."""
    named = setting or os.environ.get("RAYLLP_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rayllp"


def fingerprint(*parts: Any) -> str:
    """Return a name for what is made from these plain values."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()[:32]


def stamp(paths: Sequence[Path]) -> list[Any]:
    """Return plain values that identify the content of files: names, sizes and times, and for small files a hash of the content."""
    stats = [path.stat() for path in paths]
    values: list[Any] = [[str(path.resolve()), each.st_size, each.st_mtime_ns] for path, each in zip(paths, stats, strict=True)]
    if sum(each.st_size for each in stats) <= HASHED:
        values += [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return values


class CacheWriter:
    """Writes a new entry. Each array is appended to, from its first value to its last.

    Attributes:
        folder: where the files are written.
        metadata: plain values that are stored with the arrays.
    """

    def __init__(self, folder: Path, description: str) -> None:
        self.folder, self.metadata = folder, dict[str, Any]()
        self._arrays: dict[str, tuple[str, int]] = {}
        self._digests: dict[str, Any] = {}
        self._description, self._size, self._next_report = description, 0, time.monotonic() + REPORT_EVERY_S

    def append(self, name: str, values: np.ndarray) -> None:
        """Append values to an array; its first values decide its dtype."""
        dtype, count = self._arrays.get(name, (values.dtype.str, 0))
        content = np.ascontiguousarray(values, dtype).data
        with (self.folder / f"{name}.bin").open("ab") as file:
            file.write(content)
        self._digests.setdefault(name, hashlib.sha256()).update(content)
        self._arrays[name] = dtype, count + len(values)
        self._size += values.nbytes
        if time.monotonic() > self._next_report:
            self._next_report = time.monotonic() + REPORT_EVERY_S
            print(f"{self._description}: {self._size / 2**20:,.0f} MiB written to {self.folder.parent}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Write entry.json, which describes the arrays."""
        arrays = {name: [*kind, self._digests[name].hexdigest()] for name, kind in self._arrays.items()}
        values = {"format": FORMAT, "arrays": arrays, "facts": self.metadata}
        (self.folder / ENTRY).write_text(json.dumps(values) + "\n", encoding="utf-8")


Write = Callable[[CacheWriter], None]
"""Function that writes an entry's arrays and metadata. It is sent to other hosts and has to write the same there."""


@dataclass(frozen=True)
class CacheEntry:
    """A cache entry, referred to by its name, so that it can be sent to any host.

    Attributes:
        key: its fingerprint, which is its folder's name.
        write: writes its content where it is missing.
        cache: the value of `data.cache`.
        description: what it is, for messages to the user.
        content_fingerprint: a fingerprint of its content, once that is known: every host that writes it has to get the same.
        carried: content of its files by name, for hosts that cannot write it.
        driver_cache: the cache folder where the driver has it. Processes of the driver's host may be set to another cache, and another host
            may share this folder.
    """

    key: str
    write: Write
    cache: str | None = None
    description: str = "data"
    content_fingerprint: str | None = None
    carried: dict[str, bytes] | None = field(default=None, repr=False)
    driver_cache: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_manifest", "_maps")}

    @property
    def folder(self) -> Path:
        """The entry's folder on this host."""
        if self.driver_cache is not None and (Path(self.driver_cache) / self.key / ENTRY).is_file():
            return Path(self.driver_cache) / self.key
        return cache_folder(self.cache) / self.key

    def ensure_present(self) -> "CacheEntry":
        """Write the entry on this host if it is missing, and check that its content is the expected one.

        Returns:
            The entry with `content_fingerprint` and `driver_cache` set.

        Raises:
            DataError: it cannot be written here, or has other content than on the driver's host.
        """
        if not (self.folder / ENTRY).is_file():
            self._create()
        content = fingerprint(self._manifest["arrays"])
        if self.content_fingerprint not in (None, content):
            raise DataError(
                f"{self.description}: this host has other data under that name than the driver's host has: give all hosts the same "
                f"files, or remove {self.folder} if it is damaged"
            )
        if self.content_fingerprint:
            return self
        return replace(self, content_fingerprint=content, driver_cache=str(self.folder.parent.absolute()))

    def with_files(self) -> "CacheEntry":
        """Return a copy that carries the content of the files, if they are small enough to be sent."""
        files = [path for path in self.folder.iterdir() if path.is_file()]
        if sum(path.stat().st_size for path in files) > CARRIED:
            return self
        return replace(self, carried={path.name: path.read_bytes() for path in files})

    def _create(self) -> None:
        """Write the entry, unless another process does so meanwhile.

        The files are written to a temporary folder, which is renamed at the end, so that an entry is either complete or absent.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder.with_suffix(".lock")):
                if (self.folder / ENTRY).is_file():  # another process has written it while this one waited for the lock
                    return
                temporary = self.folder.with_suffix(".part")
                shutil.rmtree(temporary, ignore_errors=True)  # left behind by a process that was killed
                temporary.mkdir(parents=True)
                try:
                    self._write_files(temporary)
                    os.replace(temporary, self.folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise DataError(
                f"{self.description} cannot be stored in {self.folder.parent}: {error}; set data.cache to a writable folder with enough "
                "room"
            ) from None

    def _write_files(self, folder: Path) -> None:
        """Write the entry's files into a folder: those that it carries, or else those that `write` makes."""
        if self.carried is not None:
            for name, content in self.carried.items():
                (folder / name).write_bytes(content)
            return
        writer = CacheWriter(folder, self.description)
        self.write(writer)
        writer.finish()

    # What it holds --------------------------------------------------------------------------------------------------------------

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / ENTRY).read_text(encoding="utf-8")))

    @cached_property
    def _maps(self) -> dict[str, np.ndarray]:
        return {}

    @property
    def metadata(self) -> dict[str, Any]:
        """The plain values that were stored with the arrays."""
        return dict(self._manifest["facts"])

    def array(self, name: str) -> np.ndarray:
        """Return an array, mapped into memory. A name that was never written is an empty array.

        Raises:
            DataError: its file is missing or not as long as it was written.
        """
        if name not in self._maps:
            dtype, count, _ = self._manifest["arrays"].get(name, ("<u1", 0, ""))
            path = self.folder / f"{name}.bin"
            size = path.stat().st_size if path.exists() else 0
            if size != count * np.dtype(dtype).itemsize:
                raise DataError(f"{path} is damaged or gone: remove {self.folder}, and it will be made again")
            self._maps[name] = np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)
        return self._maps[name]

    def checksum(self, name: str, start: int = 0, stop: int | None = None) -> str:
        """Return a checksum of values `start` to `stop` of an array; by default of all.

        It is stored beside the array, since reading the values takes about a second per GB.
        """
        dtype, count, digest_of_all = self._manifest["arrays"].get(name, ("<u1", 0, ""))
        if stop is None or (start, stop) == (0, count):
            return f"{dtype} {count} {digest_of_all}"
        stored = self.folder / f"{name}-{start}-{stop}.sha256"
        if stored.is_file():
            return stored.read_text(encoding="utf-8")
        digest, values = hashlib.sha256(), self.array(name)
        for first in range(start, stop, 2**24):
            digest.update(np.ascontiguousarray(values[first : min(stop, first + 2**24)]).data)
        checksum = f"{dtype} {stop - start} {digest.hexdigest()}"
        temporary = stored.with_name(f".{stored.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            temporary.write_text(checksum, encoding="utf-8")
            os.replace(temporary, stored)
        return checksum


@dataclass(frozen=True)
class ArraySlice:
    """Values `start` to `stop` of an array of an entry. Workers receive this reference instead of the values.

    It can be sliced, indexed, and converted to an array.
    """

    entry: CacheEntry
    name: str
    start: int
    stop: int

    @classmethod
    def whole(cls, entry: CacheEntry, name: str) -> "ArraySlice":
        """Return a reference to a whole array."""
        return cls(entry, name, 0, len(entry.array(name)))

    @property
    def values(self) -> np.ndarray:
        """The values, mapped into memory and read when they are accessed."""
        return self.entry.array(self.name)[self.start : self.stop]

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, chosen: Any) -> Any:
        return self.values[chosen]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype)

    @property
    def checksum(self) -> str:
        """A checksum of these values."""
        return self.entry.checksum(self.name, self.start, self.stop)
