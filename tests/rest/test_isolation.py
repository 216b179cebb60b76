"""Two users, and every door: what belongs to one answers the other exactly as what never was.

The doors are not listed by hand: they are the application's own routes and the declared events. One that is not
classified here fails.
"""

import asyncio
import inspect
import json
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import httpx2
import pytest
import pytest_asyncio
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import Mount

from support.doubles import Pause, ScriptedEditor
from support.guarded import MISSING, SERVICE, FrameClient, ask, guarded, token, wire
from support.harness import JSON, PHOTO, Running, running
from support.http_app import assert_problem

pytestmark = pytest.mark.asyncio(loop_scope="module")

USERS: Final = ("ada", "bob")
BROKEN: Final = "nonsense"

# --- the doors -------------------------------------------------------------------------------------------


class One(NamedTuple):
    """A route of one generation: what is foreign answers as what is missing."""

    #: What it answers to its owner while the generation runs, and once it has finished.
    running: int
    finished: int
    #: Further ways to ask, each of which shows no difference either.
    queries: tuple[str, ...] = ("",)
    body: JSON | None = None
    #: Whoever has a token of their own is refused with 403, whatever they ask about.
    services: bool = False


#: Routes that show a user's own things and no other's.
OWN: Final = "own"
#: Routes that begin something for their caller: tried below by name.
STARTS: Final = "starts"
#: Routes that only a service may call: `test_auth`.
SERVICES: Final = "services"
#: Routes that ask nobody who they are.
PUBLIC: Final = "public"

_ONE: Final = "/generations/{generation_id}"
ROUTES: Final[dict[tuple[str, str], One | str]] = {
    ("GET", _ONE): One(200, 200),
    ("GET", f"{_ONE}/events"): One(200, 200, ("", "?after=1", "?after=999", "?after=-1", "?after=x")),
    ("POST", f"{_ONE}/cancel"): One(200, 200),
    ("DELETE", _ONE): One(409, 204),
    # None of these here is external: 409.
    ("POST", f"{_ONE}/transitions"): One(409, 409, body={"status": "composition"}, services=True),
    ("GET", "/events"): OWN,
    ("GET", "/generations"): OWN,
    ("GET", "/me"): OWN,
    ("POST", "/generations/edit"): STARTS,
    ("POST", "/generations/generate"): STARTS,
    ("POST", "/users/{user_id:path}/credit"): SERVICES,
    ("DELETE", "/users/{user_id:path}"): SERVICES,
    ("GET", "/images/{name}"): PUBLIC,
    ("GET", "/stages"): PUBLIC,
    ("GET", "/metrics"): SERVICES,
    ("GET", "/admin/overview"): SERVICES,
    ("GET", "/admin/generations"): SERVICES,
    ("GET", "/version"): PUBLIC,
    ("GET", "/health/live"): PUBLIC,
    ("GET", "/health/ready"): PUBLIC,
    ("GET", "/"): PUBLIC,
    ("GET", "/static/{path:path}"): PUBLIC,
    ("GET", "/admin"): PUBLIC,
    ("GET", "/docs"): PUBLIC,
    ("GET", "/openapi.json"): PUBLIC,
    ("GET", "/asyncapi.json"): PUBLIC,
}

#: Arguments of the declared events, by what they are to name: a generation, or a place in a feed.
EVENTS: Final[dict[str, list[dict[str, object]]]] = {
    "authenticate": [{"cursor": "<cursor>"}, {"userId": "<me>", "cursor": "<cursor>"}],
    "subscribe_to_generation": [
        {"generationId": "<generation>"},
        {"generationId": "<generation>", "after": 0},
        {"generationId": "<generation>", "after": 999},
        {"generationId": "<generation>", "after": -1},
    ],
}


