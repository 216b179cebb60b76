"""A thread that does what the event loop asks of it, all that has come at once."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

W = TypeVar("W")

#: Seconds without anything to do after which it is idle.
_QUIET: Final = 1.0


class _Request(NamedTuple, Generic[W]):
    """Something that somebody waits for."""

    work: W
    then: Callable[[Any], None] | None
    answer: "asyncio.Future[Any]"


class BatchThread(Generic[W]):
    """It takes work in the order in which it is asked for, from one event loop."""

    def __init__(
        self,
        name: str,
        do: Callable[[Sequence[W]], Sequence[object]],
        *,
        most: int,
        afterwards: Callable[[bool], None] = lambda idle: None,
    ) -> None:
        """`do` returns for each work, `most` at once, what came of it: a value, or an exception to be raised.

        `afterwards` is called on the thread when that has been handed over, and with True every second while it is
        idle. It must not raise.
        """
        self._do = do
        self._most = most
        self._afterwards = afterwards
        self._asked: queue.SimpleQueue[_Request[W] | None] = queue.SimpleQueue()
        # A daemon: who forgets to close it is not kept from exiting.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def ask(self, work: W, then: Callable[[Any], None] | None = None) -> Any:
        """What comes of the work. Work that nobody waits for any more is left undone, unless it has begun.

        `then` is told the value first, on the event loop, in the order of the works, whether or not somebody waits.
        """
        answer = asyncio.get_running_loop().create_future()
        self._asked.put(_Request(work, then, answer))
        return await answer

    def close(self) -> None:
        """Wait until all that has been asked for is done. Nothing is asked after that."""
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        going_on = True
        while going_on:
            batch, going_on = self._gather(_QUIET)
            if batch:
                try:
                    outcomes = self._do([request.work for request in batch])
                except Exception as error:
                    outcomes = [error for _ in batch]
                with contextlib.suppress(RuntimeError):  # The event loop has been closed: nobody waits.
                    batch[0].answer.get_loop().call_soon_threadsafe(_tell, batch, outcomes)
            self._afterwards(not batch)

    def _gather(self, patience: float) -> tuple[list[_Request[W]], bool]:
        """What has been asked for, none after so many seconds without, and whether there may be more."""
        batch: list[_Request[W]] = []
        with contextlib.suppress(queue.Empty):
            while len(batch) < self._most:
                request = self._asked.get(block=not batch, timeout=patience)
                if request is None:
                    return batch, False
                if not request.answer.cancelled():
                    batch.append(request)
        return batch, True


def _tell(batch: Sequence[_Request[Any]], outcomes: Sequence[object]) -> None:
    for (_, then, answer), outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, Exception):
            if not answer.done():
                answer.set_exception(outcome)
            continue
        if then is not None:
            then(outcome)
        if not answer.done():
            answer.set_result(outcome)
