"""The contract suite of the port Quotas, on every adapter of it, and over two nodes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import pytest

from adapters.memory.quotas import MemoryQuotas
from domain.ports.quotas import Quotas
from support.postgres import fresh_database, open_node

#: What the tests are tried on: the quotas of two nodes, which are the same where there is only one process.
STORES: Final = ("memory", "postgres", "postgres, two nodes")


class Devices:
    """The devices of users on one node."""

    def __init__(self, quotas: Quotas) -> None:
        self.quotas = quotas
        self.counts = dict[str, int]()

    async def join(self, user_id: str, most: int) -> bool:
        admitted = await self.quotas.admit_device(user_id, lambda: self.counts.get(user_id, 0), most)
        if admitted:
            self.counts[user_id] = self.counts.get(user_id, 0) + 1
        return admitted

    def leave(self, user_id: str) -> None:
        self.counts[user_id] -= 1
        self.quotas.device_left(user_id, lambda: self.counts[user_id])


@asynccontextmanager
async def open_quotas(store: str) -> AsyncIterator[tuple[Quotas, Quotas]]:
    if store == "memory":
        quotas = MemoryQuotas()
        yield quotas, quotas
        return
    async with fresh_database() as url, open_node(url) as one:
        if store == "postgres":
            yield one.quotas, one.quotas
        else:
            async with open_node(url) as two:
                yield one.quotas, two.quotas


@pytest.fixture(params=STORES)
async def nodes(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Quotas, Quotas]]:
    async with open_quotas(request.param) as nodes:
        yield nodes


async def test_starts_beyond_the_limit_are_told_when_to_come_again(nodes: tuple[Quotas, Quotas]) -> None:
    one, two = nodes
    assert [await each.count_start("ada", 3) for each in (one, two, one)] == [None] * 3
    for each in nodes:
        wait = await each.count_start("ada", 3)
        assert wait is not None
        assert 50 < wait <= 60
    assert await two.count_start("bob", 3) is None
    await two.forget_starts("ada")
    assert await one.count_start("ada", 3) is None


async def test_of_starts_at_once_as_many_are_counted_as_the_limit(nodes: tuple[Quotas, Quotas]) -> None:
    counted = await asyncio.gather(*(each.count_start("ada", 7) for _ in range(10) for each in nodes))
    assert counted.count(None) == 7


async def test_a_user_has_at_most_so_many_devices_on_all_nodes(nodes: tuple[Quotas, Quotas]) -> None:
    one, two = (Devices(quotas) for quotas in nodes)
    if nodes[0] is nodes[1]:
        two = one
    assert [await each.join("ada", 3) for each in (one, two, one, two)] == [True, True, True, False]
    assert await two.join("bob", 3)
    assert not await one.join("ada", 3)
    one.leave("ada")
    async with asyncio.timeout(20):
        while not await two.join("ada", 3):
            await asyncio.sleep(0.01)
    assert not await one.join("ada", 3)


async def test_of_devices_at_once_as_many_are_admitted_as_the_limit(nodes: tuple[Quotas, Quotas]) -> None:
    one, two = (Devices(quotas) for quotas in nodes)
    if nodes[0] is nodes[1]:
        two = one
    assert (await asyncio.gather(*(each.join("ada", 5) for _ in range(8) for each in (one, two)))).count(True) == 5


async def test_bytes_are_counted_for_the_user_of_their_generation(nodes: tuple[Quotas, Quotas]) -> None:
    one, two = nodes
    await one.add_stored("g1", 100, "ada")
    await two.add_stored("g1", 20, "ada")
    await two.add_stored("g1", 3)
    await one.add_stored("g2", 1_000, "ada")
    await two.add_stored("g3", 7, "bob")
    await two.add_stored("unknown", 9)
    assert [await each.stored(user) for each in nodes for user in ("ada", "bob", "cy")] == [1123, 7, 0] * 2
    assert [await two.owner(each) for each in ("g1", "g3", "unknown")] == ["ada", "bob", None]
    await two.add_stored("g1", -100)
    assert await one.stored("ada") == 1_023
    await two.add_stored("g1", -1_000)  # What a killed process left unnamed was never counted.
    assert await one.stored("ada") == 1_000
    await two.forget_stored("g2")
    await one.forget_stored("g3")
    await one.forget_stored("unknown")
    await one.add_stored("g2", 50)  # Too late.
    assert [await each.stored(user) for each in nodes for user in ("ada", "bob")] == [0] * 4
