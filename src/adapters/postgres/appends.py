"""Appends of one node in batches: what has come while the calls before were under way goes in one call."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from adapters.postgres.database import Database
from domain import errors
from domain.feed import Logged, zero_id
from domain.ports.log import Append, Start
from domain.ports.system import Clock

#: Appends in one call, and calls at once. Besides these, one call waits for the lock of a user.
_BATCH: Final = 64
_CALLS: Final = 2

#: Transactions of this node that wait for a synchronous standby. Those whose statement was given up wait on.
_UNREPLICATED: Final = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = $1 AND wait_event = 'SyncRep'
"""
_MAX_UNREPLICATED: Final = 8

_Request = tuple[Append, "asyncio.Future[Logged]"]


class Appends:
    """Appends for one event loop. A user is in one call at a time, so that calls do not wait for each other's locks."""

    def __init__(
        self, database: Database, *, credits: int | None, clock: Clock, outbox: bool, appended: Callable[[], None]
    ) -> None:
        """`appended` is called after each call that has appended something."""
        self._database = database
        self._credits = credits
        self._clock = clock
        self._outbox = outbox
        self._appended = appended
        self._waiting: list[_Request] = []
        self._users: set[str] = set()
        self._calls: set[asyncio.Task[None]] = set()
        #: Appends whose user another node has locked, and the call that waits for one of them.
        self._locked: list[_Request] = []
        self._waits: set[asyncio.Task[None]] = set()
        self._scheduled = False
        #: The last call was given up.
        self._given_up = False

    async def append(self, entry: Append) -> Logged:
        """As `domain.ports.log.EventLog.append`."""
        future: asyncio.Future[Logged] = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, future))
        self._schedule()
        return await future

    def _schedule(self) -> None:
        """Call once everybody who can append now has done so."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        self._scheduled = False
        # Not those whose callers have been cancelled, as in `_next_batch`: what these ask for again is tried at once.
        self._users -= {entry.user_id for entry, future in self._locked if future.done()}
        self._locked = [request for request in self._locked if not request[1].done()]
        if self._locked and not self._waits:
            self._start([self._locked.pop(0)], wait=True)
        while self._waiting and len(self._calls) < _CALLS and (batch := self._next_batch()):
            self._start(batch, wait=False)

    def _start(self, batch: Sequence[_Request], *, wait: bool) -> None:
        users = {entry.user_id for entry, _ in batch}
        self._users |= users
        task = asyncio.create_task(self._call(batch, users, wait=wait))
        calls = self._waits if wait else self._calls
        calls.add(task)
        task.add_done_callback(calls.discard)
        task.add_done_callback(lambda _: self._schedule())

    def _next_batch(self) -> list[_Request]:
        batch: list[_Request] = []
        kept: list[_Request] = []
        users = set(self._users)
        for request in self._waiting:
            entry, future = request
            if not future.done():  # Its caller has not been cancelled.
                if len(batch) < _BATCH and entry.user_id not in users:
                    users.add(entry.user_id)
                    batch.append(request)
                else:
                    kept.append(request)
        self._waiting = kept
        return batch

    async def _call(self, batch: Sequence[_Request], users: set[str], *, wait: bool) -> None:
        try:
            if self._given_up:
                await self._check_standby()
            rows = await self._database.rows("append_v1", *self._arguments(batch, wait=wait))
            self._given_up = False
        except Exception as error:
            self._given_up = True
            for _, future in batch:
                if not future.done():
                    future.set_exception(errors.LogUnavailable() if isinstance(error, errors.LogUnavailable) else error)
            return
        finally:
            self._users -= users
        if any(row["r_outcome"] == "accepted" for row in rows):
            self._appended()
        for request, row in zip(batch, rows, strict=True):
            entry, future = request
            if row["r_outcome"] == "busy":
                # Another transaction has locked the user's row, or the user is not there any more.
                self._locked.append(request)
                self._users.add(entry.user_id)
                continue
            outcome = _outcome(entry, row)
            if future.done():
                continue
            if isinstance(outcome, errors.Refusal):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    async def _check_standby(self) -> None:
        """Raise `LogUnavailable` while no more transactions may wait for a standby: each has a connection."""
        if await self._database.fetchval(_UNREPLICATED, self._database.name) > _MAX_UNREPLICATED:
            raise errors.LogUnavailable

    def _arguments(self, batch: Sequence[_Request], *, wait: bool) -> Sequence[Any]:
        columns: Sequence[Sequence[Any]] = list(zip(*(self._row(entry) for entry, _ in batch), strict=True))
        return *columns, self._credits, self._outbox, wait

    def _row(self, entry: Append) -> tuple[Any, ...]:
        start, late = entry.start, entry.not_after
        return (
            entry.user_id,
            zero_id(self._database.epoch, entry.user_id),
            entry.generation_id,
            entry.sequence,
            entry.event_id,
            entry.event,
            entry.name,
            json.dumps(dict(entry.images)) if entry.images else None,
            entry.at,
            entry.credit,
            entry.terminal,
            entry.free,
            # By the server's clock: a statement that is stuck on its way is late, too.
            late and self._database.now + (late - self._clock()),
            # Its fields are in the order of the function's parameters.
            *(start or [None] * len(Start._fields)),
        )


def _outcome(entry: Append, row: Any) -> Logged | errors.Refusal:
    outcome = row["r_outcome"]
    if outcome in ("accepted", "again"):
        images = json.loads(row["r_images"]) if row["r_images"] else entry.images
        place = entry.user_id, row["r_position"], entry.event_id, entry.generation_id, entry.sequence
        event = row["r_event"] or entry.event  # It is sent back only if it is another one.
        return Logged(*place, entry.name, event, row["r_first"], row["r_end"], images)
    refusals: Mapping[str, errors.Refusal] = {
        "late": errors.LogUnavailable(),
        "mismatch": errors.IdempotencyMismatch(),
        "started": errors.AlreadyStarted(row["r_begun"]),
        "conflict": errors.Conflict(),
        "too_many": errors.TooManyGenerations(),
        "no_credit": errors.InsufficientCredit(),
    }
    return refusals[outcome]
