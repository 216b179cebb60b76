"""The frames that wait to be sent to one client, within limits, over whatever transport takes them."""

import asyncio
from collections.abc import Callable
from typing import Final, Generic, TypeVar

F = TypeVar("F")

#: What may wait for one client.
MAX_EVENTS: Final = 256
MAX_BYTES: Final = 512 * 1024

#: Up to here the device puts more: the low-water mark.
_LOW_EVENTS: Final = MAX_EVENTS // 2
_LOW_BYTES: Final = MAX_BYTES // 4

#: Seconds between two calls of `check_progress`.
PROGRESS_INTERVAL: Final = 0.5

#: Seconds without progress after which a client with a backlog is disconnected.
STALL_TIMEOUT = 5.0


class BoundedSendBuffer(Generic[F]):
    """`domain.device.SendBuffer`; the transport takes from the other end.

    Events are offered, and never fill the buffer up. Answers to a client (acks) are put without asking: a client that
    keeps asking and does not read the answers is disconnected.
    """

    __slots__ = (
        "_changed", "_frames", "_progress", "_size", "_stalled_for", "_taken", "_wake",
        "abort", "bytes", "closed", "finish", "write",
    )  # fmt: skip

    def __init__(
        self,
        size: Callable[[F], int],
        abort: Callable[[], None],
        finish: Callable[[], None] | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`size` is a frame's size in bytes; `abort` ends the transport, after this call has returned.

        `finish` ends the transport once the buffer is empty. ``None``: it ends when `take` returns nothing. `wake` is
        called when the first frame waits that `write` has not passed by the buffer.
        """
        self._size = size
        self.abort = abort
        self.finish = finish or self.close
        self._wake = wake
        self._frames: list[F] = []
        #: Set when a frame is added or taken, and at the end.
        self._changed = asyncio.Event()
        #: Passes a frame by the buffer to the transport. False: it has to wait, and so must those after it until this
        #: is set again. ``None``: all frames wait.
        self.write: Callable[[F], bool] | None = None
        #: The size of all waiting frames.
        self.bytes = 0
        #: The connection has ended: nothing more can be put.
        self.closed = False
        self._taken = 0
        #: What had been taken, and what the transport had not sent, at the last check.
        self._progress = (0, 0)
        self._stalled_for = 0.0

    def __len__(self) -> int:
        """How many frames wait."""
        return len(self._frames)

    def offer(self, frame: F) -> bool:
        write = self.write
        if write is not None and write(frame):
            self._taken += 1
        elif self.closed:
            pass
        elif len(self._frames) >= MAX_EVENTS or self.bytes + self._size(frame) > MAX_BYTES:
            return False
        else:
            self._append(frame)
        return True

    def put(self, frame: F) -> None:
        """Send or queue a frame, without waiting. Does nothing once the connection has ended."""
        if self.closed:
            return
        if len(self) >= 2 * MAX_EVENTS or self.bytes > 4 * MAX_BYTES:
            self.abort()
        elif self.write is not None and self.write(frame):
            self._taken += 1
        else:
            self._append(frame)

    async def drained(self) -> bool:
        await self._at_most(_LOW_EVENTS, _LOW_BYTES)
        return not self.closed

    async def flushed(self) -> None:
        await self._at_most(0, 0)

    async def take(self, limit: int) -> list[F]:
        """Wait for frames and take at most `limit` of them; none once the buffer is closed and empty."""
        while not self._frames and not self.closed:
            await self._change()
        frames = self._frames[:limit]
        del self._frames[:limit]
        self.bytes -= sum(map(self._size, frames))
        self._taken += len(frames)
        self._changed.set()
        return frames

    def close(self, last: F | None = None) -> None:
        """Accept no more frames. `last` is sent after those that wait."""
        self.closed, self.write = True, None
        if last is not None:
            self._append(last)
        self._changed.set()

    def clear(self) -> None:
        """Drop the waiting frames."""
        self._frames.clear()
        self.bytes = 0

    def check_progress(self, unsent: int, *, paused: bool = False) -> bool:
        """Abort, and return True, if the client has had a backlog and has taken nothing for `STALL_TIMEOUT`.

        Counts calls, not wall time, so that a paused process does not disconnect its clients.

        Args:
            unsent: bytes that the transport has taken and the kernel has not.
            paused: the client cannot take anything at present.
        """
        progress = self._taken, unsent
        backlog = unsent or len(self) > _LOW_EVENTS or self.bytes > _LOW_BYTES
        if not backlog or paused or progress != self._progress:
            self._stalled_for = 0.0
        else:
            self._stalled_for += PROGRESS_INTERVAL
        self._progress = progress
        if self._stalled_for < STALL_TIMEOUT:
            return False
        self.abort()
        return True

    def _append(self, frame: F) -> None:
        if self.write is not None:
            self.write = None
            self._wake()
        self._frames.append(frame)
        self.bytes += self._size(frame)
        self._changed.set()

    async def _at_most(self, events: int, size: int) -> None:
        while not self.closed and (len(self) > events or self.bytes > size):
            await self._change()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
