"""Who is calling: by token where a key is configured, over HTTP and over Socket.IO, until the token's last moment."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import quote

import httpx2
import jwt
import pytest
import pytest_asyncio
import websockets

from adapters.memory.log import MemoryLog
from adapters.realtime import engineio_socket
from adapters.system import now
from adapters.tokens.jwt_tokens import JwksKeys
from domain.events import timestamp
from domain.feed import Cursor
from support.builders import NOON, SteppableClock
from support.doubles import Hold, ScriptedEditor
from support.guarded import EXPIRED, GOOD, MISSING, SECRET, SERVICE, Wire, ask, guarded, token, wire
from support.harness import JSON, Running, running
from support.http_app import assert_problem
from support.jwks_issuer import Issuer, PrivateKey, ec_key, jwk, rsa_key, running_issuer

pytestmark = pytest.mark.asyncio(loop_scope="module")


def by(key: PrivateKey, kid: str, sub: str = "ada", **claims: object) -> str:
    algorithm = {"rsa": "RS256", "ec": "ES256"}[kid]
    return jwt.encode({"sub": sub, "exp": GOOD, **claims}, key, algorithm, headers={"kid": kid})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with guarded(tmp_path_factory.mktemp("images")) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def service(shared: Running) -> AsyncIterator[Running]:
    """The service of all these tests. Each leaves it idle."""
    yield shared
    await shared.until_nobody_is_here()
    await shared.service.queue.settled()


_numbers: Final = itertools.count()


@pytest.fixture
def eve() -> str:
    """A user whom no other test knows."""
    return f"eve-{next(_numbers)}"


# --- HTTP: tokens ----------------------------------------------------------------------------------------


async def guarded_operations(service: Running) -> list[tuple[str, str]]:
    """Every operation that asks who is calling, by the service's own description."""
    document = (await ask(service, None, "/openapi.json")).json()
    found = []
    for template, operations in document["paths"].items():
        path = template.replace("{generation_id}", MISSING).replace("{user_id}", "ada")
        assert "{" not in path or path == "/images/{name}", f"what belongs into {path}?"
        found += [(method.upper(), path) for method, operation in operations.items() if operation.get("security")]
    assert len(found) >= 9
    return found


