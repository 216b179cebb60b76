"""Two services over one PostgreSQL: limits of a user, sessions and removals hold over both of them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import httpx2
import pytest

from domain.errors import LogUnavailable
from support.builders import EventRecorder
from support.doubles import InMemoryImages, ScriptedComposer, ScriptedEditor, ScriptedFetcher
from support.event_stream import open_stream
from support.harness import PHOTO, Running, running
from support.http_app import assert_problem
from support.postgres import fresh_database, open_node
from support.wire import Wire


@asynccontextmanager
async def two_nodes(**settings: Any) -> AsyncIterator[list[Running]]:
    overrides = {
        "images": InMemoryImages(),
        "editor": ScriptedEditor(),
        "composer": ScriptedComposer(),
        "fetcher": ScriptedFetcher(),
    }
    async with fresh_database() as url, AsyncExitStack() as stack:
        node = [running("unused", log=url, overrides=overrides, **settings) for _ in range(2)]
        yield [await stack.enter_async_context(each) for each in node]


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not await holds():
            await asyncio.sleep(0.01)


async def device(node: Running, **auth: Any) -> Wire:
    wire = await Wire.open(node.port)
    await wire.connect(**auth)
    return wire


async def is_refused(node: Running) -> bool:
    """Whether a socket of ada is closed instead of being authenticated. Otherwise it is closed here."""
    try:
        wire = await device(node, userId="ada")
    except ConnectionResetError:
        return True
    wire.abort()
    return False


# --- limits ------------------------------------------------------------------------------------------------


async def test_a_user_has_as_many_sockets_and_streams_as_allowed_on_all_nodes() -> None:
    async with two_nodes(max_sockets_per_user=3) as (one, two):
        wire = await device(one, userId="ada")
        async with two.phone("ada"), open_stream(two) as stream:
            await stream.named("authenticated")
            assert await is_refused(one)
            assert await is_refused(two)
            (await device(two, userId="bob")).abort()
            wire.abort()
            wire = None  # type: ignore[assignment]

            async def joined() -> bool:
                return not await is_refused(two)

            await until(joined)


async def test_a_session_that_is_resumed_on_another_node_does_not_count_twice() -> None:
    async with two_nodes(max_sockets_per_user=1) as (one, two):
        first = await device(one, userId="ada")
        second = await device(two, userId="ada", pid=first.pid)
        assert second.notices[0][1]["recovered"] is True
        await first.until_gone(20)
        assert not second.gone.is_set()
        second.abort()


async def test_a_socket_whose_admission_was_not_answered_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_nodes(max_sockets_per_user=1) as (one, two):
        quotas: Any = one.service.storage.quotas
        call = quotas._database.call

        async def unanswered(function: str, *arguments: Any) -> Any:
            answer = await call(function, *arguments)
            if function == "admit_device_v1":
                raise LogUnavailable
            return answer

        monkeypatch.setattr(quotas._database, "call", unanswered)
        assert await is_refused(one)

        async def admitted() -> bool:
            return not await is_refused(two)

        await until(admitted)


async def test_starts_per_minute_are_counted_over_all_nodes() -> None:
    async with two_nodes(starts_per_minute=2) as (one, two):
        ids = [await node.start(images=1) for node in (one, two)]
        for node in (one, two):
            refused = await node.post("ada", "edit", images=1)
            assert_problem(refused, 429, "too_many_starts")
            assert 0 < int(refused.headers["retry-after"]) <= 60
        assert await two.start("bob", images=1) not in ids


async def test_stored_bytes_are_counted_over_all_nodes_and_survive_them() -> None:
    async with two_nodes(max_stored_per_user=2 * len(PHOTO), credits="off") as (one, two):
        first = await one.start()
        await until(lambda: finished(one, first))
        assert_problem(await two.post("ada", "edit", images=2), 429, "storage_limit")
        await two.start("bob", images=2)
        stored = await one.service.images.quotas.stored("ada")
        assert stored == await two.service.images.quotas.stored("ada") > len(PHOTO)
        answer = await two.http.delete(f"/generations/{first}", headers={"X-User-Id": "ada"})
        assert answer.status_code == 204
        assert await one.service.images.quotas.stored("ada") == 0
        await one.start()


async def finished(node: Running, generation_id: str, user: str = "ada") -> bool:
    return (await node.get(f"/generations/{generation_id}", user))["status"] in ("completed", "failed")


async def test_uploads_to_two_nodes_at_once_never_exceed_the_limit_together() -> None:
    limit = 5 * len(PHOTO) // 2
    async with two_nodes(max_stored_per_user=limit, max_running=1, credits="off") as nodes:
        answers = await asyncio.gather(*(node.post("ada", "edit?runner=external", images=2) for node in nodes * 3))
        assert {answer.status_code for answer in answers} <= {202, 429}
        assert sum(answer.status_code == 202 for answer in answers) <= 1
        assert await nodes[0].service.images.quotas.stored("ada") <= limit


async def test_starts_with_one_key_on_two_nodes_at_once_are_one_generation() -> None:
    async with two_nodes(credits=1) as nodes:
        answers = await asyncio.gather(*(node.post("ada", "edit?runner=external", key="k") for node in nodes * 4))
        assert [answer.status_code for answer in answers] == [202] * 8
        assert len({answer.headers["location"] for answer in answers}) == 1
        assert [(await node.get("/me"))["credit"] for node in nodes] == [0, 0]
        other = await nodes[1].post("ada", "edit?runner=external", key="k", prompt="another hat")
        assert_problem(other, 422, "idempotency_mismatch")


# --- sessions ----------------------------------------------------------------------------------------------


async def test_the_older_socket_of_a_session_is_closed_wherever_it_is_resumed() -> None:
    async with two_nodes() as (one, two):
        wires = [await device(one, userId="ada")]
        for node in (two, one, two):
            wires.append(await device(node, userId="ada", pid=wires[-1].pid))
            assert wires[-1].pid == wires[0].pid
        for older in wires[:-1]:
            await older.until_gone(20)
        await asyncio.sleep(1.2)  # Another look for sessions that were taken over.
        assert not wires[-1].gone.is_set()
        wires[-1].abort()


async def test_a_session_that_its_client_has_ended_on_one_node_is_not_resumed_on_another() -> None:
    async with two_nodes() as (one, two):
        wire = await device(one, userId="ada")
        wire.send("41")
        await one.until(lambda: one.service.sockets.pids == set() and not one.service.sockets._tasks)
        again = await device(two, userId="ada", pid=wire.pid)
        assert again.pid != wire.pid
        assert again.notices[0][1]["recovered"] is False
        wire.abort()
        again.abort()


async def test_a_removed_user_is_disconnected_from_all_nodes_and_has_no_session_left() -> None:
    async with two_nodes(starts_per_minute=1) as (one, two):
        wires = [await device(node, userId="eve") for node in (one, two, two)]
        await one.start("eve")
        answer: httpx2.Response = await one.http.delete("/users/eve")
        assert answer.status_code == 204
        for wire in wires:
            await wire.until_gone(20)
        again = await device(two, userId="eve", pid=wires[1].pid)
        assert again.pid != wires[1].pid
        assert await two.get("/generations", "eve") == {"generations": []}
        assert await two.service.images.quotas.stored("eve") == 0
        await two.start("eve")
        again.abort()


# --- in the storage ----------------------------------------------------------------------------------------


async def test_starts_older_than_a_minute_are_forgotten() -> None:
    async with fresh_database() as url, open_node(url) as node:
        assert [await node.quotas.count_start("ada", 2) for _ in range(2)] == [None, None]
        connection = await asyncpg.connect(url)
        await connection.execute("UPDATE stagecast.starts SET at = at - interval '1 minute'")
        assert await node.quotas.count_start("bob", 2) is None
        assert await connection.fetchval("SELECT count(*) FROM stagecast.starts") == 1
        await connection.close()


@pytest.mark.parametrize("left", ["leaves", "dies"])
async def test_devices_of_a_node_that_is_gone_do_not_count(left: str) -> None:
    async with fresh_database() as url, open_node(url) as here:
        async with open_node(url) as there:
            assert await there.quotas.admit_device("ada", lambda: 0, 1)
            assert not await here.quotas.admit_device("ada", lambda: 0, 1)
            if left == "dies":
                log: Any = there.log
                log._database._closed = True
        if left == "dies":
            connection = await asyncpg.connect(url)
            await connection.execute("SELECT stagecast.abandoned_v1($1)", [log._database.node])
            await connection.close()
        assert await here.quotas.admit_device("ada", lambda: 0, 1)


async def test_a_receiver_that_is_gone_is_called_by_no_node_until_the_one_it_told_has_ended() -> None:
    async with fresh_database() as url, open_node(url, outbox=True) as here:
        async with open_node(url, outbox=True) as there:
            log: Any = here.log
            recorder = EventRecorder(log)
            for _ in range(3):
                await recorder.start_and_fail()
            [first] = await there.log.claim_undelivered(1)
            await there.log.receiver_gone()
            assert await here.log.claim_undelivered(9) == []
        claimed = {entry.generation_id for entry in await here.log.claim_undelivered(9)}
        assert first.generation_id in claimed
        assert len(claimed) == 3