def routes_of(service: Running) -> set[tuple[str, str]]:
    """Every method and path that the application has, in its description or not. HEAD is GET's."""
    http: Any = service.server.config.app
    while not isinstance(http, FastAPI):
        http = getattr(http, "_app", None) or inspect.getclosurevars(http).nonlocals["other"]
    found = set()
    for context in iter_route_contexts(http.routes):
        if isinstance(context.original_route, Mount):
            found.add(("GET", context.original_route.path))
        else:
            assert context.path is not None
            found |= {(method, context.path) for method in context.methods or () if method != "HEAD"}
    return found


# --- two users and what is theirs ------------------------------------------------------------------------


async def worked_off(service: Running) -> None:
    await service.service.leases.drain()


def folders(path: Path) -> int:
    return sum(each.is_dir() for each in path.iterdir())


class World:
    """A service with a running, a finished and a deleted generation of each user."""

    def __init__(self, service: Running, pause: Pause, *, tokens: str) -> None:
        self.service = service
        self.pause = pause
        self._tokens = tokens
        self.running = dict[str, str]()
        self.finished = dict[str, str]()
        self.deleted = dict[str, str]()
        self.cursors = dict[str, str]()

    def refuses(self, kind: One) -> bool:
        """Whether a route is not for those who ask here."""
        return kind.services and self._tokens == "own"

    async def call(self, user: str, path: str, method: str = "GET", **rest: Any) -> httpx2.Response:
        """The answer to this user, who proves it in the way that is tried."""
        headers = rest.pop("headers", {})
        bearer = {"open": None, "own": token(user), "service": SERVICE}[self._tokens]
        if self._tokens != "own":
            headers = {**headers, "X-User-Id": user}
        answer = await ask(self.service, bearer, path, method, headers=headers, **rest)
        assert isinstance(answer, httpx2.Response)
        return answer

    async def fill(self) -> None:
        self.pause.released.set()
        for user in USERS:
            self.deleted[user], self.finished[user] = [await self._start(user) for _ in range(2)]
        await worked_off(self.service)
        for user in USERS:
            assert (await self.call(user, f"/generations/{self.deleted[user]}", "DELETE")).status_code == 204
            await self.give_back(user)
        self.pause.released.clear()
        for user in USERS:
            self.running[user] = await self._start(user)
            while (await self.call(user, f"/generations/{self.running[user]}")).json()["sequence"] < 4:
                await asyncio.sleep(0.01)
            async with wire(self.service) as bare:
                self.cursors[user] = (await bare.authenticate(**self.auth(user)))["cursor"]

    async def _start(self, user: str) -> str:
        return await self.service.start(user, metadata=json.dumps({"a secret": f"secret of {user}"}))

    async def give_back(self, user: str) -> None:
        """What was paid for a generation that is gone: the invariants cannot count it."""
        granted = await ask(self.service, SERVICE, f"/users/{user}/credit", "POST", json={"amount": 1})
        assert granted.status_code == 200

    def auth(self, user: str) -> JSON:
        """Who this user is, as a socket says it."""
        return {"userId": user} if self._tokens == "open" else {"token": token(user)}

    async def state(self, user: str) -> list[bytes]:
        """All that HTTP shows a user, to see that nothing has happened."""
        paths = ["/me", "/generations", "/generations?status=active", "/generations?status=finished"]
        for generation_id in (self.running[user], self.finished[user]):
            paths += [f"/generations/{generation_id}", f"/generations/{generation_id}/events"]
        return [(await self.call(user, path)).content for path in paths]

    def secrets_of(self, user: str) -> list[str]:
        """Words that nobody else may see."""
        return [self.running[user], self.finished[user], self.deleted[user], f"secret of {user}", f'"{user}"']


#: In open mode, by tokens of the users' own, and by a service that acts for them.
TOKENS: Final = ("open", "own", "service")


@asynccontextmanager
async def filled_world(images: Path, tokens: str) -> AsyncIterator[World]:
    pause = Pause()
    overrides = {"editor": ScriptedEditor(pause)}
    opened = running(images, overrides=overrides) if tokens == "open" else guarded(images, overrides=overrides)
    async with opened as service:
        world = World(service, pause, tokens=tokens)
        if tokens == "open":
            service.http.headers["Authorization"] = "none"  # `ask` takes it away.
        await world.fill()
        yield world
        pause.released.set()
        await worked_off(service)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=TOKENS)