async def test_every_route_for_users_asks_for_a_token_and_says_which_kind(service: Running) -> None:
    for method, path in await guarded_operations(service):
        answer = await ask(service, None, path, method)
        assert_problem(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer", (method, path)


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/stages", "/health/live", "/health/ready"])
async def test_what_belongs_to_nobody_asks_for_no_token(service: Running, path: str) -> None:
    for bearer in (None, "nonsense", EXPIRED):
        assert (await ask(service, bearer, path)).status_code == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Basic YTpi", token(), f"Token {token()}"])
async def test_another_scheme_or_none_is_no_token(service: Running, header: str) -> None:
    answer = await service.http.get("/me", headers={"Authorization": header})
    assert_problem(answer, 401, "unauthenticated")


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   "])
async def test_the_scheme_knows_no_case(service: Running, scheme: str, eve: str) -> None:
    answer = await service.http.get("/me", headers={"Authorization": f"{scheme}{token(eve)}"})
    assert answer.json() == {"userId": eve, "credit": 100}


BAD: Final = {
    "garbage": ("nonsense", "invalid_token"),
    "too long": ("x" * 20_000, "invalid_token"),
    "another secret": (token(secret="y" * 32), "invalid_token"),
    "no signature": (jwt.encode({"sub": "ada", "exp": GOOD}, "", "none"), "invalid_token"),
    "no end": (jwt.encode({"sub": "ada"}, SECRET, "HS256"), "invalid_token"),
    "not yet": (token(nbf=GOOD - 1), "invalid_token"),
    "for somebody else": (token(aud="another service"), "invalid_token"),
    "nobody": (jwt.encode({"exp": GOOD}, SECRET, "HS256"), "invalid_token"),
    "an empty name": (token(""), "invalid_token"),
    "a truth": (token(True), "invalid_token"),
    "a fraction": (token(1.5), "invalid_token"),
    "a control character": (token("a\nb"), "invalid_token"),
    "over": (EXPIRED, "token_expired"),
    "over, of a service": (token("backend", exp=1, scope="stagecast:service"), "token_expired"),
}


@pytest.mark.parametrize(("bad", "code"), BAD.values(), ids=list(BAD))
async def test_a_bad_token_is_told_by_its_code_and_not_sent_back(service: Running, bad: str, code: str) -> None:
    for method, path in (("GET", "/me"), ("POST", "/generations/edit"), ("GET", f"/generations/{MISSING}")):
        answer = await ask(service, bad, path, method)
        assert_problem(answer, 401, code)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert bad not in answer.text


async def test_bytes_that_are_no_token_are_no_token(service: Running) -> None:
    answer = await service.http.get("/me", headers=[(b"Authorization", b"Bearer Zo\xeb\xff")])
    assert_problem(answer, 401, "invalid_token")


async def first_line(service: Running, *lines: str) -> str:
    """What is answered to the head of a request whose body never comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    try:
        writer.write("\r\n".join([*lines, "Host: localhost", "", ""]).encode())
        return (await asyncio.wait_for(reader.readline(), 30)).decode()
    finally:
        writer.close()
        await writer.wait_closed()


GRANT: Final = "/users/ada/credit"


@pytest.mark.parametrize("rest", [[], ["Expect: 100-continue"]], ids=["waiting", "asking"])
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/json"])
async def test_the_refusal_comes_before_the_body(service: Running, kind: str, rest: list[str]) -> None:
    head = [f"Content-Type: {kind}", "Content-Length: 100000000", *rest]
    for method, path in await guarded_operations(service):
        if method == "POST" and path != GRANT:
            for who, status in ((), "401"), ((f"Authorization: Bearer {EXPIRED}",), "401"), (_for_another(), "403"):
                line = await first_line(service, f"{method} {path} HTTP/1.1", *head, *who)
                assert line.startswith(f"HTTP/1.1 {status} "), path


def _for_another() -> tuple[str, ...]:
    return f"Authorization: Bearer {token()}", "X-User-Id: bob"


@pytest.mark.parametrize("rest", [[], ["Expect: 100-continue"]], ids=["waiting", "asking"])
async def test_the_refusal_of_a_grant_comes_before_the_body(service: Running, rest: list[str]) -> None:
    head = [f"POST {GRANT} HTTP/1.1", "Content-Type: application/json", "Content-Length: 100000000", *rest]
    assert (await first_line(service, *head)).startswith("HTTP/1.1 401 ")


async def test_who_is_nobody_is_not_told_what_is_wrong_with_the_body(service: Running) -> None:
    answer = await ask(service, None, GRANT, "POST", content=b"{", headers={"Content-Type": "application/json"})
    assert_problem(answer, 401, "unauthenticated")


@pytest.mark.parametrize(
    ("sub", "user"), [("ada", "ada"), (123, "123"), ("123", "123"), ("Zoë 😀", "Zoë 😀"), (0, "0")]
)
async def test_the_token_names_the_user(service: Running, sub: object, user: str) -> None:
    assert (await ask(service, token(sub))).json()["userId"] == user


async def test_the_user_is_in_the_configured_claim(tmp_path: Path) -> None:
    backend = token("x", uid="backend", scope="stagecast:service")
    async with guarded(tmp_path, backend, jwt_user_claim="uid") as service:
        assert (await ask(service, token("bob", uid=7))).json()["userId"] == "7"
        assert_problem(await ask(service, token("bob")), 401, "invalid_token")


async def test_audience_and_issuer_have_to_be_the_configured_ones(tmp_path: Path) -> None:
    ours: JSON = {"aud": "stagecast", "iss": "https://login.example"}
    backend = token("backend", scope="stagecast:service", **ours)
    async with guarded(tmp_path, backend, jwt_audience="stagecast", jwt_issuer="https://login.example") as service:
        for good in (ours, {**ours, "aud": ["another", "stagecast"]}):
            assert (await ask(service, token(**good))).status_code == 200
        for bad in ({}, {**ours, "aud": "another"}, {**ours, "iss": "https://evil.example"}, {"aud": "stagecast"}):
            assert_problem(await ask(service, token(**bad)), 401, "invalid_token")


# --- HTTP: services --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [{}, {"scope": "stagecast"}, {"scope": "stagecast:services"}, {"scope": 7}])
@pytest.mark.parametrize("other", ["bob", "ada", ""])
async def test_without_the_scope_nobody_acts_for_anybody_not_even_for_themselves(
    service: Running, scope: JSON, other: str
) -> None:
    for method, path in await guarded_operations(service):
        answer = await ask(service, token(**scope), path, method, headers={"X-User-Id": other})
        assert_problem(answer, 403, "forbidden")


async def test_a_service_acts_for_a_user_on_every_route(service: Running, eve: str) -> None:
    backend: JSON = {"headers": {"X-User-Id": eve}}
    for method, path in await guarded_operations(service):
        assert (await ask(service, SERVICE, path, method, **backend)).status_code not in (401, 403, 500)
    generation_id = await service.start(eve)
    one = f"/generations/{generation_id}"
    await service.until(lambda: service.service.queue.waiting + service.service.queue.held == 0)
    for path in ("/me", "/generations", one, f"{one}/events"):
        theirs = await ask(service, SERVICE, path, **backend)
        assert theirs.content == (await ask(service, token(eve), path)).content
    assert_problem(await ask(service, SERVICE, one), 404, "not_found")
    assert_problem(await ask(service, SERVICE, one, headers={"X-User-Id": "bob"}), 404, "not_found")
    assert (await ask(service, SERVICE, "/me")).json()["userId"] == "backend"
    cancelled = await ask(service, SERVICE, f"{one}/cancel", "POST", **backend)
    assert cancelled.json() == {"outcome": "already_finished"}
    assert (await ask(service, SERVICE, one, "DELETE", **backend)).status_code == 204
    assert_problem(await ask(service, token(eve), one), 404, "not_found")


async def test_a_service_cannot_act_for_nobody(service: Running) -> None:
    for nobody in (b"", b"x" * 129, b"a\tb"):
        headers = [(b"X-User-Id", nobody)]
        assert_problem(await ask(service, SERVICE, headers=headers), 422, "invalid_user_id")


async def grant(
    service: Running, user: str, amount: object = 5, *, key: str | None = None, bearer: str | None = SERVICE
) -> httpx2.Response:
    headers = {"Idempotency-Key": key} if key is not None else {}
    path = f"/users/{quote(user, safe='')}/credit"
    answer = await ask(service, bearer, path, "POST", json={"amount": amount}, headers=headers)
    assert isinstance(answer, httpx2.Response)
    return answer


async def balance(service: Running, user: str) -> object:
    answer = await ask(service, SERVICE, headers=[(b"X-User-Id", user.encode())])
    return answer.json().get("credit")


async def test_only_a_service_grants(service: Running, eve: str) -> None:
    for bearer, status, code in (
        (None, 401, "unauthenticated"),
        (EXPIRED, 401, "token_expired"),
        (token(eve), 403, "forbidden"),
        (token("bob", scope="stagecast"), 403, "forbidden"),
    ):
        assert_problem(await grant(service, eve, bearer=bearer), status, code)
    assert await balance(service, eve) == 100


async def test_credit_is_given_and_taken_back_but_never_below_0(service: Running, eve: str) -> None:
    for amount, left in ((5, 105), (-30, 75), (0, 75), (-1_000_000_000, 0), (-1, 0), (1, 1)):
        answer = await grant(service, eve, amount)
        assert (answer.status_code, answer.json()) == (200, {"userId": eve, "credit": left})
        assert await balance(service, eve) == left
    assert await balance(service, f"not {eve}") == 100


async def test_who_has_nothing_left_starts_again_once_something_was_granted(service: Running, eve: str) -> None:
    await grant(service, eve, -100)
    assert_problem(await service.post(eve, "edit"), 402, "insufficient_credit")
    await grant(service, eve, 1)
    assert (await service.post(eve, "edit")).status_code == 202
    assert await balance(service, eve) == 0


async def test_a_grant_with_a_key_happens_once_and_answers_the_same(service: Running, eve: str) -> None:
    first = await grant(service, eve, 5, key="k")
    await grant(service, eve, 1)
    again = await asyncio.gather(*(grant(service, eve, 5, key="k") for _ in range(5)))
    assert {answer.content for answer in again} == {first.content}
    assert_problem(await grant(service, eve, 6, key="k"), 422, "idempotency_mismatch")
    assert await balance(service, eve) == 106
    assert (await grant(service, f"not {eve}", 6, key="k")).json()["credit"] == 106


async def test_a_key_is_remembered_for_the_retention_time(tmp_path: Path) -> None:
    clock = SteppableClock()
    async with guarded(tmp_path, retention=60, overrides={"clock": clock}) as service:
        await grant(service, "eve", 5, key="k")
        clock.step(59)
        assert (await grant(service, "eve", 5, key="k")).json()["credit"] == 105
        clock.step(2)
        assert (await grant(service, "eve", 5, key="k")).json()["credit"] == 110


async def test_where_no_balances_are_kept_nothing_is_granted(tmp_path: Path) -> None:
    async with guarded(tmp_path, credits=None) as service:
        assert_problem(await grant(service, "eve"), 409, "credits_off")
        assert_problem(await grant(service, "eve", bearer=token("eve")), 403, "forbidden")


@pytest.mark.parametrize(
    "user", ["a/b", "/", "//", "a/../b", "x/credit", "%2F", "a b", "a?b#c", "Zoë 😀", "123", ".a", "x" * 128, "é" * 128]
)
async def test_any_user_id_can_be_granted_to(service: Running, user: str) -> None:
    answer = await grant(service, user, 5)
    assert answer.json() == {"userId": user, "credit": 105}
    assert await balance(service, user) == 105


@pytest.mark.parametrize("user", ["", "x" * 129, "a\x00b", "a\x7fb"])
async def test_nobody_can_be_granted_to_whom_there_cannot_be(service: Running, user: str) -> None:
    assert_problem(await grant(service, user), 422, "invalid_user_id")


@pytest.mark.parametrize("amount", [None, "5", 1.5, True, [], 10**10, -(10**10)])
async def test_an_amount_is_a_whole_number_within_bounds(service: Running, amount: object, eve: str) -> None:
    problem = assert_problem(await grant(service, eve, amount), 422, "invalid_request")
    assert [error["field"] for error in problem["errors"]] == ["amount"]
    assert await balance(service, eve) == 100


async def test_in_open_mode_every_caller_may_grant(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        for headers in ({}, {"X-User-Id": "anybody"}, {"Authorization": "Bearer nonsense"}):
            answer = await service.http.post("/users/eve/credit", json={"amount": 1}, headers=headers)
            assert answer.status_code == 200
        assert (await service.get("/me", "eve"))["credit"] == 103


# --- HTTP: where from ------------------------------------------------------------------------------------

EVIL: Final = "https://evil.example"
APP: Final = "https://app.example.com"


@pytest_asyncio.fixture(loop_scope="module")
async def public(tmp_path: Path) -> AsyncIterator[Running]:
    async with guarded(tmp_path, cors_origins=(APP,)) as service:
        yield service


async def test_browsers_may_call_from_where_the_service_is_known_in_public(tmp_path: Path) -> None:
    async with guarded(tmp_path, public_url="https://Pictures.example/stage") as service:
        for origin, allowed in (("https://pictures.example", True), ("http://pictures.example", False)):
            answer = await ask(service, token(), headers={"Origin": origin})
            assert ("access-control-allow-origin" in answer.headers) is allowed


async def test_with_a_key_no_host_and_no_origin_is_refused(public: Running) -> None:
    for headers in ({"Host": "pictures.example"}, {"Origin": EVIL}, {"Origin": "null"}, {"Host": "x", "Origin": EVIL}):
        answer = await ask(public, token(), headers=headers)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers
        assert_problem(await ask(public, None, headers=headers), 401, "unauthenticated")
    address = f"ws://127.0.0.1:{public.port}/socket.io/?EIO=4&transport=websocket"
    async with websockets.connect(address, origin=websockets.Origin(EVIL), compression=None) as connection:
        assert str(await connection.recv()).startswith("0{")


async def test_with_a_key_browsers_may_read_from_configured_origins_and_the_same_one(public: Running) -> None:
    same = f"http://127.0.0.1:{public.port}"
    for origin, bearer, status in itertools.product((APP, same), (token(), None), (200, 401)):
        if (bearer is None) == (status == 401):
            answer = await ask(public, bearer, headers={"Origin": origin})
            assert answer.status_code == status
            assert answer.headers.get_list("access-control-allow-origin") == [origin]
    for origin in (EVIL, "http://localhost:5173", "http://127.0.0.1:1"):
        assert "access-control-allow-origin" not in (await ask(public, token(), headers={"Origin": origin})).headers


async def test_with_a_key_preflights_need_no_token(public: Running) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-user-id"}
    allowed = await ask(public, None, "/generations/edit", "OPTIONS", headers={"Origin": APP, **wanted})
    assert allowed.status_code == 200
    assert allowed.headers.get_list("access-control-allow-origin") == [APP]
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    refused = await ask(public, None, "/generations/edit", "OPTIONS", headers={"Origin": EVIL, **wanted})
    assert "access-control-allow-origin" not in refused.headers


# --- published keys --------------------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module")
async def issuer() -> AsyncIterator[Issuer]:
    async with running_issuer(jwk(rsa_key("ours"), kid="rsa"), jwk(ec_key("ours"), kid="ec")) as issuer:
        yield issuer


@pytest.fixture
def clock() -> SteppableClock:
    return SteppableClock()


@pytest_asyncio.fixture(loop_scope="module")
async def published(
    tmp_path: Path, issuer: Issuer, clock: SteppableClock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Running]:
    """A service that takes the tokens of an issuer, which it gives more time than others do."""
    monkeypatch.setattr("api.app.JwksKeys", partial(JwksKeys, timeout=30))
    backend = by(ec_key("ours"), "ec", "backend", scope="stagecast:service")
    async with guarded(tmp_path, backend, jwks_url=issuer.url, overrides={"clock": clock}) as service:
        yield service
        issuer.publish(jwk(ec_key("ours"), kid="ec"))  # For the invariants.
        clock.step(2)


@pytest.mark.parametrize("kid", ["rsa", "ec"])
async def test_a_token_by_a_published_key_is_good_on_every_door(published: Running, kid: str) -> None:
    key: PrivateKey = rsa_key("ours") if kid == "rsa" else ec_key("ours")
    assert (await ask(published, by(key, kid))).json()["userId"] == "ada"
    async with wire(published, {"token": by(key, kid)}) as bare:
        ack = await bare.authenticate(token=by(key, kid, "bob"))
        assert ack["userId"] == "bob"


async def test_no_other_key_makes_a_token_there(published: Running) -> None:
    for bad in (by(rsa_key("theirs"), "rsa"), by(ec_key("theirs"), "ec"), token(), by(ec_key("ours"), "ec", exp=1)):
        answer = await ask(published, bad)
        assert (answer.status_code, answer.json()["code"] in ("invalid_token", "token_expired")) == (401, True)


async def test_an_issuer_that_does_not_answer_makes_nobody_a_stranger(
    published: Running, issuer: Issuer, clock: SteppableClock
) -> None:
    good = by(ec_key("ours"), "ec")
    issuer.fails()
    assert_problem(await ask(published, good), 503, "unavailable")
    async with wire(published) as bare, wire(published, hello=False) as refused:
        nack = await bare.authenticate(token=good)
        assert (nack["ok"], nack["code"]) == (False, "unavailable")
        # Not CONNECT_ERROR, after which official clients stay away.
        await refused.connection.send(f"40{json.dumps({'token': good})}")
        await refused.closed()
        assert not [frame for frame in refused.frames if frame.startswith("4")]
        issuer.publish(jwk(ec_key("ours"), kid="ec"))
        clock.step(2)
        assert (await bare.authenticate(token=good))["userId"] == "ada"
    assert (await ask(published, good)).status_code == 200


async def test_who_is_in_stays_in_while_the_issuer_does_not_answer(
    published: Running, issuer: Issuer, clock: SteppableClock
) -> None:
    async with wire(published, {"token": by(ec_key("ours"), "ec")}) as bare:
        issuer.fails()
        clock.step(2 * 3600)  # The keys that were fetched are good no more.
        nack = await bare.authenticate(token=by(ec_key("ours"), "ec", "bob"))
        assert nack["code"] == "unavailable"
        assert (await bare.authenticate())["userId"] == "ada"


# --- sockets: the handshake ------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [{}, {"userId": "ada"}, {"userId": None}])
async def test_a_token_in_the_handshake_authenticates(service: Running, user: JSON) -> None:
    async with wire(service, {"token": token("ada"), **user}) as bare:
        await bare.next()
        [[name, told, *_]] = bare.events()
        assert (name, told["ok"], told["userId"]) == ("authenticated", True, "ada")
        assert told["expiresAt"] == timestamp(datetime.fromtimestamp(GOOD, NOON.tzinfo))
        generation_id = await service.start("ada")
        await bare.until_over(generation_id)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("nonsense", "invalid_token"),
        ("", "invalid_token"),
        (7, "invalid_token"),
        ([token("ada")], "invalid_token"),
        ({"token": token("ada")}, "invalid_token"),
        BAD["over"],
    ],
)
@pytest.mark.parametrize("user", [{}, {"userId": "ada"}, {"userId": True}])
async def test_a_bad_token_refuses_the_connection_and_says_why(
    service: Running, bad: object, code: str, user: JSON
) -> None:
    async with wire(service, hello=False) as bare:
        answer = await bare.hello({"token": bad, **user})
        assert answer.startswith("44{")
        refusal = json.loads(answer[2:])
        assert refusal["data"] == {"code": code}
        assert set(refusal) == {"message", "data"}
        assert refusal["message"].endswith(".")
        # On the same transport a client may try again.
        assert (await bare.hello({"token": token()})).startswith('40{"sid"')


@pytest.mark.parametrize(
    "auth",
    [
        None,
        {},
        {"userId": "ada"},
        {"userId": "ada", "token": None},
        {"userId": True},
        {"junk": "x"},
        [],
        "ada",
        7,
        True,
    ],
)
async def test_nothing_else_refuses_the_connection_and_nobody_is_authenticated(service: Running, auth: object) -> None:
    async with wire(service, auth) as bare:
        nack = await bare.call("subscribe_to_generation", {"generationId": MISSING})
        assert nack["code"] == "unauthenticated"
        assert bare.events() == []
        assert service.service.hub.rooms == {}
        assert (await bare.authenticate(token=token("ada")))["userId"] == "ada"


@pytest.mark.parametrize(
    ("user", "code"), [("bob", "user_mismatch"), ("", "bad_request"), (True, "bad_request"), ({}, "bad_request")]
)
async def test_a_handshake_that_names_another_user_than_its_token_is_told_so_first_and_nobody_is_authenticated(
    service: Running, user: object, code: str
) -> None:
    async with wire(service, {"userId": user, "token": token("ada")}) as bare:
        nack = await bare.call("subscribe_to_generation", {"generationId": MISSING})
        assert nack["code"] == "unauthenticated"
        [(name, answer)] = bare.events()
        assert (name, answer["ok"], answer["code"], set(answer)) == ("authenticated", False, code, {*nack})
        assert service.service.hub.rooms == {}
        assert (await bare.authenticate(token=token("ada")))["userId"] == "ada"


# --- sockets: authenticate -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sub", "argument", "user"),
    [("ada", {}, "ada"), ("ada", {"userId": "ada"}, "ada"), (123, {"userId": "123"}, "123"), ("1", {"userId": 1}, "1")],
)
async def test_the_token_decides_who_it_is(service: Running, sub: object, argument: JSON, user: str) -> None:
    async with wire(service) as bare:
        ack = await bare.authenticate(token=token(sub), **argument)
        assert (ack["ok"], ack["userId"]) == (True, user)
        assert ack["expiresAt"] == timestamp(datetime.fromtimestamp(GOOD, NOON.tzinfo))


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ({}, "unauthenticated"),
        ({"userId": "ada"}, "unauthenticated"),
        ({"userId": "ada", "token": None}, "unauthenticated"),
        ({"userId": "ada", "token": 7}, "invalid_token"),
        ({"userId": "ada", "token": "nonsense"}, "invalid_token"),
        ({"userId": "ada", "token": EXPIRED}, "token_expired"),
        ({"userId": "bob", "token": token("ada")}, "user_mismatch"),
        ({"userId": "ADA", "token": token("ada")}, "user_mismatch"),
        ({"userId": "", "token": token("ada")}, "bad_request"),
        ({"userId": True, "token": token("ada")}, "bad_request"),
        ("ada", "bad_request"),
    ],
)
async def test_who_proves_nothing_is_refused_by_code_and_stays_nobody(
    service: Running, argument: object, code: str
) -> None:
    async with wire(service) as bare:
        nack = await bare.call("authenticate", argument)
        assert (nack["ok"], nack["code"], set(nack)) == (False, code, {"ok", "code", "message"})
        assert service.service.hub.rooms == {}
        assert (await bare.authenticate())["code"] == "unauthenticated"


@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ({"userId": "bob"}, "user_mismatch"),
        ({"userId": "ada", "token": token("bob")}, "user_mismatch"),
        ({"userId": "bob", "token": "nonsense"}, "invalid_token"),
        ({"token": token("bob", exp=1)}, "token_expired"),
        ({"token": 7}, "invalid_token"),
        ({"userId": ""}, "bad_request"),
    ],
)
async def test_a_failed_authentication_changes_nothing(service: Running, argument: JSON, code: str) -> None:
    async with wire(service, {"token": token("ada")}) as bare:
        assert (await bare.authenticate(**argument))["code"] == code
        ack = await bare.authenticate()
        assert (ack["userId"], ack["expiresAt"]) == ("ada", timestamp(datetime.fromtimestamp(GOOD, NOON.tzinfo)))
        mine, theirs = await service.start("ada"), await service.start("bob")
        await bare.until_over(mine)
        assert bare.sequences(mine) == [1, 2, 3, 4, 5, 6]
        assert bare.sequences(theirs) == []


async def test_a_token_that_is_still_good_need_not_be_given_again(service: Running) -> None:
    async with wire(service) as bare:
        first = await bare.authenticate(userId="ada", token=token("ada"))
        for argument in ({}, {"userId": "ada"}, {"userId": "ada", "token": None}):
            assert await bare.authenticate(**argument) == first


async def test_what_a_socket_was_does_not_outlive_its_disconnect(service: Running) -> None:
    async with wire(service, {"token": token("ada")}) as bare:
        await bare.connection.send("41")
        await bare.connection.send("40")
        while not (await bare.next()).startswith('40{"sid"'):
            pass
        assert (await bare.authenticate(userId="ada"))["code"] == "unauthenticated"


# --- sockets: the end of a token -------------------------------------------------------------------------

#: Seconds until a short token ends. The service's clock stands still, so that it is always good when it comes.
SHORT: Final = 0.4


def short(sub: str = "ada", seconds: float = SHORT) -> str:
    return token(sub, exp=NOON.timestamp() + seconds)


@asynccontextmanager
async def soon_over(service: Running, *asked: JSON) -> AsyncIterator[tuple[Wire, list[JSON], float]]:
    """A client whose token ends in so many seconds, and the acks of what it has authenticated with before that.

    Where the machine was too slow for it, it tries once more, with more time.
    """
    for seconds in (SHORT, 10 * SHORT):
        async with wire(service, {"token": short(seconds=seconds)}) as bare:
            try:
                acks = [await bare.authenticate(**argument) for argument in asked]
            except websockets.ConnectionClosed:
                continue
            yield bare, acks, seconds
            return
    pytest.fail("the transport was closed before the acks came")


class TestWithTokensThatEnd:
    """While a provider works."""

    @pytest.fixture
    def hold(self) -> Hold:
        return Hold()

    @pytest_asyncio.fixture(loop_scope="module")
    async def service(self, tmp_path: Path, hold: Hold) -> AsyncIterator[Running]:
        overrides = {"editor": ScriptedEditor(hold), "clock": SteppableClock()}
        async with guarded(tmp_path, overrides=overrides) as service:
            yield service

    @pytest.mark.parametrize("door", ["handshake", "authenticate"])
    async def test_at_its_end_the_client_is_told_and_the_transport_closed(self, service: Running, door: str) -> None:
        begun = asyncio.get_running_loop().time()
        async with wire(service, {"token": short()} if door == "handshake" else None) as bare:
            if door == "authenticate":
                ack = await bare.authenticate(token=short())
                assert ack["expiresAt"] == timestamp(datetime.fromtimestamp(NOON.timestamp() + SHORT, NOON.tzinfo))
            await bare.closed()
            assert asyncio.get_running_loop().time() - begun >= SHORT - 0.1, "too early"
            assert bare.frames[-2:] == ['42["authentication_expired",{"code":"token_expired"}]', "1"]
            assert service.service.hub.rooms == {}

    async def test_so_it_is_over_polling_where_the_end_comes_in_an_answer_of_its_own(
        self, service: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engineio_socket, "CLOSE_GRACE", 60.0)  # The next poll is awaited for so long.
        address = "/socket.io/?EIO=4&transport=polling"
        for seconds in (SHORT, 10 * SHORT):
            opened = await service.http.get(address)
            client = f"{address}&sid={json.loads(opened.text[1:])['sid']}"
            await service.http.post(client, content=f"40{json.dumps({'token': short(seconds=seconds)})}")
            text = ""
            while "authentication_expired" not in text and (answer := await service.http.get(client)).is_success:
                text += answer.text
            if answer.is_success:
                break  # Else the machine was so slow that it fell between two polls.
        assert text.endswith('42["authentication_expired",{"code":"token_expired"}]')
        assert "\x1e41" not in text
        assert (await service.http.get(client)).text == "1"
        assert (await service.http.get(client)).status_code == 400

    async def test_nothing_follows_the_notice_and_the_rest_comes_with_a_fresh_token(
        self, service: Running, hold: Hold
    ) -> None:
        generation_id = await service.start("ada")
        await hold.reached.wait()
        async with wire(service, {"token": token()}) as bare:
            await bare.until(generation_id, 4)
            await bare.authenticate(token=short())
            await bare.closed()
            assert bare.sequences(generation_id) == [1, 2, 3, 4]
            assert bare.events()[-1][0] == "authentication_expired"
            cursor = [each[2] for each in bare.events() if len(each) == 3][-1]
        hold.let_go.set()
        async with wire(service, {"token": token(), "cursor": cursor}) as bare:
            await bare.until_over(generation_id)
            assert bare.sequences(generation_id) == [5, 6]

    async def test_a_fresh_token_before_it_goes_on_and_nothing_is_lost_or_doubled(
        self, service: Running, hold: Hold
    ) -> None:
        generation_id = await service.start("ada")
        await hold.reached.wait()
        async with soon_over(service, {"token": token()}) as (bare, [ack], seconds):
            assert ack["expiresAt"] == timestamp(datetime.fromtimestamp(GOOD, NOON.tzinfo))
            await asyncio.sleep(seconds + 0.2)  # What is awaited is that nothing happens.
            hold.let_go.set()
            await bare.until_over(generation_id)
            assert bare.sequences(generation_id) == [1, 2, 3, 4, 5, 6]

    async def test_an_ack_without_a_fresh_token_does_not_put_it_off(self, service: Running) -> None:
        async with soon_over(service, {"userId": "ada"}, {"token": "nonsense"}) as (bare, acks, _):
            assert [ack["ok"] for ack in acks] == [True, False]
            await bare.closed()
            assert bare.events()[-1] == ["authentication_expired", {"code": "token_expired"}]

    async def test_the_end_that_counts_is_the_present_users(self, service: Running, hold: Hold) -> None:
        generation_id = await service.start("bob")
        await hold.reached.wait()
        async with (
            soon_over(service, {"token": token("bob")}) as (stays, [ack], seconds),
            wire(service, {"token": token("ada")}) as goes,
        ):
            assert ack["userId"] == "bob"
            assert (await goes.authenticate(token=short("bob", seconds)))["userId"] == "bob"
            await goes.closed()
            assert goes.events()[-1] == ["authentication_expired", {"code": "token_expired"}]
            hold.let_go.set()
            await stays.until_over(generation_id)
            assert stays.sequences(generation_id) == [1, 2, 3, 4, 5, 6]


async def test_a_token_that_has_ended_in_the_meantime_has_to_be_given_anew(
    tmp_path: Path, clock: SteppableClock
) -> None:
    async with (
        guarded(tmp_path, overrides={"clock": clock}) as service,
        wire(service, {"token": token(exp=NOON.timestamp() + 60)}) as bare,
    ):
        clock.step(61)
        assert (await bare.authenticate(userId="ada"))["ok"] is False


# --- sockets: one user after the other (case 13) ---------------------------------------------------------


class GatedLog(MemoryLog):
    """Tells where a user's feed is only once that user's gate is open."""

    def __init__(self) -> None:
        super().__init__(epoch="e", credits=100, clock=now)
        self.asked = dict[str, asyncio.Event]()
        self.gates = dict[str, asyncio.Event]()

    def gate(self, user: str) -> asyncio.Event:
        self.asked[user] = asyncio.Event()
        return self.gates.setdefault(user, asyncio.Event())

    async def head_cursor(self, user_id: str) -> Cursor:
        if user_id in self.gates:
            self.asked[user_id].set()
            await self.gates[user_id].wait()
        return await super().head_cursor(user_id)


class TestOneUserAfterTheOther:
    """While a provider works for both."""

    @pytest.fixture
    def hold(self) -> Hold:
        return Hold()

    @pytest.fixture
    def log(self) -> GatedLog:
        return GatedLog()

    @pytest_asyncio.fixture(loop_scope="module")
    async def service(self, tmp_path: Path, hold: Hold, log: GatedLog) -> AsyncIterator[Running]:
        async with guarded(tmp_path, overrides={"editor": ScriptedEditor(hold), "log": log}) as service:
            yield service

    @pytest_asyncio.fixture(loop_scope="module")
    async def ids(self, service: Running) -> dict[str, str]:
        """A generation of each user, which is worked on."""
        ids = {user: await service.start(user) for user in ("ada", "bob")}
        for user, generation_id in ids.items():
            while (await service.get(f"/generations/{generation_id}", user))["sequence"] < 4:
                await asyncio.sleep(0.01)
        return ids

    @pytest.mark.parametrize("order", [["ada", "bob"], ["bob", "ada"], ["ada", "bob", "ada"], ["bob", "bob", "ada"]])
    @pytest.mark.parametrize("waiting", [True, False], ids=["waiting for acks", "pipelined"])
    async def test_the_last_one_has_it(
        self, service: Running, hold: Hold, ids: dict[str, str], order: list[str], waiting: bool
    ) -> None:
        async with wire(service) as bare:
            beginnings = []
            for user in order:
                beginnings.append(await bare.say("authenticate", {"userId": user, "token": token(user)}))
                if waiting:
                    await bare.ack(beginnings[-1])
                    await bare.until(ids[user], 4)
            acks = [await bare.ack(beginning) for beginning in beginnings]
            assert [ack["userId"] for ack in acks] == order
            last = order[-1]
            switched = next(n for n, frame in enumerate(bare.frames) if frame.startswith(beginnings[-1]))
            assert set(service.service.hub.rooms) == {last}
            hold.let_go.set()
            await bare.until_over(ids[last])
            await self.settle(service, bare)
            told = [each[1].get("generationId") for each in bare.events(bare.frames[switched:])]
            assert set(told) == {ids[last]}
            if last not in order[:-1]:
                assert bare.sequences(ids[last]) == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize(("slow", "quick"), [("ada", "bob"), ("bob", "ada")])
    async def test_the_last_one_has_it_also_where_the_log_answers_the_first_one_later(
        self, service: Running, hold: Hold, ids: dict[str, str], log: GatedLog, slow: str, quick: str
    ) -> None:
        gate = log.gate(slow)
        async with wire(service) as bare:
            first = await bare.say("authenticate", {"token": token(slow)})
            await log.asked[slow].wait()
            second = await bare.say("authenticate", {"token": token(quick)})
            await asyncio.sleep(0.05)  # So that the second one overtakes the first, if it can.
            gate.set()
            assert (await bare.ack(first))["userId"] == slow
            assert (await bare.ack(second))["userId"] == quick
            switched = next(n for n, frame in enumerate(bare.frames) if frame.startswith(second))
            assert set(service.service.hub.rooms) == {quick}
            hold.let_go.set()
            await bare.until_over(ids[quick])
            await self.settle(service, bare)
            assert bare.sequences(ids[quick]) == [1, 2, 3, 4, 5, 6]
            told = {each[1].get("generationId") for each in bare.events(bare.frames[switched:])}
            assert told == {ids[quick]}

    @pytest.mark.parametrize(("slow", "quick"), [("ada", "bob"), ("bob", "ada")])
    async def test_a_client_that_leaves_while_it_is_recognised_leaves_nothing_behind(
        self, service: Running, log: GatedLog, slow: str, quick: str
    ) -> None:
        gate = log.gate(slow)
        async with AsyncExitStack() as stack:
            bare = await stack.enter_async_context(wire(service, {"token": token(quick)}))
            await bare.say("authenticate", {"token": token(slow)})
            await log.asked[slow].wait()
        gate.set()
        await service.until_nobody_is_here()

    async def settle(self, service: Running, bare: Wire) -> None:
        """Wait until everything is over, and has been sent."""
        await service.until(lambda: service.service.queue.waiting + service.service.queue.held == 0)
        await service.service.hub.flushed()
        await bare.call("nothing", {})
