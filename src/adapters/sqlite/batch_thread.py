"""A worker thread that handles the requests of an event loop in batches."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar

W = TypeVar("W")

#: Seconds without a request after which the thread is idle.
_IDLE_AFTER: Final = 1.0


class _Request(NamedTuple, Generic[W]):
    work: W
    then: Callable[[Any], None] | None
    future: "asyncio.Future[Any]"


@dataclass(eq=False)
class BatchThread(Generic[W]):
    """Runs work from one event loop, in the order of submission."""

    name: str
    #: Runs a batch of at most `most` works, and returns for each its value or the exception to raise.
    do: Callable[[Sequence[W]], Sequence[object]]
    most: int
    #: Called on the thread after each batch with False, and every second while idle with True. It must not raise.
    afterwards: Callable[[bool], None] = lambda idle: None

    def __post_init__(self) -> None:
        self._requests: queue.SimpleQueue[_Request[W] | None] = queue.SimpleQueue()
        # A daemon, so that the process can exit without `close`.
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def submit(self, work: W, then: Callable[[Any], None] | None = None) -> "asyncio.Future[Any]":
        """The work's value or exception, later. Work cancelled before it starts is skipped.

        `then` is called first with the value, on the event loop, in the order of submission, even if the caller was
        cancelled meanwhile.
        """
        future = asyncio.get_running_loop().create_future()
        self._requests.put(_Request(work, then, future))
        return future

    def close(self) -> None:
        """Finish all submitted work and end the thread. Nothing may be submitted afterwards."""
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        running = True
        while running:
            batch, running = self._gather()
            if batch:
                try:
                    outcomes = self.do([request.work for request in batch])
                except Exception as error:
                    outcomes = [error for _ in batch]
                with contextlib.suppress(RuntimeError):  # The event loop has been closed.
                    batch[0].future.get_loop().call_soon_threadsafe(_resolve, batch, outcomes)
            self.afterwards(not batch)

    def _gather(self) -> tuple[list[_Request[W]], bool]:
        """The next batch, empty when idle, and whether the thread goes on."""
        batch: list[_Request[W]] = []
        with contextlib.suppress(queue.Empty):
            while len(batch) < self.most:
                request = self._requests.get(block=not batch, timeout=_IDLE_AFTER)
                if request is None:
                    return batch, False
                if not request.future.cancelled():
                    batch.append(request)
        return batch, True


def _resolve(batch: Sequence[_Request[Any]], outcomes: Sequence[object]) -> None:
    for (_, then, future), outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, Exception):
            if not future.done():
                future.set_exception(outcome)
            continue
        if then is not None:
            then(outcome)
        if not future.done():
            future.set_result(outcome)
