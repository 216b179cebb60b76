"""`DELETE /users/<userId>`: a user is removed with everything that was stored."""

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import httpx2
import pytest
import socketio

from domain.errors import LogUnavailable
from domain.ports.images import Content, Picture
from support.doubles import Pause, ScriptedComposer, ScriptedEditor
from support.event_stream import open_stream
from support.guarded import SERVICE, ask, guarded, token
from support.harness import JSON, PHOTO, Running, running
from support.http_app import Api, assert_problem
from support.node import browsers, needs_node

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET_PROMPT: Final = "a hat that nobody may ever know of"


async def remove(service: Running, user: str) -> httpx2.Response:
    answer = await service.http.delete(f"/users/{quote(user, safe='')}")
    assert (answer.status_code, answer.content) == (204, b"")
    return answer


def folders(images: Path) -> list[str]:
    return [each.name for each in images.iterdir() if each.is_dir()]


async def until_gone(service: Running) -> None:
    """The invariants compare the balance of every phone's user with the generations that are left."""
    service.phones.clear()
    await service.until_all_disconnected()


async def test_nothing_of_a_removed_user_is_left(tmp_path: Path, log_setting: str) -> None:
    pause = Pause()
    editor, images = ScriptedEditor(), tmp_path / "images"
    unreachable = "http://127.0.0.1:9/"
    options: dict[str, Any] = {"log": log_setting, "overrides": {"editor": editor}, "webhook_url": unreachable}
    async with running(images, **options) as service, service.phone("eve") as phone:
        headers = {"X-User-Id": "eve"}
        deleted, ended = [await service.start("eve", prompt=SECRET_PROMPT, metadata='{"a":"secret"}') for _ in range(2)]
        kept = await service.start("ada", imageUrls="")
        await service.service.leases.drain()
        assert (await service.http.delete(f"/generations/{deleted}", headers=headers)).status_code == 204
        url = (await service.get(f"/generations/{ended}", "eve"))["compositionUrl"]
        path = url[url.index("/images/") :]
        assert (await service.http.get(f"{path}?width=320")).status_code == 200
        editor.acts = [pause]
        busy = await service.start("eve", prompt=SECRET_PROMPT)
        external = (await service.post("eve", "edit?runner=external", images=1)).json()["generationId"]
        await pause.reached.wait()
        granted = await service.http.post("/users/eve/credit", json={"amount": 5}, headers={"Idempotency-Key": "k"})
        assert granted.json()["credit"] == 101
        await remove(service, "eve")
        await asyncio.wait_for(pause.aborted.wait(), 20)
        assert folders(images) == [kept]
        for gone in (deleted, ended, busy, external):
            assert (await service.get_response(f"/generations/{gone}", "eve")).status_code == 404
            await phone.until(lambda gone=gone: any(data["generationId"] == gone for _, data in phone.notices))  # type: ignore[misc]
        for image in (path, f"{path}?width=320"):
            assert (await service.http.get(image)).status_code == 404
        assert await service.get("/generations", "eve") == {"generations": []}
        assert await service.get("/me", "eve") == {"userId": "eve", "credit": 100}
        core = service.service
        assert await core.images.quotas.stored("eve") == 0
        assert (await core.leases.count()) == (0, 0)
        await core.external.idle()
        outbox = await core.storage.log.claim_undelivered(10)
        assert {entry.user_id for entry in outbox} == {"ada"}
        await remove(service, "eve")
        await remove(service, "nobody")
        assert len((await service.get("/generations", "ada"))["generations"]) == 1
        again = await service.http.post("/users/eve/credit", json={"amount": 5}, headers={"Idempotency-Key": "k"})
        assert again.json()["credit"] == 105
        await remove(service, "eve")
        await until_gone(service)
    if log_setting.startswith("sqlite"):
        file = log_setting.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(file)) as database:
            for table in ("users", "sessions"):
                assert database.execute(f"SELECT count(*) FROM {table} WHERE user_id = 'eve'").fetchone() == (0,)
            for table in ("generations", "events", "grants"):
                owned = f"SELECT count(*) FROM {table} WHERE owner NOT IN (SELECT id FROM users)"
                assert database.execute(owned).fetchone() == (0,)
        assert SECRET_PROMPT.encode() not in await asyncio.to_thread(Path(file).read_bytes)


