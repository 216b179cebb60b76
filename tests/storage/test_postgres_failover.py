"""A standby that is promoted although it had not received everything: who has lost history is told so."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from support.doubles import InMemoryImages, ScriptedComposer, ScriptedEditor
from support.harness import Running, running
from support.postgres import Server, replicated_servers, url_of


async def cursor_of(service: Running, user: str) -> str:
    return str((await service.get("/events", user))["cursor"])


async def complete(service: Running, user: str) -> str:
    generation_id = await service.start(user)
    async with asyncio.timeout(30):
        while (await service.get(f"/generations/{generation_id}", user))["status"] != "completed":
            await asyncio.sleep(0.02)
    return generation_id


async def until_ready(service: Running) -> None:
    async with asyncio.timeout(60):
        while (await service.http.get("/health/ready")).status_code != 200:
            await asyncio.sleep(0.05)


async def cut_off(primary: Server, standby: Server) -> None:
    """The primary does not wait for the standby, which has all that is there now and gets nothing more."""
    primary.execute("ALTER SYSTEM RESET synchronous_standby_names")
    primary.execute("SELECT pg_reload_conf()")
    position = primary.query("SELECT pg_current_wal_lsn()")
    async with asyncio.timeout(30):
        while standby.query(f"SELECT pg_last_wal_replay_lsn() >= '{position}'") != "t":
            await asyncio.sleep(0.05)
    standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
    standby.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(30):
        while primary.query("SELECT count(*) FROM pg_stat_replication") != "0":
            await asyncio.sleep(0.05)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_cursors_of_users_who_lost_history_are_unusable_and_all_else_goes_on(tmp_path: Path) -> None:
    overrides: Any = {"images": InMemoryImages(), "editor": ScriptedEditor(), "composer": ScriptedComposer()}
    with replicated_servers(2) as (primary, standby):
        await asyncio.to_thread(standby.follow, primary)
        async with (
            running(tmp_path, log=url_of([primary, standby]), overrides=overrides) as service,
            service.phone("bob") as phone,
        ):
            kept = await complete(service, "ada")
            early = {user: await cursor_of(service, user) for user in ("ada", "bob", "cy")}
            await cut_off(primary, standby)
            await complete(service, "cy")
            lost = await complete(service, "bob")
            await phone.until_over(lost)
            late = {user: await cursor_of(service, user) for user in ("ada", "bob", "cy")}
            await asyncio.to_thread(primary.stop)
            await asyncio.to_thread(standby.promote)
            await until_ready(service)
            for user, cursors, usable in (("ada", late, True), ("bob", late, False), ("cy", late, False)):
                page = await service.get(f"/events?after={cursors[user]}", user)
                assert page["recovered"] is usable, user
            for user, cursor in early.items():  # What the standby had is usable for everybody.
                assert (await service.get(f"/events?after={cursor}", user))["recovered"] is True, user
            async with asyncio.timeout(30):
                while phone.client.connected:  # It comes back, and learns it from its ack.
                    await asyncio.sleep(0.02)
            assert (await service.get_response(f"/generations/{lost}", "bob")).status_code == 404
            assert (await service.get("/me", "bob"))["credit"] == 100
            assert (await service.get(f"/generations/{kept}", "ada"))["status"] == "completed"
            for user in ("ada", "bob", "cy"):
                await complete(service, user)
            service.phones.clear()
