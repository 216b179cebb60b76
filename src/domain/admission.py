"""Limits for starts: some are checked before the body is read, others reserved before an image is decoded."""

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, NamedTuple

from domain.errors import InsufficientCredit, Overloaded, QueueFull, StorageLimit, TooManyGenerations, TooManyStarts
from domain.ports.leases import Leases
from domain.ports.ledger import Ledger
from domain.ports.quotas import Quotas

#: Seconds for which a start waits if only the reservations of other starts stand in its way.
WAIT: Final = 30.0


class Limits(NamedTuple):
    """See the settings of these names; ``None``: no limit."""

    max_waiting: int
    max_per_user: int
    retention: timedelta
    starts_per_minute: int | None = None
    max_stored_per_user: int | None = None


class _Reserved:
    """What one user's starts in progress have reserved."""

    def __init__(self) -> None:
        self.starts = 0
        self.size = 0
        #: How many starts have a reservation or wait for one.
        self.users = 0
        #: Set, and replaced, as soon as a reservation ends.
        self.changed = asyncio.Event()


@dataclass(eq=False)
class Admission:
    """Admits starts by all limits. Reservations are those of this process; the append decides."""

    ledger: Ledger
    leases: Leases
    quotas: Quotas
    limits: Limits
    overloaded: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self._reserved: dict[str, _Reserved] = {}
        #: Starts of all users that are about to wait for a worker.
        self._joining = 0
        #: Set, and replaced, as soon as one of these waits for one or was refused.
        self._joined = asyncio.Event()

    async def count(self, user_id: str) -> None:
        """Count a new start, unless it is refused here.

        Raises:
            Overloaded, TooManyStarts, LogUnavailable
        """
        if self.overloaded():
            raise Overloaded
        most = self.limits.starts_per_minute
        if most is not None and (wait := await self.quotas.count_start(user_id, most)) is not None:
            raise TooManyStarts(math.ceil(wait))

    async def check_stored(self, user_id: str, size: int, generation_id: str) -> None:
        """Check again whether there is room for a start that has stored its images: other nodes store some, too.

        Raises:
            StorageLimit, LogUnavailable
        """
        if await self._room(user_id, besides=generation_id) < size:
            raise StorageLimit

    async def _room(self, user_id: str, *, besides: str | None = None) -> float:
        most = self.limits.max_stored_per_user
        return math.inf if most is None else most - await self.quotas.stored(user_id, besides=besides)

    async def reserve(self, user_id: str, *, size: int, external: bool) -> AbstractContextManager[None]:
        """Reserve a credit, a place and `size` bytes for a start, until the returned context ends.

        If only reservations stand in its way, it waits for them. So a refusal is always about what is in the log.

        Raises:
            QueueFull, TooManyGenerations, StorageLimit, InsufficientCredit, LogUnavailable
            Overloaded: it has waited for `WAIT` seconds.
        """
        reserved = self._reserved.setdefault(user_id, _Reserved())
        reserved.users += 1
        deadline = asyncio.get_running_loop().time() + WAIT
        try:
            while changed := await self._what_to_wait_for(user_id, reserved, size, external):
                async with asyncio.timeout_at(deadline):
                    await changed.wait()
        except BaseException as error:
            self._leave(user_id, reserved)
            if isinstance(error, TimeoutError):
                raise Overloaded from None
            raise
        reserved.starts += 1
        reserved.size += size
        self._joining += not external
        return self._kept(user_id, reserved, size, external)

    @contextmanager
    def _kept(self, user_id: str, reserved: _Reserved, size: int, external: bool) -> Iterator[None]:
        try:
            yield
        finally:
            reserved.starts -= 1
            reserved.size -= size
            if not external:
                self._joining -= 1
                self._joined.set()
                self._joined = asyncio.Event()
            reserved.changed.set()
            reserved.changed = asyncio.Event()
            self._leave(user_id, reserved)

    def _leave(self, user_id: str, reserved: _Reserved) -> None:
        reserved.users -= 1
        if not reserved.users:
            del self._reserved[user_id]

    async def _what_to_wait_for(
        self, user_id: str, reserved: _Reserved, size: int, external: bool
    ) -> asyncio.Event | None:
        changed, joined, limits = reserved.changed, self._joined, self.limits
        places = math.inf if external else limits.max_waiting - (await self.leases.count()).waiting
        standing = await self.ledger.standing(user_id)
        if places <= 0:
            raise QueueFull
        if standing.unfinished >= limits.max_per_user:
            raise TooManyGenerations
        if standing.credit is not None and standing.credit <= 0:
            raise InsufficientCredit
        room = await self._room(user_id) - size
        if room < 0:
            raise StorageLimit
        left = limits.max_per_user - standing.unfinished
        left = left if standing.credit is None else min(left, standing.credit)
        if reserved.starts >= left or reserved.size > room:
            return changed
        return None if self._joining < places else joined
