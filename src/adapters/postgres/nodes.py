"""The nodes that share the database, and which of them are dead."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from adapters.postgres.database import Database, woken
from domain.errors import LogUnavailable
from domain.ports.nodes import Load

#: Seconds between two heartbeats.
BEAT: Final = 1.0
#: Seconds without a heartbeat after which a node is dead.
LEASE: Final = 10.0


class Nodes:
    """`domain.ports.nodes.Nodes` in PostgreSQL: this node's heartbeat, and what it has seen of the others'.

    A node is dead if its heartbeat has not changed for `LEASE` seconds in which all reads of this node have succeeded.
    So an outage of the database kills nobody, and no clock is compared with another one.
    """

    def __init__(self, database: Database, address: str, secret: str) -> None:
        """`address`: ``host:port`` at which other nodes reach this one; `secret`: of the log."""
        self.id = database.node
        self.secret = secret
        self._address = address
        self._database = database
        #: By node, as of the last heartbeat.
        self._addresses: dict[str, str] = {}
        self._loads: dict[str, Load] = {}
        #: How many sockets and streams this node has.
        self.load: Callable[[], tuple[int, int]] = lambda: (0, 0)
        #: Ends the wait for the next heartbeat.
        self._beat_now = asyncio.Event()
        #: Set at the end of the next heartbeat that begins.
        self._beaten = asyncio.Event()
        #: The last heartbeat of each node, and since when this node sees it.
        self._seen: dict[str, tuple[datetime, float]] = {}
        self._beat_at = float("-inf")

    def age(self) -> float:
        """Seconds since the last heartbeat that was committed."""
        return asyncio.get_running_loop().time() - self._beat_at

    @property
    def alone(self) -> bool:
        """Whether no other node has been seen."""
        return self._seen.keys() == {self.id}

    @property
    def dead(self) -> list[str]:
        """The nodes that are dead, as far as this node knows."""
        if self.age() > 2 * BEAT:
            return []
        now = asyncio.get_running_loop().time()
        return [node for node, (_, since) in self._seen.items() if now - since > LEASE and node != self.id]

    @property
    def time(self) -> float:
        return self._database.now.timestamp()

    @property
    def others(self) -> Collection[str]:
        return self._addresses.keys() - {self.id, *self.dead}

    @property
    def loads(self) -> Sequence[Load]:
        others = self.others
        return [Load(self.id, *self.load()), *(load for node, load in self._loads.items() if node in others)]

    async def address(self, node: str) -> str | None:
        if node not in self._addresses:
            self.beat_soon()
            await woken(self._beaten, 4 * BEAT)
        return self._addresses[node] if node in self.others else None

    def beat_soon(self) -> None:
        """Send the next heartbeat now, and see those of the others."""
        self._beat_now.set()

    async def run(self) -> None:
        """Send heartbeats until cancelled."""
        while True:
            beaten, self._beaten = self._beaten, asyncio.Event()
            self._beat_now.clear()
            try:
                await self.beat()
            except LogUnavailable:
                self._seen.clear()
            beaten.set()
            await asyncio.sleep(BEAT / 10)  # Forged ids do not make it faster than that.
            await woken(self._beat_now, 0.9 * BEAT)

    async def beat(self) -> None:
        """Send one heartbeat, and see those of the others. Raises `LogUnavailable`."""
        loop = asyncio.get_running_loop()
        rows = await self._beat()
        now = loop.time()
        # This node was late, and the others may have been, too: a pause counts as little as a slow heartbeat.
        unobserved = max(0.0, now - self._beat_at - 3 * BEAT)
        self._beat_at = now
        self._database.set_clock(rows[0]["r_now"])
        self._addresses = {row["r_id"]: row["r_address"] for row in rows}
        self._loads = {row["r_id"]: Load(row["r_id"], row["r_sockets"], row["r_streams"]) for row in rows}
        known, self._seen = self._seen, {}
        for row in rows:
            seen, since = known.get(row["r_id"], (None, now))
            self._seen[row["r_id"]] = row["r_seen"], (since + unobserved if seen == row["r_seen"] else now)

    async def have_others(self) -> bool:
        """Whether other nodes send heartbeats now. Takes seconds if one has ended without `leave`.

        Raises:
            LogUnavailable
        """

        async def recent() -> dict[str, datetime]:
            oldest, rows = timedelta(seconds=LEASE), await self._beat()
            seen = {row["r_id"]: row["r_seen"] for row in rows if row["r_now"] - row["r_seen"] < oldest}
            return {node: at for node, at in seen.items() if node != self.id}

        before = await recent()
        for _ in range(6):
            if not before:
                return False
            await asyncio.sleep(BEAT / 2)
            if not (await recent()).items() <= before.items():
                return True
        return False

    async def _beat(self) -> Sequence[Any]:
        query = "SELECT * FROM stagecast.beat_v1($1, $2, $3, $4)"
        # Else a node that has much to ask would count as dead.
        self._beating = self._database.start(query, self.id, self._address, *self.load(), urgent=True)
        return await asyncio.shield(self._beating)

    async def leave(self) -> None:
        """Tell the others that this node has ended. Raises `LogUnavailable`."""
        # A heartbeat goes on if `run` is cancelled, and would name this node again.
        await asyncio.wait([self._beating])
        await self._database.fetch("DELETE FROM stagecast.nodes WHERE id = $1", self.id)
