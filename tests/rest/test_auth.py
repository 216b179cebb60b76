"""Who is calling: by token where a key is configured, over HTTP and over Socket.IO, until the token's last moment."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import quote

import httpx2
import jwt
import pytest
import pytest_asyncio
import websockets

from adapters.tokens.jwt_tokens import JwksKeys
from support.builders import SteppableClock
from support.guarded import BAD, EXPIRED, GOOD, MISSING, SERVICE, ask, guarded, token, wire
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
    await shared.until_all_disconnected()
    await shared.service.leases.drain()


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


async def test_every_user_route_requires_a_bearer_token(service: Running) -> None:
    for method, path in await guarded_operations(service):
        answer = await ask(service, None, path, method)
        assert_problem(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer", (method, path)


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/asyncapi.json", "/stages", "/version", "/health/live", "/health/ready"]
)
async def test_routes_without_a_user_need_no_token(service: Running, path: str) -> None:
    for bearer in (None, "nonsense", EXPIRED):
        assert (await ask(service, bearer, path)).status_code == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Basic YTpi", token(), f"Token {token()}"])
async def test_another_authorization_scheme_counts_as_no_token(service: Running, header: str) -> None:
    answer = await service.http.get("/me", headers={"Authorization": header})
    assert_problem(answer, 401, "unauthenticated")


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   "])
async def test_the_authorization_scheme_is_case_insensitive(service: Running, scheme: str, eve: str) -> None:
    answer = await service.http.get("/me", headers={"Authorization": f"{scheme}{token(eve)}"})
    assert answer.json() == {"userId": eve, "credit": 100}


@pytest.mark.parametrize(("bad", "code"), BAD.values(), ids=list(BAD))
async def test_an_invalid_token_is_answered_with_its_code_and_not_repeated(
    service: Running, bad: str, code: str
) -> None:
    for method, path in (("GET", "/me"), ("POST", "/generations/edit"), ("GET", f"/generations/{MISSING}")):
        answer = await ask(service, bad, path, method)
        assert_problem(answer, 401, code)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert bad not in answer.text


async def test_an_authorization_header_that_is_not_a_token_is_rejected(service: Running) -> None:
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
async def test_the_request_is_refused_before_its_body_is_read(service: Running, kind: str, rest: list[str]) -> None:
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


async def test_an_unauthenticated_request_gets_401_before_validation(service: Running) -> None:
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
async def test_without_the_service_scope_x_user_id_is_refused(service: Running, scope: JSON, other: str) -> None:
    for method, path in await guarded_operations(service):
        answer = await ask(service, token(**scope), path, method, headers={"X-User-Id": other})
        assert_problem(answer, 403, "forbidden")


async def test_a_service_acts_for_a_user_on_every_route(service: Running, eve: str) -> None:
    backend: JSON = {"headers": {"X-User-Id": eve}}
    for method, path in await guarded_operations(service):
        assert (await ask(service, SERVICE, path, method, **backend)).status_code not in (401, 403, 500)
    generation_id = await service.start(eve)
    one = f"/generations/{generation_id}"
    await service.service.leases.drain()
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


async def test_an_invalid_x_user_id_of_a_service_is_rejected(service: Running) -> None:
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


async def test_only_a_service_token_can_grant(service: Running, eve: str) -> None:
    for bearer, status, code in (
        (None, 401, "unauthenticated"),
        (EXPIRED, 401, "token_expired"),
        (token(eve), 403, "forbidden"),
        (token("bob", scope="stagecast"), 403, "forbidden"),
    ):
        assert_problem(await grant(service, eve, bearer=bearer), status, code)
    assert await balance(service, eve) == 100


async def test_credit_can_be_granted_and_taken_back_but_not_below_0(service: Running, eve: str) -> None:
    for amount, left in ((5, 105), (-30, 75), (0, 75), (-1_000_000_000, 0), (-1, 0), (1, 1)):
        answer = await grant(service, eve, amount)
        assert (answer.status_code, answer.json()) == (200, {"userId": eve, "credit": left})
        assert await balance(service, eve) == left
    assert await balance(service, f"not {eve}") == 100


async def test_a_user_without_credit_can_start_after_a_grant(service: Running, eve: str) -> None:
    await grant(service, eve, -100)
    assert_problem(await service.post(eve, "edit"), 402, "insufficient_credit")
    await grant(service, eve, 1)
    assert (await service.post(eve, "edit")).status_code == 202
    assert await balance(service, eve) == 0


async def test_a_repeated_grant_with_a_key_is_made_once_and_answered_the_same(service: Running, eve: str) -> None:
    first = await grant(service, eve, 5, key="k")
    await grant(service, eve, 1)
    again = await asyncio.gather(*(grant(service, eve, 5, key="k") for _ in range(5)))
    assert {answer.content for answer in again} == {first.content}
    assert_problem(await grant(service, eve, 6, key="k"), 422, "idempotency_mismatch")
    assert await balance(service, eve) == 106
    assert (await grant(service, f"not {eve}", 6, key="k")).json()["credit"] == 106


async def test_a_grant_key_is_kept_for_the_retention_time(tmp_path: Path) -> None:
    clock = SteppableClock()
    async with guarded(tmp_path, retention=60, overrides={"clock": clock}) as service:
        await grant(service, "eve", 5, key="k")
        clock.step(59)
        assert (await grant(service, "eve", 5, key="k")).json()["credit"] == 105
        clock.step(2)
        assert (await grant(service, "eve", 5, key="k")).json()["credit"] == 110


async def test_without_balances_a_grant_is_refused(tmp_path: Path) -> None:
    async with guarded(tmp_path, credits=None) as service:
        assert_problem(await grant(service, "eve"), 409, "credits_off")
        assert_problem(await grant(service, "eve", bearer=token("eve")), 403, "forbidden")


@pytest.mark.parametrize(
    "user", ["a/b", "/", "//", "a/../b", "x/credit", "%2F", "a b", "a?b#c", "Zoë 😀", "123", ".a", "x" * 128, "é" * 128]
)
async def test_credit_can_be_granted_to_any_user_id(service: Running, user: str) -> None:
    answer = await grant(service, user, 5)
    assert answer.json() == {"userId": user, "credit": 105}
    assert await balance(service, user) == 105


@pytest.mark.parametrize("user", ["", "x" * 129, "a\x00b", "a\x7fb"])
async def test_credit_cannot_be_granted_to_an_invalid_user_id(service: Running, user: str) -> None:
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


async def test_the_public_url_is_an_allowed_origin(tmp_path: Path) -> None:
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
    monkeypatch.setattr("api.wiring.JwksKeys", partial(JwksKeys, timeout=30))
    backend = by(ec_key("ours"), "ec", "backend", scope="stagecast:service")
    async with guarded(tmp_path, backend, jwks_url=issuer.url, overrides={"clock": clock}) as service:
        yield service
        issuer.publish(jwk(ec_key("ours"), kid="ec"))  # For the invariants.
        clock.step(2)


@pytest.mark.parametrize("kid", ["rsa", "ec"])
async def test_a_token_signed_by_a_published_key_is_accepted_by_http_and_sockets(published: Running, kid: str) -> None:
    key: PrivateKey = rsa_key("ours") if kid == "rsa" else ec_key("ours")
    assert (await ask(published, by(key, kid))).json()["userId"] == "ada"
    async with wire(published, {"token": by(key, kid)}) as bare:
        ack = await bare.authenticate(token=by(key, kid, "bob"))
        assert ack["userId"] == "bob"


async def test_a_token_signed_by_another_key_is_rejected(published: Running) -> None:
    for bad in (by(rsa_key("theirs"), "rsa"), by(ec_key("theirs"), "ec"), token(), by(ec_key("ours"), "ec", exp=1)):
        answer = await ask(published, bad)
        assert (answer.status_code, answer.json()["code"] in ("invalid_token", "token_expired")) == (401, True)


async def test_an_unavailable_issuer_is_answered_with_503_and_not_with_401(
    published: Running, issuer: Issuer, clock: SteppableClock
) -> None:
    good = by(ec_key("ours"), "ec")
    issuer.respond_with_error()
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


async def test_connected_clients_stay_connected_while_the_issuer_is_unavailable(
    published: Running, issuer: Issuer, clock: SteppableClock
) -> None:
    async with wire(published, {"token": by(ec_key("ours"), "ec")}) as bare:
        issuer.respond_with_error()
        clock.step(2 * 3600)  # The keys that were fetched are good no more.
        nack = await bare.authenticate(token=by(ec_key("ours"), "ec", "bob"))
        assert nack["code"] == "unavailable"
        assert (await bare.authenticate())["userId"] == "ada"