async def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One that all its tests leave as it is."""
    async with filled_world(tmp_path_factory.mktemp("images"), request.param) as world:
        yield world


@pytest_asyncio.fixture(loop_scope="module", params=TOKENS)
async def own_world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """One that its test may change."""
    async with filled_world(tmp_path, request.param) as world:
        yield world


def own_tokens(world: str) -> pytest.MarkDecorator:
    """For what does not depend on how somebody proves who they are."""
    return pytest.mark.parametrize(world, ["own"], indirect=True)


def shown(answer: httpx2.Response) -> tuple[int, bytes, dict[str, str]]:
    """All that a client can see of an answer, but for the moment."""
    return answer.status_code, answer.content, {**answer.headers, "date": "", "x-request-id": ""}


# --- HTTP ------------------------------------------------------------------------------------------------


async def test_every_route_is_classified(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        found = routes_of(service)
    assert len(found) > 15
    assert found <= set(ROUTES), "a new route: say in ROUTES whose it is"
    assert {route for route in found if "{generation_id}" in route[1]} == {
        route for route, kind in ROUTES.items() if isinstance(kind, One) and route in found
    }, "a route of one generation is tried as one"


async def test_another_users_generation_is_answered_like_a_missing_one(world: World) -> None:
    routes = [(route, kind) for route, kind in ROUTES.items() if isinstance(kind, One)]
    there = routes_of(world.service)
    for me, other in (USERS, USERS[::-1]):
        before = await world.state(me), await world.state(other)
        missing = [MISSING, MISSING.replace("edit", "gen"), world.deleted[me], world.deleted[other]]
        foreign = [world.running[other], world.finished[other]]
        for (method, template), kind in routes:
            if (method, template) not in there:
                continue
            for query in kind.queries:
                answers = [
                    await asked(world, me, method, template, generation_id, query, kind.body)
                    for generation_id in (*missing, *foreign)
                ]
                expected = (404,) if "?after=-1" != query != "?after=x" else (422, 404)
                assert answers[0].status_code in ((403,) if world.refuses(kind) else expected)
                assert [shown(answer) for answer in answers] == [shown(answers[0])] * len(answers), (method, template)
        assert (await world.state(me), await world.state(other)) == before


async def asked(
    world: World, user: str, method: str, template: str, generation_id: str, query: str, body: JSON | None
) -> httpx2.Response:
    rest = {} if body is None else {"json": body}
    return await world.call(user, template.replace("{generation_id}", generation_id) + query, method, **rest)


async def test_a_users_own_generation_is_answered(own_world: World) -> None:
    """Otherwise nothing above would have been shown."""
    there = routes_of(own_world.service)
    for user in USERS:
        # What ends a generation comes last.
        ending = ("GET", "POST", "DELETE")
        for (method, template), kind in sorted(ROUTES.items(), key=lambda item: ending.index(item[0][0])):
            if isinstance(kind, One) and (method, template) in there and not template.endswith("cancel"):
                for generation_id, status in (
                    (own_world.running[user], kind.running),
                    (own_world.finished[user], kind.finished),
                ):
                    answer = await asked(own_world, user, method, template, generation_id, "", kind.body)
                    expected = 403 if own_world.refuses(kind) else status
                    assert answer.status_code == expected, (method, template)
        cancelled = await own_world.call(user, f"/generations/{own_world.running[user]}/cancel", "POST")
        assert cancelled.json() == {"outcome": "cancelled"}
        await own_world.give_back(user)


@own_tokens("world")
async def test_no_header_reveals_whether_a_generation_exists(world: World) -> None:
    for headers in (
        {"Accept": "text/html"},
        {"Origin": "http://localhost:1"},
        {"Range": "bytes=0-"},
        {"If-Match": "*"},
    ):
        missing, foreign = [
            await world.call("ada", f"/generations/{generation_id}", headers=headers)
            for generation_id in (MISSING, world.running["bob"])
        ]
        assert shown(missing) == shown(foreign)


async def test_no_route_shows_data_of_another_user(world: World) -> None:
    there = routes_of(world.service)
    paths = [path for (method, path), kind in ROUTES.items() if kind == OWN and (method, path) in there]
    assert len(paths) >= 2
    for me, other in (USERS, USERS[::-1]):
        theirs = (await world.call(other, f"/generations/{world.finished[other]}")).json()
        hidden = [*world.secrets_of(other), theirs["editedImageUrl"], theirs["compositionUrl"]]
        cursor = world.cursors[other]
        for path in paths:
            for query in ("", "?limit=100", "?status=active", "?status=finished", "?before=999999", f"?after={cursor}"):
                answer = await world.call(me, path + query)
                sent = answer.text + str(answer.headers)
                # A cursor that is not one's own shows nothing either, and is not sent back.
                assert not [word for word in (*hidden, cursor) if word in sent], path + query
        assert world.running[me] in (await world.call(me, "/generations")).text


@own_tokens("own_world")
async def test_an_idempotency_key_reveals_nothing_about_another_user(own_world: World) -> None:
    files = [("images", ("a.jpg", PHOTO, "image/jpeg")), ("prompt", (None, b"a red hat"))]
    started = [
        await own_world.call(user, "/generations/edit", "POST", files=files, headers={"Idempotency-Key": "the same"})
        for user in USERS
    ]
    assert [answer.status_code for answer in started] == [202, 202]
    assert len({answer.headers["location"] for answer in started}) == 2
    assert [answer.json()["userId"] for answer in started] == list(USERS)


@own_tokens("world")
async def test_an_invalid_id_of_any_shape_is_not_found(world: World) -> None:
    expected = shown(await world.call("ada", f"/generations/{MISSING}"))
    theirs = world.running["bob"]
    for wrong in (BROKEN, theirs.upper(), f"{theirs}x", theirs[:-1], f"%20{theirs}", f"{theirs}%00", f"{theirs}%0A"):
        assert shown(await world.call("ada", f"/generations/{wrong}")) == expected, wrong


# --- sockets ---------------------------------------------------------------------------------------------


async def test_every_declared_event_is_classified(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        assert set(service.service.sockets._events) == set(EVENTS), "a new event: say in EVENTS what it may name"


def filled(argument: dict[str, object], **values: str) -> dict[str, object]:
    return {name: values.get(str(value).strip("<>"), value) for name, value in argument.items()}


async def test_over_sockets_another_users_generation_is_acknowledged_like_a_missing_one(world: World) -> None:
    for me, other in (USERS, USERS[::-1]):
        foreign = [(world.running[other], world.cursors[other]), (world.finished[other], world.cursors[other])]
        missing = [(MISSING, BROKEN), (world.deleted[me], ""), (world.deleted[other], BROKEN)]
        for name, arguments in EVENTS.items():
            for argument in arguments:
                acks = []
                for generation_id, cursor in (*missing, *foreign):
                    async with wire(world.service, world.auth(me)) as bare:
                        given = filled(argument, generation=generation_id, cursor=cursor, me=me)
                        beginning = await bare.say(name, {**world.auth(me), **given} if "cursor" in given else given)
                        await bare.ack(beginning)
                        acks.append(next(frame for frame in bare.frames if frame.startswith(beginning)))
                        await bare.call("nothing", {})
                        nothing_of(bare, world, other)
                assert acks == [acks[0]] * len(acks), (name, argument)


async def test_another_users_cursor_in_the_handshake_is_ignored(world: World) -> None:
    sent = []
    for cursor in (BROKEN, "", world.cursors["bob"]):
        async with wire(world.service, {**world.auth("ada"), "cursor": cursor}) as bare:
            while not bare.events():
                await bare.next()
            sent.append(bare.events()[0][:2])
            nothing_of(bare, world, "bob")
    assert sent == [sent[0]] * 3
    assert sent[0][1]["recovered"] is False


def nothing_of(bare: FrameClient, world: World, user: str) -> None:
    text = "\n".join(bare.frames)
    assert not [word for word in (*world.secrets_of(user), world.cursors[user]) if word in text]


# --- images ----------------------------------------------------------------------------------------------


async def images_of(world: World, user: str) -> list[str]:
    """The paths of a finished generation's pictures."""
    generation = (await world.call(user, f"/generations/{world.finished[user]}")).json()
    return [urlsplit(generation[key]).path for key in ("compositionUrl", "editedImageUrl")]


