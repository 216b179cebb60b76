"""Stores pictures in a folder: one subfolder per generation, one file per picture."""

import asyncio
import contextlib
import errno
import fcntl
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Final

from adapters.images.layout import ID, MARK, NAME, PROBED, Mark, media_type, new_name
from domain.errors import Failure
from domain.ports.images import ImagesRefused, Picture

logger = logging.getLogger(__name__)

#: A picture that is being written.
_PART: Final = re.compile(rf"\.{NAME.pattern}\.([0-9a-f]{{8}}\.)?part")
#: What `ImageFolder.probe` has written.
_PROBE: Final = re.compile(r"\.probe-[0-9a-f]{16}")
#: Seconds in which nodes that share a folder mark it, one after the other.
_MARKING: Final = 2


class ImageFolder:
    """`domain.ports.images.ImageStore` under `root`, which nobody else may change meanwhile.

    It belongs to one process, which holds an exclusive lock on its mark; or, if shared, to all nodes of one log, which
    hold a shared lock. Files with other names than our pictures' are not served, and only removed with the folder of
    their generation. Nothing is written or removed while the folder is missing or replaced by another.
    """

    def __init__(self, root: Path, *, log: str, epoch: str, shared: bool = False) -> None:
        """Claim the folder for the log of this kind (``memory``, ``sqlite``) and epoch, or create it.

        `shared`: the other nodes of this log use it too.

        Raises:
            ImagesRefused: another process uses it, it belongs to another durable log, or it cannot be used.
        """
        self._root = root
        #: One per process; the sweep removes that of a killed process.
        self._probed = root / f".probe-{secrets.token_hex(8)}"
        self._lost = False
        with _refusing(root):
            root.mkdir(parents=True, exist_ok=True)
            # Not inherited by child processes, so that only this process holds the lock.
            self._lock = os.open(root / MARK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                #: Pictures stored before this time (seconds since 1970) are never reported as removable.
                self._since = self._claim(Mark(log, epoch), shared)
                #: Pictures stored before this time are those of dead processes, if this one has the folder to itself.
                self._claimed = 0.0 if shared else os.fstat(self._lock).st_mtime
            except BaseException:
                os.close(self._lock)
                raise

    @staticmethod
    def examine(root: Path, *, log: str, epoch: str | None) -> None:
        """Check without changes whether the folder could be claimed, apart from its lock. Raises `ImagesRefused`."""
        # What does not exist is created when the folder is claimed.
        with _refusing(root), contextlib.suppress(FileNotFoundError):
            os.scandir(root).close()
            Mark(log, epoch).check((root / MARK).read_bytes(), f"The image folder {root}")

    def _claim(self, mark: Mark, shared: bool) -> float:
        deadline = time.monotonic() + _MARKING
        while True:
            try:
                return self._lock_and_mark(mark, shared)
            except BlockingIOError:
                if not shared or time.monotonic() > deadline:
                    raise ImagesRefused(f"The image folder {self._root} is in use by another process.") from None
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # Two that wait to write the mark would wait for each other.
                time.sleep(secrets.randbelow(100) / 1000)

    def _lock_and_mark(self, mark: Mark, shared: bool) -> float:
        """Raises BlockingIOError: another process holds the lock."""
        if shared:
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if self._checked(mark) == bytes(mark):
                return 0
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = self._checked(mark)
        # In this order, a process killed in between leaves a complete first line.
        os.pwrite(self._lock, bytes(mark), 0)
        os.ftruncate(self._lock, len(bytes(mark)))
        os.fsync(self._lock)
        if shared:
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # Without a mark, older pictures may belong to the log of an earlier version.
        return 0 if found else os.fstat(self._lock).st_mtime

    def _checked(self, mark: Mark) -> bytes:
        found = os.pread(self._lock, 4096, 0)
        mark.check(found, f"The image folder {self._root}")
        return found

    async def close(self) -> None:
        os.close(self._lock)
        self._lock = -1

    async def save(self, generation_id: str, picture: Picture, name: str | None = None) -> str:
        name = name or new_name(generation_id, picture)
        with _failing("a picture of %s cannot be stored: %s", generation_id):
            await asyncio.to_thread(self._write, generation_id, name, picture.data)
        return name

    async def load(self, name: str) -> Picture | None:
        with _reading(name):
            return Picture(await asyncio.to_thread(self._path(name).read_bytes), media_type(name))
        return None

    async def size(self, name: str) -> int:
        with _reading(name):
            return (await asyncio.to_thread(self._path(name).stat)).st_size
        return 0

    async def discard(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            path = self._path(name)
            if self._held():
                await asyncio.to_thread(_remove, path)

    async def remove(self, generation_id: str) -> None:
        if ID.fullmatch(generation_id) and self._held():
            await asyncio.to_thread(shutil.rmtree, self._root / generation_id, ignore_errors=True)

    async def names(self, *, older_than: datetime) -> dict[str, list[str]]:
        return await asyncio.to_thread(self._scan, older_than.timestamp())

    async def probe(self) -> None:
        with _failing("no picture can be stored: %s"):
            await asyncio.to_thread(self._probe)

    def _probe(self) -> None:
        self._check_held()
        try:
            _write_synced(self._probed.open("wb"), PROBED)
        finally:
            self._probed.unlink(missing_ok=True)

    def _held(self) -> bool:
        """Whether the folder at this path is still the claimed one. Logs when that changes."""
        try:
            held = os.path.samestat((self._root / MARK).lstat(), os.fstat(self._lock))
        except OSError:
            held = False
        if held == self._lost:
            self._lost = not held
            logger.error("the image folder %s", "is back" if held else "was removed or replaced; nothing is stored")
        return held

    def _check_held(self) -> None:
        if not self._held():
            raise FileNotFoundError(errno.ENOENT, "the folder was removed or replaced")

    def _path(self, name: str) -> Path:
        """Raises FileNotFoundError: no picture has this name."""
        if not (match := NAME.fullmatch(name)):
            raise FileNotFoundError(name)
        return self._root / match[1] / name

    def _write(self, generation_id: str, name: str, data: bytes) -> None:
        self._check_held()
        # The random part is for thumbnails, which two processes may store at the same time.
        part = self._root / generation_id / f".{name}.{secrets.token_hex(4)}.part"
        file = _create(part)
        try:
            _write_synced(file, data)
            part.replace(part.with_name(name))
        except BaseException:
            _remove(part)
            raise

    def _scan(self, moment: float) -> dict[str, list[str]]:
        """The names of removable pictures by generation. Also removes the partial files of killed processes."""
        found: dict[str, list[str]] = {}
        if not self._held():
            return found
        for folder in _entries(self._root):
            if _PROBE.fullmatch(folder.name) and _stored(folder) < max(moment, self._claimed):
                Path(folder.path).unlink(missing_ok=True)
            if not ID.fullmatch(folder.name):
                continue
            for file in _entries(Path(folder.path)):
                if not self._since <= _stored(file) < max(moment, self._claimed):
                    continue
                if _PART.fullmatch(file.name):
                    _remove(Path(file.path))
                elif NAME.fullmatch(file.name):
                    found.setdefault(folder.name, []).append(file.name)
        return found


def _write_synced(file: IO[bytes], data: bytes) -> None:
    with file:
        file.write(data)
        file.flush()
        # Otherwise a power failure could leave an incomplete file.
        os.fsync(file.fileno())


@contextlib.contextmanager
def _failing(what: str, *of: str) -> Iterator[None]:
    """Turn errors of the file system into `Failure`, and log the reason."""
    try:
        yield
    except OSError as error:
        _log(logging.ERROR, what, *of, error=error)
        raise Failure("storage_failed") from error


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """The same for a picture that is read, or may not be there."""
    with (
        _failing("a picture of %s cannot be read: %s", name.rpartition("-")[0]),
        contextlib.suppress(FileNotFoundError),
    ):
        yield


@contextlib.contextmanager
def _refusing(root: Path) -> Iterator[None]:
    """Turn errors of the file system into `ImagesRefused`."""
    try:
        yield
    except OSError as error:
        raise ImagesRefused(f"The image folder {root} cannot be used: {error.strerror}.") from None


def _create(part: Path) -> IO[bytes]:
    """Create the file, and its folder, which a concurrent `_remove` may delete while it is empty."""
    for _ in range(10):
        # That race can raise either error, as `mkdir` checks an existing path again.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            part.parent.mkdir(parents=True, exist_ok=True)
            return part.open("xb")
    raise FileNotFoundError(part)


def _log(level: int, what: str, *of: str, error: OSError) -> None:
    logger.log(level, what, *of, error.strerror, extra={"repeat_key": (what, error.strerror)})


def _remove(file: Path) -> None:
    """Remove the file, and its folder if that is then empty."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        _log(logging.WARNING, "a picture of %s cannot be removed: %s", file.parent.name, error=error)
    with contextlib.suppress(OSError):
        file.parent.rmdir()


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of the folder; none if it does not exist."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries


def _stored(entry: os.DirEntry[str]) -> float:
    """The time of the last write in seconds since 1970; infinity if the file is gone."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return math.inf
