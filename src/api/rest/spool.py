"""Where uploads are kept while they come: all files of one request in one temporary file."""

import os
from tempfile import SpooledTemporaryFile
from typing import Final

#: Bytes of one request that are kept in memory. With more, all of them are on the disk.
_IN_MEMORY: Final = 256 * 1024


class Spool(SpooledTemporaryFile[bytes]):
    """The files of one request, one after the other: whatever their number, they take one descriptor."""

    def __init__(self) -> None:
        super().__init__(_IN_MEMORY)
        self.on_disk = False

    def rollover(self) -> None:
        """Called once it is too large for memory."""
        super().rollover()
        self.on_disk = True


class SpooledPart:
    """One of them, as a file. It is written before the next one is."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._start = self._size = self._at = 0

    @property
    def _rolled(self) -> bool:
        """Asked by `starlette.datastructures.UploadFile`: whether it is on the disk, and used in a thread."""
        return self._spool.on_disk

    def write(self, data: bytes) -> int:
        """Append to it."""
        end = self._spool.seek(0, os.SEEK_END)
        self._start = self._start if self._size else end
        self._spool.write(data)
        self._size += len(data)
        self._at = self._size
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """So many of the following bytes, or all."""
        left = self._size - self._at
        self._spool.seek(self._start + self._at)
        data = self._spool.read(min(size, left) if size >= 0 else left)
        self._at += len(data)
        return data

    def seek(self, offset: int) -> int:
        """Go to so many bytes from its beginning."""
        self._at = offset
        return offset

    def tell(self) -> int:
        """How many bytes precede the present one."""
        return self._at