@own_tokens("world")
async def test_names_of_images_hold_128_random_bits(world: World) -> None:
    paths = [path for user in USERS for path in await images_of(world, user)]
    random = []
    for path in paths:
        match = re.fullmatch(r"/images/[a-z]+_[0-9]+_[a-z0-9]+-([0-9a-f]{32})\.(png|jpg|webp)", path)
        assert match, path
        random.append(match[1])
        assert (await world.call("ada", path)).headers["x-content-type-options"] == "nosniff"
    assert len(set(random)) == len(random) == 4


@own_tokens("world")
async def test_image_names_cannot_be_derived_from_the_generation(world: World) -> None:
    [path, _] = await images_of(world, "bob")
    stem, _, suffix = path.rpartition("-")
    missing = shown(await world.call("ada", f"/images/{MISSING}-{'0' * 32}.png"))
    assert missing[0] == 404
    for guess in (
        f"{stem}-{'0' * 32}.png",
        f"{stem}-{suffix.replace('.', '.x')}",
        f"{stem}-{suffix[1:]}",
        f"{stem}-{suffix[:32].upper()}.png" if suffix[:32] != suffix[:32].upper() else f"{stem}-.png",
        f"{stem}-*.png",
        f"{stem}.png",
        f"{path}.part",
        f"/images/{world.finished['bob']}",
    ):
        assert shown(await world.call("ada", guess)) == missing, guess


