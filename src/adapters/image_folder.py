"""Pictures in a folder: one sub-folder per generation, one file per picture."""

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Final

from domain.errors import Failure
from domain.ports import Picture

logger = logging.getLogger(__name__)

_SUFFIXES: Final = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
_MEDIA_TYPES: Final = {suffix: media_type for media_type, suffix in _SUFFIXES.items()}

# Bounded, so that no name is too long for the file system.
_ID: Final = re.compile(r"[a-z]{1,16}_[0-9]{1,20}_[a-z0-9]{1,64}")
_NAME: Final = re.compile(rf"({_ID.pattern})-[0-9a-f]{{32}}\.({'|'.join(_MEDIA_TYPES)})")
#: A picture on its way into the folder.
_PROBE: Final = re.compile(r"\.probe-[0-9a-f]{16}")
_PART: Final = re.compile(rf"\.{_NAME.pattern}\.part")


class ImageFolder:
    """Keeps pictures under `root`, which is made when the first one comes.

    What is not named like one of our pictures is neither served nor removed. A file that cannot be removed
    is left for the next sweep.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tag = secrets.token_hex(8)

    async def save(self, generation_id: str, picture: Picture) -> str:
        if not _ID.fullmatch(generation_id):
            raise ValueError(f"{generation_id!r} cannot name a folder")
        name = f"{generation_id}-{secrets.token_hex(16)}.{_SUFFIXES[picture.media_type]}"
        try:
            await asyncio.to_thread(self._write, generation_id, name, picture.data)
        except OSError as error:
            logger.error("a picture of %s cannot be stored: %s", generation_id, error.strerror)
            raise Failure("storage_failed") from error
        return name

    async def load(self, name: str) -> Picture | None:
        path = self._path(name)
        if path is None:
            return None
        try:
            data = await asyncio.to_thread(path.read_bytes)
        except FileNotFoundError:
            return None
        return Picture(data, _MEDIA_TYPES[path.suffix[1:]])

    async def discard(self, name: str) -> None:
        path = self._path(name)
        if path is not None:
            await asyncio.to_thread(_remove, path)

    async def remove(self, generation_id: str) -> None:
        if _ID.fullmatch(generation_id):
            await asyncio.to_thread(shutil.rmtree, self._root / generation_id, ignore_errors=True)

    async def names(self, *, older_than: datetime) -> dict[str, list[str]]:
        return await asyncio.to_thread(self._scan, older_than.timestamp())

    async def probe(self) -> None:
        try:
            await asyncio.to_thread(self._probe)
        except OSError as error:
            raise Failure("storage_failed") from error

    def _probe(self) -> None:
        # One name for each process: what a killed one leaves is removed by the next sweep.
        file = self._root / f".probe-{self._tag}"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            _write_synced(file.open("wb"), bytes(4096))
        finally:
            file.unlink(missing_ok=True)

    def _path(self, name: str) -> Path | None:
        match = _NAME.fullmatch(name)
        return match and self._root / match[1] / name

    def _write(self, generation_id: str, name: str, data: bytes) -> None:
        folder = self._root / generation_id
        part = folder / f".{name}.part"
        file = _create(part)
        try:
            _write_synced(file, data)
            part.replace(folder / name)
        except BaseException:
            _remove(part)
            raise

    def _scan(self, moment: float) -> dict[str, list[str]]:
        """The names by generation. What was left by writers that died is removed on the way."""
        found: dict[str, list[str]] = {}
        for folder in _entries(self._root):
            if _PROBE.fullmatch(folder.name) and _older(folder, moment):
                Path(folder.path).unlink(missing_ok=True)
            if not _ID.fullmatch(folder.name):
                continue
            for file in _entries(Path(folder.path)):
                if not _older(file, moment):
                    continue
                if _PART.fullmatch(file.name):
                    _remove(Path(file.path))
                elif _NAME.fullmatch(file.name):
                    found.setdefault(folder.name, []).append(file.name)
        return found


def _write_synced(file: IO[bytes], data: bytes) -> None:
    with file:
        file.write(data)
        file.flush()
        # Else a power cut could leave the name without all of the bytes.
        os.fsync(file.fileno())


def _create(part: Path) -> IO[bytes]:
    """The new file, its folder made where it is missing or is removed, having been empty, in between."""
    for _ in range(10):
        # Either error can come of it: `mkdir` looks a second time at what it has found there.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            part.parent.mkdir(parents=True, exist_ok=True)
            return part.open("xb")
    raise FileNotFoundError(part)


def _remove(file: Path) -> None:
    """Remove the file, and its folder if it was the last."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", file.name, error.strerror)
    with contextlib.suppress(OSError):
        file.parent.rmdir()


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in the folder; nothing where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries


def _older(entry: os.DirEntry[str], moment: float) -> bool:
    try:
        return entry.stat(follow_symlinks=False).st_mtime < moment
    except FileNotFoundError:
        return False