@needs_node
async def test_connected_devices_are_told_and_begin_anew(tmp_path: Path, log_setting: str) -> None:
    async with running(tmp_path, log=log_setting) as service, browsers() as everybody:
        clients = [
            everybody.open(service.url, transports=[way], always={"userId": "eve"}) for way in ("polling", "websocket")
        ]
        for client in clients:
            await client.ack("always")
        ended = await service.start("eve")
        for client in clients:
            await client.until(lambda client=client: len(client.events) == 6)  # type: ignore[misc]
        async with open_stream(service, user="eve") as stream:
            await stream.named("authenticated")
            await remove(service, "eve")
            await stream.rest()
            last = stream.ids[-1]
            assert [block.event for block in stream.blocks if block.data][-1] == "generation_removed"
        for client in clients:
            assert (await client.disconnected()).startswith("transport")
            assert [line["args"][0] for line in client.on("event")][-1] == {"generationId": ended}
            assert (await client.connected(2))["recovered"] is False
            ack = await client.ack("always", 2)
            assert (ack["recovered"], ack["generations"]) == (False, [])
        second = await service.start("eve")
        for client in clients:
            await client.until(lambda client=client: len(client.events) == 12)  # type: ignore[misc]
            assert [data["generationId"] for _, data in client.events] == [ended] * 6 + [second] * 6
        async with open_stream(service, user="eve", last=last) as stream:
            assert (await stream.named("authenticated"))["recovered"] is False
        page = await service.get(f"/events?after={last}", "eve")
        assert (page["recovered"], len(page["generations"])) == (False, 1)
        await everybody.forget_all()
        await until_gone(service)


@pytest.mark.parametrize("way", ["polling", "websocket"])
async def test_a_connected_python_client_comes_back(tmp_path: Path, way: str) -> None:
    async with running(tmp_path) as service, aiohttp.ClientSession() as session:
        client = socketio.AsyncClient(reconnection_delay=0.1, http_session=session)
        acks = asyncio.Queue[JSON]()
        client.on("authenticated", acks.put)
        await client.connect(service.url, auth={"userId": "eve", "recovery": False}, transports=[way])
        await acks.get()
        generation_id = (await service.post("eve", "edit?runner=external", images=1)).json()["generationId"]
        removed = asyncio.Queue[JSON]()
        client.on("generation_removed", removed.put)
        await remove(service, "eve")
        assert await asyncio.wait_for(removed.get(), 20) == {"generationId": generation_id}
        ack = await asyncio.wait_for(acks.get(), 20)
        assert (ack["recovered"], ack["generations"]) == (False, [])
        await client.disconnect()


@pytest.mark.parametrize("user", ["a/credit", "/", "..", "Ünï 🎨", "a b", "7", "%2F"])
async def test_any_user_id_can_be_removed(shared_api: Api, user: str) -> None:
    # The server and its proxies see a path with a dot as it is: httpx2 would resolve it.
    path = f"/users/{quote(user, safe='').replace('.', '%2E')}"
    headers = [(b"X-User-Id", user.encode())]
    assert (await shared_api.client.post(f"{path}/credit", json={"amount": 1})).json()["credit"] == 101
    assert (await shared_api.client.delete(path)).status_code == 204
    assert (await shared_api.client.get("/me", headers=headers)).json() == {"userId": user, "credit": 100}


@pytest.mark.parametrize("user", ["x" * 129, "a%01b", "%00"])
async def test_an_invalid_user_id_is_refused(shared_api: Api, user: str) -> None:
    assert_problem(await shared_api.client.delete(f"/users/{user}"), 422, "invalid_user_id")


