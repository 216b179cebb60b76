"""The Python package ``stagecast-client`` against a real service, on connections that break."""

import asyncio
import io
import pickle
import time
import types
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import pytest_asyncio

import stagecast_client
from stagecast_client import Event, Generation, GenerationFailed, HistoryLost, StagecastError
from stagecast_client.models import TransitionFields, camel_case
from support.client_services import GatedEditor
from support.doubles import ScriptedComposer
from support.guarded import guarded, token
from support.harness import JSON, PHOTO, Running, running
from support.proxy import Fault, Proxy
from support.python_client import CLIENTS, EitherClient

pytestmark = pytest.mark.asyncio(loop_scope="module")

Open = Callable[..., EitherClient]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    overrides = {"editor": GatedEditor(), "composer": ScriptedComposer()}
    async with running(tmp_path_factory.mktemp("images"), overrides=overrides, max_running=50) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def proxy(service: Running) -> AsyncIterator[Proxy]:
    async with Proxy.open(service.port) as proxy:
        yield proxy


@pytest_asyncio.fixture(loop_scope="module", params=CLIENTS)
async def connect(request: pytest.FixtureRequest, eve: str) -> AsyncIterator[Open]:
    opened: list[EitherClient] = []

    def open_client(url: str, **options: Any) -> EitherClient:
        if "token" not in options:
            options.setdefault("user_id", eve)
        opened.append(EitherClient(request.param(url, **options)))
        return opened[-1]

    yield open_client
    for client in opened:
        await client.close()


