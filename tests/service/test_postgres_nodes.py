"""Two services over one PostgreSQL: every rule holds over both of them."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from adapters.postgres import log as postgres_log
from support.command_line import run_main
from support.doubles import InMemoryImages, Pause, ScriptedEditor
from support.harness import Running, running
from support.postgres import Server, fresh_database, new_server

PASSWORD: Final = "s3cr3t-passw0rd"


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with fresh_database() as url:
        yield url


@pytest.fixture
def pause() -> Pause:
    return Pause()


@pytest.fixture
def shared(pause: Pause) -> dict[str, Any]:
    """Parts that all nodes have in common."""
    return {"editor": ScriptedEditor(pause), "images": InMemoryImages()}


@pytest.fixture
async def nodes(tmp_path: Path, url: str, shared: dict[str, Any]) -> AsyncIterator[list[Running]]:
    async with AsyncExitStack() as stack:
        node = partial(running, tmp_path, log=url, overrides=shared, max_running=1)
        yield [await stack.enter_async_context(node()) for _ in range(2)]


async def test_devices_on_both_nodes_see_work_of_either(nodes: list[Running], pause: Pause) -> None:
    pause.released.set()
    async with nodes[0].phone() as one, nodes[1].phone() as two:
        for phone in (one, two):
            await phone.authenticate("ada")
        started = [await node.start("ada") for node in (*nodes, *nodes)]
        for phone in (one, two):
            await phone.until_over(*started)
        for generation_id in started:
            assert one.of(generation_id) == two.of(generation_id)
            assert await nodes[0].events(generation_id) == await nodes[1].events(generation_id)
    assert (await nodes[1].get("/me"))["credit"] == 96


async def test_a_cancel_on_one_node_stops_the_work_of_the_other(nodes: list[Running], pause: Pause) -> None:
    generation_id = await nodes[0].start("ada")
    await asyncio.wait_for(pause.reached.wait(), 20)
    for node in nodes:
        answer = await node.http.post(f"/generations/{generation_id}/cancel", headers={"X-User-Id": "ada"})
        assert answer.status_code == 200
    await asyncio.wait_for(pause.aborted.wait(), 20)
    assert [event["status"] for event in await nodes[1].events(generation_id)][-1] == "failed"


async def test_a_node_that_starts_or_stops_disturbs_no_work_of_another(
    tmp_path: Path, url: str, nodes: list[Running], pause: Pause, shared: dict[str, Any]
) -> None:
    generation_ids = [await nodes[0].start("ada") for _ in range(2)]
    await asyncio.wait_for(pause.reached.wait(), 20)
    async with running(tmp_path, log=url, overrides=shared) as third:
        assert (await third.get("/health/ready"))["parts"]["log"] == "ok"
    pause.released.set()
    async with nodes[1].phone() as phone:
        await phone.authenticate("ada")
        async with asyncio.timeout(20):
            for generation_id in generation_ids:
                while (await nodes[1].get(f"/generations/{generation_id}"))["status"] != "completed":
                    await asyncio.sleep(0.02)


@pytest.mark.long  # Its quick form: test_a_killed_server_loses_nothing_acknowledged_and_ends_no_lease.
async def test_while_postgres_is_away_starts_get_503_and_work_goes_on_afterwards(
    tmp_path: Path, pause: Pause, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(postgres_log, "_STALE", 1.0)
    caplog.set_level(logging.CRITICAL, "domain")
    with new_server() as server:
        await _outage(server, tmp_path, pause)


async def _outage(server: Server, tmp_path: Path, pause: Pause) -> None:
    overrides = {"editor": ScriptedEditor(pause)}
    async with running(tmp_path, log=server.url(), overrides=overrides) as node, node.phone() as phone:
        await phone.authenticate("ada")
        generation_id = await node.start("ada")
        await asyncio.wait_for(pause.reached.wait(), 20)
        server.stop()
        refused = await node.post("ada", "edit")
        assert (refused.status_code, refused.json()["code"]) == (503, "log_unavailable")
        async with asyncio.timeout(20):
            while (await node.http.get("/health/ready")).status_code != 503:
                await asyncio.sleep(0.05)
        pause.released.set()
        await asyncio.sleep(0.5)
        assert phone.client.connected
        server.start()
        await phone.until_over(generation_id)
        assert phone.of(generation_id)[-1]["status"] == "completed"
        async with asyncio.timeout(20):
            while (await node.http.get("/health/ready")).status_code != 200:
                await asyncio.sleep(0.05)


async def test_nothing_works_again_before_postgres_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def lines(end: str) -> list[str]:
        return [each for each in caplog.messages if each.endswith(end)]

    with new_server() as server:
        async with running(tmp_path, log=server.url(), shared_images=True) as service:
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(4)
            assert lines(" works again") == []
            failing = lines(" is tried again")
            assert len(failing) == len({each.split()[0] for each in failing}) >= 2
            await asyncio.to_thread(server.start)
            await service.until(lambda: set(service.service.supervisor.parts.values()) == {"ok"})
            assert len(lines(" works again")) == len(lines(" is tried again"))


async def test_migrate_prints_or_makes_the_schema_and_check_reads_it(tmp_path: Path, url: str) -> None:
    variables: dict[str, Any] = {"STAGECAST_LOG": url, "STAGECAST_IMAGES": f"{tmp_path}/images"}
    assert (await run_main("check", **variables)).code == 0
    printed = await run_main("migrate", "--print", **variables)
    assert printed.code == 0
    made = await run_main("migrate", **variables)
    assert (made.code, made.output.startswith("The schema has version ")) == (0, True)
    assert (await run_main("migrate", "--print", **variables)).output == ""
    assert (await run_main("migrate", **variables)).output.endswith(", as before.\n")
    assert "STAGECAST_LOG" in (await run_main("migrate", STAGECAST_LOG="memory://")).sentence(2)


async def test_no_password_of_a_url_is_printed(tmp_path: Path) -> None:
    variables: dict[str, Any] = {
        "STAGECAST_LOG": f"postgresql://ada:{PASSWORD}@127.0.0.1:1/x",
        "STAGECAST_LOG_DIRECT": f"postgresql://ada:{PASSWORD}@127.0.0.1:1/x?password={PASSWORD}",
        "STAGECAST_IMAGES": f"{tmp_path}/images",
    }
    for command in ("check", "migrate"):
        done = await run_main(command, **variables)
        assert done.code == 3
        assert PASSWORD not in done.output + done.errors
        assert "Connection refused" in done.errors
    wrong = await run_main("check", STAGECAST_LOG_DIRECT=f"mysql://ada:{PASSWORD}@x/y")
    assert PASSWORD not in wrong.sentence(2)