async def test_only_a_service_may_remove_a_user(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        await ask(service, SERVICE, "/users/eve/credit", "POST", json={"amount": 1})
        assert_problem(await ask(service, None, "/users/eve", "DELETE"), 401, "unauthenticated")
        assert_problem(await ask(service, token("eve"), "/users/eve", "DELETE"), 403, "forbidden")
        assert (await ask(service, token("eve"))).json()["credit"] == 101
        assert (await ask(service, SERVICE, "/users/eve", "DELETE")).status_code == 204
        assert (await ask(service, token("eve"))).json()["credit"] == 100


async def test_a_start_that_is_being_accepted_is_removed_too(
    tmp_path: Path, log_setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path / "images", log=log_setting) as service:
        intake = service.service.workflow.intake
        admit, reached, released = intake.admit, asyncio.Event(), asyncio.Event()

        async def slow(content: Content) -> Picture:
            picture = await admit(content)
            reached.set()
            await released.wait()
            return picture

        monkeypatch.setattr(intake, "admit", slow)
        starting = asyncio.create_task(service.post("eve", "edit", images=2, key="k"))
        await reached.wait()
        removing = asyncio.create_task(remove(service, "eve"))
        await asyncio.sleep(0.05)
        assert not removing.done()
        released.set()
        started = (await starting).json()["generationId"]
        await removing
        assert folders(tmp_path / "images") == []
        assert (await service.get_response(f"/generations/{started}", "eve")).status_code == 404
        second = (await service.post("eve", "edit", images=2, key="k")).json()["generationId"]
        assert second != started


async def test_starts_and_removals_at_once_leave_whole_generations_and_the_right_balance(
    tmp_path: Path, log_setting: str
) -> None:
    overrides = {"composer": ScriptedComposer(), "editor": ScriptedEditor()}
    async with running(tmp_path / "images", log=log_setting, overrides=overrides) as service:
        await asyncio.gather(
            *(service.start("eve", "generate") for _ in range(12)),
            *(remove(service, "eve") for _ in range(6)),
        )
        await service.service.leases.drain()
        left = (await service.get("/generations?limit=100", "eve"))["generations"]
        assert {each["generationId"] for each in left} == set(folders(tmp_path / "images"))
        assert all(each["status"] == "completed" for each in left)
        assert (await service.get("/me", "eve"))["credit"] == 100 - len(left)
        await remove(service, "eve")
        assert folders(tmp_path / "images") == []


async def test_a_provider_that_cannot_be_stopped_leaves_no_picture(tmp_path: Path) -> None:
    pause = Pause(stubborn=True)
    async with running(tmp_path, overrides={"editor": ScriptedEditor(pause)}) as service:
        await service.start("eve")
        await pause.reached.wait()
        await remove(service, "eve")
        await service.service.leases.drain()
        assert folders(tmp_path) == []
        assert await service.service.images.quotas.stored("eve") == 0


@pytest.mark.parametrize("removed", [False, True])
async def test_a_log_that_does_not_answer_is_told_and_the_removal_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    async with running(tmp_path) as service:
        await service.start("eve")
        await service.service.leases.drain()
        remove_user = service.service.storage.log.remove_user

        async def unavailable(user_id: str) -> None:
            if removed:
                await remove_user(user_id)
            raise LogUnavailable

        with monkeypatch.context() as patch:
            patch.setattr(service.service.storage.log, "remove_user", unavailable)
            assert_problem(await service.http.delete("/users/eve"), 503, "log_unavailable")
        await remove(service, "eve")
        assert folders(tmp_path) == []


async def test_a_picture_that_is_being_stored_for_cancelled_work_is_removed(tmp_path: Path) -> None:
    """A thread that writes a file goes on although its task is cancelled."""
    async with running(tmp_path) as service:
        images = service.service.images
        started, released = asyncio.Event(), asyncio.Event()
        save = images.store.save

        async def slow(generation_id: str, picture: Picture, name: str | None = None) -> str:
            started.set()
            await released.wait()
            return await save(generation_id, picture, name)

        images.store.save = slow  # type: ignore[method-assign]
        saving = asyncio.create_task(images.save("edit_1_a", Picture(PHOTO, "image/jpeg")))
        await started.wait()
        saving.cancel()
        removing = asyncio.create_task(images.remove("edit_1_a"))
        await asyncio.sleep(0)
        released.set()
        await removing
        assert folders(tmp_path) == []
        images.store.save = save  # type: ignore[method-assign]