def wire_types(hint: Any) -> set[str]:
    """The JSON types of an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*map(wire_types, get_args(hint)))
    if get_origin(hint) is Literal:
        return {"string"}
    names = {str: "string", int: "integer", bool: "boolean", type(None): "null", list: "array"}
    return {names.get(get_origin(hint) or hint, "object")}


def schema_types(schema: JSON) -> set[str]:
    if "anyOf" in schema:
        return set[str]().union(*map(schema_types, schema["anyOf"]))
    return {schema.get("type", "string" if "enum" in schema else "object")}


@pytest.mark.parametrize(
    ("model", "name", "own"),
    [
        (stagecast_client.Generation, "Snapshot", set()),
        (stagecast_client.Event, "Event", {"cursor"}),
        (stagecast_client.Input, "Input", set()),
        (stagecast_client.FaceSwapError, "FaceSwapError", set()),
        (stagecast_client.Account, "Account", set()),
    ],
)
async def test_the_models_are_those_of_openapi(service: Running, model: Any, name: str, own: set[str]) -> None:
    schemas = (await service.get("/openapi.json"))["components"]["schemas"]
    schema = schemas[name]
    hints = get_type_hints(model)
    attributes = {camel_case(each.name): each for each in fields(model) if each.name not in own}
    assert set(attributes) == set(schema["properties"])
    assert {key for key, each in attributes.items() if each.default is MISSING} == set(schema["required"])
    for key, each in attributes.items():
        declared = schema["properties"][key]
        optional = {"null"} if each.default is None else set()
        assert wire_types(hints[each.name]) == schema_types(declared) | optional, key


async def test_the_optional_fields_are_those_of_openapi(service: Running) -> None:
    description = await service.get("/openapi.json")
    form = description["paths"]["/generations/edit"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    form = description["components"]["schemas"][form["$ref"].rpartition("/")[2]] if "$ref" in form else form
    given = {"prompt", "images", "imageUrls", *map(camel_case, stagecast_client.Options.__annotations__)}
    assert given - {"idempotencyKey"} == set(form["properties"])
    body = description["paths"]["/generations/{generation_id}/transitions"]["post"]["requestBody"]["content"]
    assert {"status", *map(camel_case, TransitionFields.__annotations__)} == set(
        body["application/json"]["schema"]["properties"]
    )


@asynccontextmanager
async def gate(service: Running, name: str) -> AsyncIterator[str]:
    """A prompt that waits in mid-generation until the end of the context."""
    yield f"wait for {name}"
    await service.start("gatekeeper", "generate", prompt=f"let go {name}")


async def test_run_returns_the_finished_generation(service: Running, connect: Open, eve: str) -> None:
    client, seen = connect(service.url), list[Generation]()
    done = await client.run(
        "edit", prompt="a red hat", images=[PHOTO], on_progress=seen.append, metadata={"title": "é"}
    )
    assert (done.status, done.progress, done.finished, done.user_id) == ("completed", 100, True, eve)
    assert done.input.images
    assert done.metadata == {"title": "é"}
    snapshot = await client.call("get", done.generation_id)
    assert snapshot.expires_at
    for name in (each.name for each in fields(Generation) if each.name != "expires_at"):
        assert getattr(done, name) == getattr(snapshot, name)
    assert [each.sequence for each in seen] == list(range(1, done.sequence + 1))
    assert seen[-1] == done
    account = await client.call("me")
    assert (account.user_id, account.credit) == (eve, 99)


async def test_images_may_be_paths_bytes_and_files(service: Running, connect: Open, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(PHOTO)
    client = connect(service.url)
    with path.open("rb") as file:
        done = await client.run(
            "edit", prompt="x", images=[path, str(path), PHOTO, file, io.BytesIO(PHOTO)], quality="low"
        )
    assert len(done.input.images) == 5
    assert done.input.quality == "low"
    again = await client.run("edit", prompt="x", image_names=done.input.images[:2], face_swap=False)
    assert len(again.input.images) == 2
    with path.open() as text, pytest.raises((TypeError, UnicodeDecodeError)):
        await client.run("edit", prompt="x", images=[text])
    with pytest.raises(FileNotFoundError):
        await client.run("edit", prompt="x", images=[tmp_path / "nothing.jpg"])


@pytest.mark.parametrize("form", ["path", "text", "bytes", "file"])
async def test_one_image_needs_no_list(service: Running, connect: Open, tmp_path: Path, form: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(PHOTO)
    with path.open("rb") as file:
        image = {"path": path, "text": str(path), "bytes": PHOTO, "file": file}[form]
        started = await connect(service.url).call("start", "edit", prompt="x", images=image)
    assert len(started.input.images) == 1


async def test_one_image_url_needs_no_list(service: Running, connect: Open) -> None:
    started = await connect(service.url).call("start", "edit", prompt="x", image_urls="https://example.org/a.png")
    assert started.input.image_urls == ["https://example.org/a.png"]


async def test_what_is_no_image_is_named(service: Running, connect: Open, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(PHOTO)
    with path.open() as text, pytest.raises(TypeError, match="binary mode"):
        await connect(service.url).run("edit", prompt="x", images=[text])
    with pytest.raises(TypeError, match="binary mode"):
        await connect(service.url).run("edit", prompt="x", images=[3])


@pytest.mark.parametrize("options", [{"user_id": "a\nb"}, {"user_id": " "}, {"token": "a.b.c\n"}, {"token": "a\x00"}])
async def test_what_no_header_can_have_is_named_at_once_and_not_shown(
    service: Running, connect: Open, options: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"The header (X-User-Id|Authorization) cannot have") as refusal:
        await connect(service.url, **options).call("me")
    assert options.get("token", "a.b.c") not in str(refusal.value)


@pytest.mark.parametrize("url", ["localhost:3000", "ws://localhost:3000", ""])
async def test_an_address_that_is_none_is_named_at_once(connect: Open, url: str) -> None:
    with pytest.raises(ValueError, match="http://"):
        connect(url)


async def test_a_start_whose_answers_are_lost_is_sent_again_and_starts_one_generation(
    service: Running, proxy: Proxy, connect: Open, tmp_path: Path
) -> None:
    client = connect(proxy.url)
    proxy.plan.extend([Fault("reset", "up", 200), Fault("reset", "down", 0), Fault("close", "down", 20)])
    done = await client.run("edit", prompt="x", images=[io.BytesIO(PHOTO)])
    assert proxy.struck == 3
    assert [each.generation_id for each in await client.call("list")] == [done.generation_id]
    assert (await client.call("me")).credit == 99


async def test_a_key_of_ones_own_starts_one_generation_whenever_it_is_sent(service: Running, connect: Open) -> None:
    client = connect(service.url)
    first = await client.run("edit", prompt="x", images=[PHOTO], idempotency_key="mine")
    assert await client.run("edit", prompt="x", images=[PHOTO], idempotency_key="mine") == await client.call(
        "get", first.generation_id
    )
    with pytest.raises(StagecastError) as refusal:
        await client.call("start", "edit", prompt="y", images=[PHOTO], idempotency_key="mine")
    assert (refusal.value.code, refusal.value.status) == ("idempotency_mismatch", 422)


async def test_run_misses_nothing_while_the_connection_breaks(service: Running, proxy: Proxy, connect: Open) -> None:
    client, seen = connect(proxy.url), list[Generation]()
    async with gate(service, f"run-{id(client)}") as prompt:

        def cut(generation: Generation) -> None:
            seen.append(generation)
            proxy.strike("reset")

        running_edit = asyncio.create_task(client.run("edit", prompt=prompt, images=[PHOTO], on_progress=cut))
        await service.until(lambda: len(seen) == 6)
    done = await running_edit
    assert done.status == "completed"
    assert [each.sequence for each in seen] == list(range(1, done.sequence + 1))


async def test_events_are_those_of_the_log_after_any_number_of_bytes(
    service: Running, proxy: Proxy, connect: Open, eve: str
) -> None:
    client = connect(proxy.url)
    generation_id = await service.start(eve)
    proxy.plan.extend(Fault("reset", "down", after) for after in (1, 150, 300, 500, 700, 900))
    events = await client.collect("events", generation_id)
    proxy.plan.clear()
    assert events == [Event.from_json(data) for data in await service.events(generation_id, eve)]
    assert await client.collect("events", generation_id) == events
    assert await client.collect("events", generation_id, after=5) == events[5:]
    assert await client.collect("events", generation_id, after=len(events)) == []


async def test_the_feed_goes_on_after_a_cursor_in_another_process(
    service: Running, proxy: Proxy, connect: Open, eve: str
) -> None:
    client = connect(service.url)
    async with gate(service, f"feed-{eve}-{id(client)}") as prompt:
        first = await service.start(eve, prompt=prompt)
        before = await client.collect("events", until=lambda event: event.sequence == 4)
        second = await service.start(eve, "generate")
    received, unfinished = list[Event](), {first, second}
    async with aclosing(connect(proxy.url).iterate("events", after=before[-1].cursor)) as events:
        async for event in events:
            received.append(event)
            proxy.strike("reset")
            unfinished -= {event.generation_id} if event.finished else set()
            if not unfinished:
                break
    feed = [Event.from_json(data) for each in (first, second) for data in await service.events(each, eve)]
    assert sorted(map(place, before + received)) == sorted(map(place, feed))
    with pytest.raises(HistoryLost):
        await connect(service.url).collect("events", after="made up")


def place(event: Event) -> tuple[str, int]:
    return event.generation_id, event.sequence


async def test_watch_shows_each_state_of_all_generations(
    service: Running, proxy: Proxy, connect: Open, eve: str
) -> None:
    client = connect(proxy.url)
    done = (await client.run("generate", prompt="x", images=[PHOTO])).generation_id
    async with gate(service, f"watch-{eve}-{id(client)}") as prompt:
        held = await service.start(eve, prompt=prompt)
        states = list[Generation]()
        async with aclosing(client.iterate("watch")) as watching:
            async for generation in watching:
                states.append(generation)
                proxy.strike("reset")
                if generation.generation_id == held and generation.progress == 70:
                    break
    progress = [each.progress for each in states if each.generation_id == held]
    assert progress == sorted(set(progress))
    assert [each.status for each in states if each.generation_id == done] == ["completed"]
    assert (await client.collect("watch", held))[-1].status == "completed"
    assert await client.collect("watch", held) == [await client.call("get", held)]


async def test_watch_passes_over_what_was_removed_before_it_could_be_read(
    service: Running, proxy: Proxy, connect: Open, eve: str
) -> None:
    client, later, before = connect(proxy.url), asyncio.Event(), set(service.service.streams.open)
    shown = list[Generation]()

    async def watch() -> None:
        async with aclosing(client.iterate("watch")) as watching:
            async for generation in watching:
                shown.append(generation)
                if later.is_set() and generation.finished:
                    return

    watching = asyncio.create_task(watch())
    await service.until(lambda: bool(service.service.streams.open - before))
    proxy.strike("stall")
    gone = await service.start(eve)
    await service.service.leases.drain()
    assert (await service.http.delete(f"/generations/{gone}", headers={"X-User-Id": eve})).status_code == 204
    proxy.resume()
    later.set()
    kept = await service.start(eve)
    await watching
    assert {each.generation_id for each in shown} == {kept}


async def test_a_failed_generation_is_raised_with_its_code(service: Running, connect: Open, eve: str) -> None:
    client = connect(service.url)
    seen = list[Generation]()
    running_edit = asyncio.create_task(
        client.run("edit", prompt=f"wait for ever-{id(client)}", images=[PHOTO], on_progress=seen.append)
    )
    await service.until(lambda: len(seen) == 6)
    assert await client.call("cancel", seen[0].generation_id) == "cancelled"
    with pytest.raises(GenerationFailed) as failure:
        await running_edit
    assert failure.value.code == failure.value.generation.code == "cancelled"
    assert str(failure.value) == failure.value.message == failure.value.generation.error
    assert failure.value.retryable is failure.value.generation.retryable
    copy = pickle.loads(pickle.dumps(failure.value))  # As it passes from a worker process to its caller.
    assert (str(copy), vars(copy)) == (str(failure.value), vars(failure.value))
    assert await client.call("cancel", seen[0].generation_id) == "already_finished"


async def test_what_is_refused_is_raised_with_its_code_and_field(service: Running, connect: Open) -> None:
    client = connect(service.url)
    with pytest.raises(StagecastError) as refusal:
        await client.run("edit", prompt="", images=[PHOTO])
    assert (refusal.value.code, refusal.value.status, refusal.value.field) == ("invalid_request", 422, "prompt")
    for name in ("get", "cancel", "delete"):
        for unknown in ("edit_1_aaaaaaaaaaaaaaaaaaaa", "..", ""):
            with pytest.raises(StagecastError) as refusal:
                await client.call(name, unknown)
            assert refusal.value.status in (404, 405)
    for name in ("events", "watch"):
        with pytest.raises(StagecastError) as refusal:
            await client.collect(name, "edit_1_aaaaaaaaaaaaaaaaaaaa")
        assert refusal.value.code == "not_found"


async def test_delete_list_and_transition(service: Running, proxy: Proxy, connect: Open, eve: str) -> None:
    client = connect(proxy.url)
    started = await client.call("start", "generate", prompt="x", runner="external")
    event = await client.call("transition", started.generation_id, "composition", sequence=2)
    assert (event.status, event.sequence) == ("composition", 2)
    with pytest.raises(StagecastError) as refusal:
        await client.call("delete", started.generation_id)
    assert refusal.value.code == "not_finished"
    for status in ("composition_completed", "ai_generation"):
        await client.call("transition", started.generation_id, status)
    url = "https://example.org/a.png"
    last = await client.call("transition", started.generation_id, "completed", generated_image_url=url)
    assert last.generated_image_url == url
    assert (await client.collect("events", started.generation_id))[-1] == last
    for _ in range(3):
        await client.run("edit", prompt="x", images=[PHOTO])
    every = await client.call("list")
    assert len(every) == 4
    assert await client.call("list", limit=2) == every[:2]
    assert await client.call("list", status="active") == []
    proxy.strike("reset")
    await asyncio.sleep(0)
    proxy.plan.append(Fault("reset", "down", 0))
    await client.call("delete", every[0].generation_id)
    assert await client.call("list") == every[1:]


async def test_a_failing_callback_is_raised_and_leaves_no_stream(service: Running, connect: Open, eve: str) -> None:
    client = connect(service.url)

    def fail(generation: Generation) -> None:
        if generation.progress >= 70:
            raise ZeroDivisionError

    async with gate(service, f"callback-{id(client)}") as prompt:
        with pytest.raises(ZeroDivisionError):
            await client.run("edit", prompt=prompt, images=[PHOTO], on_progress=fail)
        await service.until(lambda: not service.service.streams.open)
        [generation] = await client.call("list")
        assert not generation.finished


async def test_a_service_that_does_not_answer_is_given_up(service: Running, proxy: Proxy, connect: Open) -> None:
    client = connect(proxy.url, retry_for=0.5, timeout=0.3)
    proxy.down = True
    with pytest.raises(StagecastError) as silence:
        await client.run("edit", prompt="x", images=[PHOTO])
    assert (silence.value.code, silence.value.status) == ("network", 0)
    proxy.down = False
    proxy.plan.extend(Fault("stall", "down", 0) for _ in range(20))
    with pytest.raises(StagecastError) as silence:
        await client.call("me")
    assert silence.value.code == "network"
    proxy.plan.clear()
    assert (await connect(proxy.url).call("me")).credit == 100


async def test_any_user_id_is_sent(service: Running, connect: Open) -> None:
    for user in ("zoë", "小林", 123):
        assert (await connect(service.url, user_id=user).call("me")).user_id == str(user)


async def test_streams_go_on_after_a_restart(connect: Open, tmp_path: Path) -> None:
    log = f"sqlite:///{tmp_path}/log.db"
    async with Proxy.open(1) as proxy:
        client = connect(proxy.url)
        async with running(tmp_path / "images", log=log) as before:
            proxy.target = before.port
            started = (await client.call("start", "generate", prompt="x", runner="external")).generation_id
            one = asyncio.create_task(client.collect("events", started))
            every = asyncio.create_task(client.collect("events", until=lambda event: event.finished))
            await before.until(lambda: len(before.service.streams.open) == 2)
            proxy.down = True
            before.server.begin_shutdown(now=True)
            await before.until(lambda: before.server.should_exit)
        async with running(tmp_path / "images", log=log) as after:
            proxy.target, proxy.down = after.port, False
            for status in ("composition", "composition_completed", "ai_generation"):
                await client.call("transition", started, status)
            await client.call("transition", started, "completed", generated_image_url="https://a.example/b.png")
            for received in (await one, await every):
                assert [event.sequence for event in received] == [1, 2, 3, 4, 5]


async def test_a_lost_history_is_raised_by_events_and_healed_by_watch(
    service: Running, proxy: Proxy, connect: Open, eve: str, tmp_path: Path
) -> None:
    client, read = connect(proxy.url), set[str]()

    def note(name: str) -> bool:
        read.add(name)
        return False

    run = client.run("edit", prompt=f"wait for ever-{id(client)}", images=[PHOTO], on_progress=lambda _: note("run"))
    one = asyncio.create_task(run)
    following = asyncio.create_task(client.collect("events", until=lambda _: note("events")))
    async with running(tmp_path) as other:
        kept = await other.start(eve)
        watching = asyncio.create_task(
            client.collect("watch", until=lambda each: note("watch") or (each.generation_id == kept and each.finished))
        )
        await service.until(lambda: len(read) == 3)  # Before it has read an event, a stream has nothing to lose.
        proxy.target = other.port
        proxy.strike("reset")
        with pytest.raises(HistoryLost):
            await following
        assert (await watching)[-1].generation_id == kept
        with pytest.raises(StagecastError) as gone:
            await one
        assert (gone.value.code, gone.value.status) == ("not_found", 404)


async def test_a_token_is_renewed_when_it_expires_and_a_fixed_one_is_refused(connect: Open, tmp_path: Path) -> None:
    asked = list[float]()

    def renew() -> str:
        asked.append(time.time())
        return token(exp=time.time() + (1.5 if len(asked) == 1 else 60))

    async with guarded(tmp_path) as service:
        client = connect(service.url, token=renew)
        started = (await client.call("start", "generate", prompt="x", images=[PHOTO])).generation_id
        assert (await client.collect("events", started))[-1].finished
        fixed = connect(service.url, token=token(exp=time.time() + 1.5))
        following = asyncio.create_task(client.collect("events", until=lambda each: each.generation_id != started))
        with pytest.raises(StagecastError) as expired:
            await fixed.collect("events")
        assert (expired.value.code, expired.value.status) == ("token_expired", 401)
        await service.until(lambda: len(asked) == 2 and len(service.service.streams.open) == 1)
        other = await connect(service.url, token=token()).call("start", "generate", prompt="x", images=[PHOTO])
        assert (await following)[-1].generation_id == other.generation_id
        with pytest.raises(StagecastError):
            await connect(service.url, token="nonsense").call("me")
        await client.close()