async def raw(service: Running, path: str) -> bytes:
    """The whole answer to a path that no client library has tidied up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return await asyncio.wait_for(reader.read(), 30)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_no_path_escapes_the_image_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "images", tmp_path / "outside.png"
    async with running(inside) as service:
        generation_id = await service.start()
        await worked_off(service)
        outside.write_bytes(b"the secret")
        (inside / "secret.png").write_bytes(b"the secret")
        (inside / generation_id / "secret.png").write_bytes(b"the secret")
        (inside / f"{MISSING}-{'0' * 32}.png").symlink_to(outside)
        for up in (
            "..",
            "%2e%2e",
            "..%2f..",
            "%252e%252e",
            "....//",
            "..%5c",
            ".%00.",
            "..;",
            "%c0%ae%c0%ae",
            "%uff0e",
        ):
            for rest in ("outside.png", "../outside.png", "%2foutside.png", "images/secret.png"):
                for root in ("/images/", f"/images/{generation_id}/", f"/images/{generation_id}%2f", "/static/"):
                    answer = await raw(service, f"{root}{up}/{rest}")
                    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), f"{root}{up}/{rest}"
                    assert b"the secret" not in answer
        for path in (
            "/images",
            "/images/",
            "/images/.",
            "/images//etc/passwd",
            f"/images/{outside}",
            f"/images/{str(outside).replace('/', '%2f')}",
            "/images/secret.png",
            f"/images/{generation_id}/secret.png",
            f"/images/{generation_id}%2fsecret.png",
            f"/images/{MISSING}-{'0' * 32}.png",
            "/static/../auth.py",
            "/static/..%2fauth.py",
            "/static/%2e%2e/auth.py",
        ):
            answer = await raw(service, path)
            assert answer.startswith(b"HTTP/1.1 404"), path
            assert b"the secret" not in answer
            assert str(tmp_path).encode() not in answer


@own_tokens("own_world")
async def test_deleting_a_generation_deletes_its_images(own_world: World) -> None:
    paths = await images_of(own_world, "bob")
    assert [(await own_world.call("ada", path)).status_code for path in paths] == [200, 200]
    await own_world.call("bob", f"/generations/{own_world.finished['bob']}", "DELETE")
    for path in paths:
        assert_problem(await own_world.call("bob", path), 404, "not_found")


# --- live: I5 --------------------------------------------------------------------------------------------


def generation_ids(frames: Iterable[str]) -> set[str]:
    return set(re.findall(r"\b(?:edit|gen)_[0-9]+_[a-z0-9]{16,}\b", "\n".join(frames)))


async def test_each_device_gets_events_of_its_own_user_only(tmp_path: Path) -> None:
    async with (
        guarded(tmp_path) as service,
        wire(service, {"token": token("ada")}) as phone,
        wire(service, {"token": token("ada")}) as laptop,
        wire(service, {"token": token("bob")}) as other,
    ):
        kinds = ("edit", "generate", "edit")
        started = await asyncio.gather(*(service.start(user, kind) for user in USERS for kind in kinds))
        ids = {"ada": set(started[:3]), "bob": set(started[3:])}
        for device, user in ((phone, "ada"), (laptop, "ada"), (other, "bob")):
            await device.authenticate(token=token(user))
            for generation_id in ids["ada"] | ids["bob"]:
                ack = await device.call("subscribe_to_generation", {"generationId": generation_id})
                assert ack["ok"] is (generation_id in ids[user])
            for generation_id in ids[user]:
                last = (await _ended(service, user, generation_id))["sequence"]
                await device.until(generation_id, last)
                assert device.sequences(generation_id) == list(range(1, last + 1))
            await device.call("nothing", {})
            assert generation_ids(device.frames) == ids[user]
        assert phone.sequences(started[0]) == laptop.sequences(started[0])


async def _ended(service: Running, user: str, generation_id: str) -> JSON:
    await worked_off(service)
    return await service.get(f"/generations/{generation_id}", user)


# --- case 17 ---------------------------------------------------------------------------------------------


async def test_twenty_starts_at_once_with_one_key_are_one_generation_one_credit_and_one_paid_call(
    tmp_path: Path,
) -> None:
    editor = ScriptedEditor()
    async with running(tmp_path, overrides={"editor": editor}) as service, service.phone("ada") as phone:
        answers = await asyncio.gather(*(service.post("ada", "edit", key="k") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {202}
        [location] = {answer.headers["location"] for answer in answers}
        generation_id = location.rpartition("/")[2]
        await phone.until_over(generation_id)
        assert phone.sequences(generation_id) == [1, 2, 3, 4, 5, 6]
        assert len((await service.get("/generations"))["generations"]) == 1
        assert (await service.get("/me"))["credit"] == 99
        assert len(editor.calls) == 1
        assert folders(tmp_path) == 1, "pictures of the others are left"


async def test_of_starts_at_once_with_credit_for_one_exactly_one_is_accepted(tmp_path: Path) -> None:
    pause = Pause()
    async with running(tmp_path, credits=1, overrides={"editor": ScriptedEditor(pause)}) as service:
        answers = await asyncio.gather(*(service.post("ada", "edit") for _ in range(2)))
        accepted, refused = sorted(answers, key=lambda answer: answer.status_code)
        assert accepted.status_code == 202
        assert_problem(refused, 402, "insufficient_credit")
        assert (await service.get("/me"))["credit"] == 0
        assert len((await service.get("/generations"))["generations"]) == 1
        assert (await service.post("bob", "edit")).status_code == 202, "another user's credit is another's"
        assert folders(tmp_path) == 2, "pictures of the refused are left"
        pause.released.set()
        await worked_off(service)
