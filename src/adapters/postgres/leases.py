"""Leases over all nodes: which generation waits in which line, and which node holds it."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Collection, Mapping
from typing import Final

from adapters.postgres.database import TIMEOUT, Database, woken
from adapters.postgres.nodes import Nodes
from adapters.postgres.tail import WORK, Tail
from domain.errors import LogUnavailable
from domain.ports.leases import FETCHING_PER_USER, Counts

#: Seconds between two claims, if nothing is heard of a line, and after a database that did not answer.
_CLAIM_EVERY: Final = 0.5
_AGAIN: Final = 0.2
#: Seconds after which the answer to a claim has been lost, and its connection with it.
_LOST_AFTER: Final = 2 * TIMEOUT
#: Seconds for which counts and positions are good enough.
_SEEN_FOR: Final = 1.0


class _Line:
    """The claims of this node that wait in one line."""

    def __init__(self) -> None:
        self.claims: deque[asyncio.Future[str]] = deque()
        self.changed = asyncio.Event()


class PostgresLeases:
    """`domain.ports.leases.Leases` in PostgreSQL. A lease lasts as long as its node lives."""

    shared = True

    def __init__(self, database: Database, nodes: Nodes, tail: Tail) -> None:
        self._database = database
        self._nodes = nodes
        self._work, self._fetches = _Line(), _Line()
        tail.channels[WORK] = self._wake
        self._draining = False
        #: Held from a claim until its answer is known, and during a late release, which would undo the claim.
        self._claiming = asyncio.Lock()
        #: Held by this node, and whether that is for fetching.
        self._held: dict[str, bool] = {}
        #: Held by this node in the database only, and since when: the answer to a claim was lost.
        self._unknown: dict[str, float] = {}
        self._released = asyncio.Event()
        #: Not held any more, but the database did not answer.
        self._to_release: set[str] = set()
        self._seen: tuple[Counts, Mapping[str, int]] | None = None
        self._seen_at = 0.0

    async def run(self) -> None:
        """Claim what the claims of this node wait for, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._serve(self._work, fetching=False))
            tasks.create_task(self._serve(self._fetches, fetching=True))

    async def count(self) -> Counts:
        return (await self._counted())[0]

    async def positions(self) -> Mapping[str, int]:
        return (await self._counted())[1]

    async def _counted(self) -> tuple[Counts, Mapping[str, int]]:
        """The counts and the positions: at most a second old, and not older than what this node did last."""
        loop = asyncio.get_running_loop()
        if self._seen is None or loop.time() > self._seen_at + _SEEN_FOR:
            self._seen, self._seen_at = None, (began := loop.time())
            rows = await self._database.rows("leases_v1", FETCHING_PER_USER)
            positions = {generation_id: rank for generation_id, waiting, _, rank in rows if waiting}
            seen = Counts(len(positions), sum(holder is not None for _, _, holder, _ in rows)), positions
            if self._seen_at != began:
                return seen
            self._seen = seen
        return self._seen

    async def offer(self, user_id: str, generation_id: str, *, fetching: bool = False) -> bool:
        offered = await self._database.call("offer_v1", self._nodes.id, user_id, generation_id, fetching)
        if offered:
            self._wake()
            self._database.notify(WORK)
        return bool(offered)

    async def withdraw(self, generation_id: str) -> bool:
        withdrawn = await self._database.call("withdraw_v1", generation_id)
        self._changed()
        return bool(withdrawn)

    async def claim(self, *, fetching: bool = False) -> str:
        line = self._fetches if fetching else self._work
        claim: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        line.claims.append(claim)
        line.changed.set()
        try:
            return await claim
        except asyncio.CancelledError:
            if claim.done() and not claim.cancelled():
                self._hand_out(line, claim.result())
            raise

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        for generation_id in list(self._to_release):
            async with self._claiming:
                if generation_id not in self._held:  # It may have been claimed again.
                    await self.release(generation_id)
        query = "SELECT generation_id FROM stagecast.leases WHERE holder = $1"
        held = {row["generation_id"] for row in await self._database.fetch(query, self._nodes.id)}
        now = asyncio.get_running_loop().time()
        self._unknown = {each: self._unknown.get(each, now) for each in held - self._held.keys() - self._to_release}
        for generation_id, since in self._unknown.items():
            if now - since > _LOST_AFTER:
                self._put_back(generation_id)
        return [generation_id for generation_id in generation_ids if generation_id not in held]

    async def release(self, generation_id: str) -> None:
        self._held.pop(generation_id, None)
        self._released.set()
        self._to_release.add(generation_id)
        # If the database does not answer: before the next renewal, or with the end of this node.
        with contextlib.suppress(LogUnavailable):
            await self._database.call("release_v1", self._nodes.id, generation_id)
            self._to_release.discard(generation_id)
        self._wake()

    async def abandoned(self) -> Collection[str]:
        return [generation_id for (generation_id,) in await self._database.rows("abandoned_v1", self._nodes.dead)]

    async def claim_chore(self, name: str, seconds: float) -> bool:
        return bool(await self._database.call("claim_chore_v1", self._nodes.id, name, seconds, self._nodes.dead))

    async def drain(self) -> None:
        self._draining = True
        while self._held:
            self._released.clear()
            await self._released.wait()

    def _changed(self) -> None:
        self._seen, self._seen_at = None, 0.0

    def _wake(self) -> None:
        self._changed()
        for line in (self._work, self._fetches):
            line.changed.set()

    async def _serve(self, line: _Line, *, fetching: bool) -> None:
        while True:
            line.changed.clear()
            line.claims = deque(claim for claim in line.claims if not claim.done())
            if wanted := len(line.claims):
                try:
                    await self._claim(line, wanted, fetching=fetching)
                except LogUnavailable:
                    await asyncio.sleep(_AGAIN)
                    continue
            await woken(line.changed, _CLAIM_EVERY if line.claims else None)

    async def _claim(self, line: _Line, wanted: int, *, fetching: bool) -> None:
        async with self._claiming:
            arguments = self._nodes.id, fetching, wanted, FETCHING_PER_USER, self._draining
            for (generation_id,) in await self._database.rows("claim_v1", *arguments):
                # A claim may be lost with PostgreSQL, but not to this node: then it is claimed again.
                if self._held.get(generation_id) not in (False, fetching):
                    self._held[generation_id] = fetching
                    self._hand_out(line, generation_id)

    def _hand_out(self, line: _Line, generation_id: str) -> None:
        """Give a generation that this node holds to the next claim."""
        self._changed()
        while line.claims:
            claim = line.claims.popleft()
            if not claim.done():
                claim.set_result(generation_id)
                return
        # Everybody who waited for it has gone: it goes back into its place in the line.
        del self._held[generation_id]
        self._put_back(generation_id)

    def _put_back(self, generation_id: str) -> None:
        query = "UPDATE stagecast.leases SET waiting = true, holder = NULL WHERE generation_id = $1 AND holder = $2"
        self._database.start(query, generation_id, self._nodes.id)
