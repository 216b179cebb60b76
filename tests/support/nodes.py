"""Several nodes in one process: what they share, and what each of them claims of it."""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from adapters.memory.leases import MemoryLeases
from domain.feed import Logged
from domain.ports.leases import Counts
from domain.ports.log import EventLog
from domain.ports.webhook_outbox import WebhookOutbox


class Cluster:
    """The leases of all nodes. They end when their node dies, not with time."""

    def __init__(self, log: EventLog | None = None) -> None:
        self.log = log
        self.lines = MemoryLeases()
        self.owners: dict[str, tuple[str, bool]] = {}
        self.holders: dict[str, NodeLeases] = {}
        self.abandoned: set[str] = set()
        self.chores: dict[str, NodeLeases] = {}
        self.changed = asyncio.Condition()

    async def end(self, generation_id: str) -> None:
        """The node that held this generation does not any more."""
        del self.holders[generation_id]
        await self.lines.release(generation_id)
        history = None if self.log is None else await self.log.generation(generation_id)
        if history is not None and history.events[-1].end is None:
            self.abandoned.add(generation_id)
        async with self.changed:
            self.changed.notify_all()


class NodeLeases:
    """`domain.ports.leases.Leases` of one node."""

    shared = True

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.dead = False
        self.draining = asyncio.Event()

    @property
    def held(self) -> list[str]:
        return [each for each, holder in self.cluster.holders.items() if holder is self]

    async def die(self) -> None:
        """The leases of this node run out, and it gets no others."""
        self.dead = True
        self.draining.set()
        for generation_id in self.held:
            await self.cluster.end(generation_id)

    async def count(self) -> Counts:
        return await self.cluster.lines.count()

    async def positions(self) -> Mapping[str, int]:
        return await self.cluster.lines.positions()

    async def offer(self, user_id: str, generation_id: str, *, fetching: bool = False) -> bool:
        self.cluster.abandoned.discard(generation_id)
        self.cluster.owners[generation_id] = user_id, fetching
        return await self.cluster.lines.offer(user_id, generation_id, fetching=fetching)

    async def withdraw(self, generation_id: str) -> bool:
        return await self.cluster.lines.withdraw(generation_id)

    async def claim(self, *, fetching: bool = False) -> str:
        generation_id = await self.cluster.lines.claim(fetching=fetching)
        self.cluster.holders[generation_id] = self
        if self.draining.is_set():
            user_id, fetching = self.cluster.owners[generation_id]
            await self.cluster.end(generation_id)
            await self.offer(user_id, generation_id, fetching=fetching)
            await asyncio.Event().wait()
        return generation_id

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        return [each for each in generation_ids if self.cluster.holders.get(each) is not self]

    async def release(self, generation_id: str) -> None:
        if self.cluster.holders.get(generation_id) is self:
            await self.cluster.end(generation_id)

    async def abandoned(self) -> Collection[str]:
        return () if self.dead else list(self.cluster.abandoned)

    async def claim_chore(self, name: str, seconds: float) -> bool:
        if self.dead:
            return False
        holder = self.cluster.chores.get(name)
        if holder is None or holder.dead:
            self.cluster.chores[name] = holder = self
        return holder is self

    async def drain(self) -> None:
        self.draining.set()
        async with self.cluster.changed:
            await self.cluster.changed.wait_for(lambda: not self.held)


class NodeOutbox:
    """`domain.ports.webhook_outbox.WebhookOutbox` of one node."""

    def __init__(self, outbox: WebhookOutbox, claims: "dict[str, NodeOutbox]") -> None:
        self.outbox = outbox
        #: Shared with the other nodes.
        self.claims = claims
        self.dead = False

    async def claim_undelivered(self, limit: int) -> Sequence[Logged]:
        claimed = list[Logged]()
        for entry in await self.outbox.claim_undelivered(100_000):
            holder = self.claims.get(entry.generation_id)
            if not self.dead and len(claimed) < limit and (holder in (None, self) or holder.dead):
                self.claims[entry.generation_id] = self
                claimed.append(entry)
        return claimed

    async def receiver_gone(self) -> None:
        """The other nodes find it out themselves."""

    async def delivered(self, generation_id: str) -> None:
        await self.outbox.delivered(generation_id)
