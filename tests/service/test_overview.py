"""The operator's reads over HTTP: the service as a whole, and the generations of all users."""

from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.doubles import InMemoryImages, Pause, ScriptedEditor
from support.guarded import SERVICE, ask, guarded, token
from support.harness import JSON, Running, running
from support.http_app import assert_problem
from support.postgres import fresh_database

STREAM = {"Accept": "text/event-stream"}


async def read(service: Running, path: str) -> JSON:
    answer = await service.http.get(path)
    assert answer.status_code == 200, answer.text
    content: JSON = answer.json()
    return content


async def overview(service: Running) -> JSON:
    return await read(service, "/admin/overview")


async def test_the_overview_counts_clients_work_and_failures(tmp_path: Path, log_setting: str) -> None:
    pause = Pause()
    async with running(
        tmp_path, log=log_setting, max_running=1, overrides={"editor": ScriptedEditor(pause)}
    ) as service:
        empty = await overview(service)
        assert empty == {
            "nodes": [{"id": "local", "sockets": 0, "streams": 0}],
            "sockets": 0,
            "streams": 0,
            "running": 0,
            "waiting": 0,
            "failures": {},
        }
        async with service.phone("ada") as phone, service.http.stream("GET", "/events", headers=STREAM):
            works = await service.start()
            await phone.until(lambda: "openai_editing" in [event["status"] for event in phone.of(works)])
            waits = [await service.start(user) for user in ("bob", "cem")]
            busy = await overview(service)
            assert busy["nodes"] == [{"id": "local", "sockets": 1, "streams": 1}]
            assert [busy[name] for name in ("sockets", "streams", "running", "waiting")] == [1, 1, 1, 2]
            await service.http.post(f"/generations/{waits[0]}/cancel", headers={"X-User-Id": "bob"})
            assert (await overview(service))["failures"] == {"cancelled": 1}
            assert (await overview(service))["waiting"] == 1
            pause.released.set()
            await phone.until_over(works)
        await service.service.leases.drain()
        assert [(await overview(service))[name] for name in ("running", "waiting")] == [0, 0]


async def test_generations_of_all_users_are_pages_as_the_users_own(tmp_path: Path, log_setting: str) -> None:
    async with running(tmp_path, log=log_setting) as service:
        async with service.phone("ada") as phone:
            ids = [await service.start("ada", "edit"), await service.start("ada", "generate")]
            ids.append(await service.start("Bob & Sons"))
            await phone.until_over(*ids[:2])
            await service.service.leases.drain()
        first = await read(service, "/admin/generations?limit=2")
        assert [each["generationId"] for each in first["generations"]] == ids[:0:-1]
        rest = await read(service, f"/admin/generations?limit=2&before={first['next']}")
        assert [each["generationId"] for each in rest["generations"]] == ids[:1]
        assert "next" not in rest
        own = (await service.get("/generations", "ada"))["generations"]
        assert (await read(service, "/admin/generations?user=ada"))["generations"] == own
        assert {each["userId"] for each in first["generations"]} == {"ada", "Bob & Sons"}

        async def found(query: str) -> list[str]:
            return [
                each["generationId"] for each in (await read(service, f"/admin/generations?{query}"))["generations"]
            ]

        assert await found("user=Bob%20%26%20Sons") == ids[2:]
        assert await found("kind=generate") == [ids[1]]
        assert await found("status=completed&user=ada") == ids[1::-1]
        assert await found("status=failed") == []
        assert await found(f"id={ids[0]}") == [ids[0]]
        assert await found("code=cancelled") == []
        for query in (
            "kind=x",
            "status=gone",
            "code=x",
            "limit=0",
            "limit=101",
            "before=0",
            "before=x",
            "id=%00",
            "id=",
        ):
            answer = await service.http.get(f"/admin/generations?{query}")
            assert_problem(answer, 422, "invalid_request")
        assert_problem(await service.http.get("/admin/generations?user=%00"), 422, "invalid_user_id")


@pytest.mark.parametrize("path", ["/admin/overview", "/admin/generations", "/admin/generations?user=ada"])
async def test_with_a_key_only_a_service_reads(tmp_path: Path, path: str) -> None:
    async with guarded(tmp_path) as service:
        generation_id = await service.start("ada")
        for bearer, status, code in ((None, 401, "unauthenticated"), (token("ada"), 403, "forbidden")):
            refused = await ask(service, bearer, path)
            assert_problem(refused, status, code)
            assert generation_id not in refused.text
        assert (await ask(service, SERVICE, path)).status_code == 200
        # Nor may they cancel.
        cancel = f"/generations/{generation_id}/cancel"
        assert_problem(await ask(service, None, cancel, "POST"), 401, "unauthenticated")
        assert_problem(await ask(service, token("eve"), cancel, "POST"), 404, "not_found")
        mine = {"X-User-Id": "ada"}
        assert_problem(await ask(service, token("eve"), cancel, "POST", headers=mine), 403, "forbidden")
        assert (await ask(service, SERVICE, cancel, "POST", headers=mine)).status_code == 200
        service.server.begin_shutdown(now=True)


async def test_the_overview_of_each_node_is_of_all_nodes(tmp_path: Path) -> None:
    pause = Pause()
    parts: dict[str, Any] = {"editor": ScriptedEditor(pause), "images": InMemoryImages()}
    async with fresh_database() as url, AsyncExitStack() as stack:
        node = partial(running, tmp_path, log=url, overrides=parts, max_running=1)
        nodes = [await stack.enter_async_context(node()) for _ in range(2)]
        for each in nodes:
            await stack.enter_async_context(each.phone("ada"))
        await stack.enter_async_context(nodes[1].http.stream("GET", "/events", headers=STREAM))
        started = [await each.start(user) for each in nodes for user in ("ada", "bob")]
        listed = await read(nodes[1], "/admin/generations")
        assert [each["generationId"] for each in listed["generations"]] == started[::-1]
        wanted = {"sockets": 2, "streams": 1, "running": 2, "waiting": 2}
        for each in nodes:
            while not wanted.items() <= (seen := await overview(each)).items():
                pass  # What another node has is known with its next heartbeat.
            ids = {node.service.storage.nodes.id for node in nodes if node.service.storage.nodes}
            assert {one["id"] for one in seen["nodes"]} == ids
            assert sorted((one["sockets"], one["streams"]) for one in seen["nodes"]) == [(1, 0), (1, 1)]
        pause.released.set()
        for each in nodes:
            await each.service.leases.drain()
