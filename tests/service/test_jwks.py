"""Tokens signed with an issuer's keys: its key set is fetched, cached and refreshed."""

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt.algorithms import RSAAlgorithm

from adapters.outbound.calls import ssl_context
from adapters.tokens.jwt_tokens import JwksKeys, SecretKey, Tokens
from domain.errors import Refusal
from domain.identity import Identity, InvalidToken, KeysUnavailable, TokenExpired
from support.builders import NOON, SteppableClock
from support.jwks_issuer import (
    LATER,
    LONG_TIMEOUT,
    SECRET,
    Issuer,
    PrivateKey,
    certificate_of,
    claims,
    ec_key,
    hs256_token,
    issuer_tokens,
    jwk,
    long_lived_token,
    part,
    raw,
    rsa_key,
    running_issuer,
    signed_token,
)


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    """An issuer with the key `ours` in its key set, as RSA and as EC."""
    async with running_issuer(jwk(rsa_key("ours"), kid="rsa-1"), jwk(ec_key("ours"), kid="ec-1")) as running:
        yield running


@pytest.fixture
def clock() -> SteppableClock:
    return SteppableClock()


@pytest.fixture
def tokens(issuer: Issuer, clock: SteppableClock) -> Tokens:
    return issuer_tokens(issuer, clock)


@pytest.mark.parametrize("kid", ["rsa-1", "ec-1"])
async def test_a_token_signed_by_a_published_key_is_accepted(tokens: Tokens, kid: str) -> None:
    key: PrivateKey = rsa_key("ours") if kid == "rsa-1" else ec_key("ours")
    assert await tokens.verify(signed_token(key, kid)) == Identity(
        "ada", datetime.fromtimestamp(LATER, UTC), service=False
    )


async def test_a_token_signed_by_an_unpublished_key_is_rejected(tokens: Tokens) -> None:
    for token in (
        signed_token(rsa_key("theirs"), "rsa-1"),
        signed_token(ec_key("theirs"), "ec-1"),
        signed_token(rsa_key("theirs"), "rsa-2"),
        signed_token(rsa_key("ours"), "ec-1"),
        signed_token(ec_key("ours"), "rsa-1"),
    ):
        with pytest.raises(InvalidToken):
            await tokens.verify(token)


async def test_public_key_is_not_accepted_as_hmac_secret(tokens: Tokens, issuer: Issuer) -> None:
    payload = json.dumps(claims()).encode()
    for kid, key in (("rsa-1", rsa_key("ours").public_key()), ("ec-1", ec_key("ours").public_key())):
        for secret in (
            key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            json.dumps(jwk(rsa_key("ours"))).encode(),
            b"",
        ):
            with pytest.raises(InvalidToken):
                await tokens.verify(raw(json.dumps({"alg": "HS256", "kid": kid}).encode(), payload, secret))
    assert issuer.requests == 0


async def test_unsigned_token_is_refused_with_public_keys(tokens: Tokens) -> None:
    for algorithm in ("none", "RS256", "ES256"):
        header = json.dumps({"alg": algorithm, "kid": "rsa-1"}).encode()
        with pytest.raises(InvalidToken):
            await tokens.verify(f"{part(header)}.{part(json.dumps(claims()).encode())}.")


@pytest.mark.parametrize("algorithm", ["RS384", "RS512", "PS256"])
async def test_rsa_key_verifies_only_rs256(tokens: Tokens, algorithm: str) -> None:
    with pytest.raises(InvalidToken):
        await tokens.verify(jwt.encode(claims(), rsa_key("ours"), algorithm, headers={"kid": "rsa-1"}))


async def test_a_token_without_a_key_id_is_accepted_if_only_one_key_matches(issuer: Issuer) -> None:
    tokens = issuer_tokens(issuer)
    assert await tokens.verify(signed_token(rsa_key("ours")))
    assert await tokens.verify(signed_token(ec_key("ours")))
    issuer.publish(jwk(rsa_key("ours"), kid="rsa-1"), jwk(rsa_key("next"), kid="rsa-2"))
    with pytest.raises(InvalidToken):
        await issuer_tokens(issuer).verify(signed_token(rsa_key("ours")))


async def test_key_without_id_is_used_if_it_is_the_only_one_of_its_type(issuer: Issuer) -> None:
    issuer.publish(jwk(rsa_key("ours")), jwk(ec_key("ours")))
    tokens = issuer_tokens(issuer)
    for kid in (None, "any"):
        assert await tokens.verify(signed_token(rsa_key("ours"), kid))
        assert await tokens.verify(signed_token(ec_key("ours"), kid))
    issuer.publish(jwk(rsa_key("ours")), jwk(rsa_key("next")))
    for kid in (None, "any"):
        with pytest.raises(InvalidToken):
            await issuer_tokens(issuer).verify(signed_token(rsa_key("ours"), kid))


#: Other entries that an issuer may publish, with the id "odd".
ODD: dict[str, Callable[[], object]] = {
    "for encryption": lambda: jwk(rsa_key("ours"), kid="odd", use="enc"),
    "for RS512": lambda: jwk(rsa_key("ours"), kid="odd", alg="RS512"),
    "for PS256": lambda: jwk(rsa_key("ours"), kid="odd", alg="PS256"),
    "RSA for ES256": lambda: jwk(rsa_key("ours"), kid="odd", alg="ES256"),
    "RSA for HS256": lambda: jwk(rsa_key("ours"), kid="odd", alg="HS256"),
    "for signing only": lambda: jwk(rsa_key("ours"), kid="odd", key_ops=["sign"]),
    "for operations unknown": lambda: jwk(rsa_key("ours"), kid="odd", key_ops="verify"),
    "with its private half": lambda: (
        {**RSAAlgorithm.to_jwk(rsa_key("ours"), as_dict=True), "kid": "odd", "key_ops": []} | {"key_ops": ["verify"]}
    ),
    "too short": lambda: jwk(rsa_key("short", 1024), kid="odd"),
    "a secret": lambda: {"kty": "oct", "kid": "odd", "alg": "HS256", "k": part(SECRET)},
    "of another curve": lambda: jwk(ec_key("wide", ec.SECP384R1), kid="odd"),
    "of another curve for ES256": lambda: jwk(ec_key("wide", ec.SECP384R1), kid="odd", alg="ES256"),
    "of another curve of 256 bits": lambda: jwk(ec_key("other", ec.SECP256K1), kid="odd", alg="ES256"),
    "of a curve that it is not": lambda: jwk(ec_key("wide", ec.SECP384R1), kid="odd", crv="P-256"),
    "not on its curve": lambda: jwk(ec_key("ours"), kid="odd", x=part(b"\x01" * 32)),
    "without a curve": lambda: jwk(ec_key("ours"), kid="odd", crv=None),
    "of no type": lambda: jwk(rsa_key("ours"), kid="odd", kty=None),
    "of many types": lambda: jwk(rsa_key("ours"), kid="odd", kty=["RSA"]),
    "named by a number": lambda: jwk(rsa_key("ours"), kid=1),
    "without a modulus": lambda: jwk(rsa_key("ours"), kid="odd", n=None),
    "with an empty modulus": lambda: jwk(rsa_key("ours"), kid="odd", n=""),
    "with a number for a modulus": lambda: jwk(rsa_key("ours"), kid="odd", n=5),
    "with nonsense for a modulus": lambda: jwk(rsa_key("ours"), kid="odd", n="\ud800"),
    "with the exponent 0": lambda: jwk(rsa_key("ours"), kid="odd", e="AA"),
    "no key": lambda: ["RSA"],
    "nothing": lambda: None,
}


@pytest.mark.parametrize("odd", ODD)
async def test_keys_for_other_purposes_are_ignored(issuer: Issuer, odd: str) -> None:
    issuer.publish(ODD[odd](), jwk(ec_key("good"), kid="good"))
    tokens = issuer_tokens(issuer)
    assert await tokens.verify(signed_token(ec_key("good"), "good"))
    for forged in (
        signed_token(rsa_key("ours"), "odd"),
        signed_token(rsa_key("ours")),
        signed_token(ec_key("ours"), "odd"),
        raw(b'{"alg": "HS256", "kid": "odd"}', json.dumps(claims()).encode()),
    ):
        with pytest.raises(InvalidToken):
            await tokens.verify(forged)


@pytest.mark.parametrize("odd", ODD)
async def test_key_set_without_a_usable_key_counts_as_a_failure(issuer: Issuer, odd: str) -> None:
    issuer.publish(ODD[odd]())
    with pytest.raises(KeysUnavailable):
        await issuer_tokens(issuer).verify(signed_token(rsa_key("ours"), "odd"))


@pytest.mark.parametrize("members", [{"use": "sig"}, {"alg": "RS256"}, {"key_ops": ["verify"]}, {"x5t": "?", "new": 1}])
async def test_a_key_with_matching_optional_members_is_used(issuer: Issuer, members: dict[str, Any]) -> None:
    issuer.publish(jwk(rsa_key("ours"), kid="rsa-1", **members))
    assert await issuer_tokens(issuer).verify(signed_token(rsa_key("ours"), "rsa-1"))


# --- when keys are fetched -------------------------------------------------------------------------------


async def test_keys_are_fetched_once_in_five_minutes(tokens: Tokens, issuer: Issuer, clock: SteppableClock) -> None:
    token = long_lived_token(rsa_key("ours"), "rsa-1")
    for minutes, requests in ((0, 1), (4.9, 1), (5, 2), (9.9, 2), (10, 3)):
        clock.present = NOON + timedelta(minutes=minutes)
        assert await tokens.verify(token)
        assert issuer.requests == requests


async def test_concurrent_verifications_share_one_fetch(tokens: Tokens, issuer: Issuer) -> None:
    asked, go_on = issuer.hold_responses()
    waiting = asyncio.gather(*(tokens.verify(signed_token(rsa_key("ours"), "rsa-1")) for _ in range(50)))
    await asked.wait()
    go_on.set()
    assert {identity.user_id for identity in await waiting} == {"ada"}
    assert issuer.requests == 1


async def test_new_key_is_found_at_once_with_one_fetch(tokens: Tokens, issuer: Issuer) -> None:
    await tokens.verify(signed_token(rsa_key("ours"), "rsa-1"))
    issuer.publish(jwk(rsa_key("next"), kid="rsa-2"))
    asked, go_on = issuer.hold_responses()
    waiting = asyncio.gather(*(tokens.verify(signed_token(rsa_key("next"), "rsa-2")) for _ in range(50)))
    await asked.wait()
    go_on.set()
    assert len(await waiting) == 50
    assert issuer.requests == 2
    with pytest.raises(InvalidToken):
        await tokens.verify(signed_token(rsa_key("ours"), "rsa-1"))


async def test_a_withdrawn_key_is_accepted_for_five_minutes_at_most(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    token = long_lived_token(rsa_key("ours"), "rsa-1")
    await tokens.verify(token)
    issuer.publish(jwk(rsa_key("next"), kid="rsa-2"))
    clock.step(300)
    with pytest.raises(InvalidToken):
        await tokens.verify(token)


async def test_unknown_key_ids_cause_one_request_in_ten_seconds(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    await tokens.verify(signed_token(rsa_key("ours"), "rsa-1"))
    for requests in (2, 3, 4):
        for number in range(20):
            with pytest.raises(InvalidToken):
                await tokens.verify(signed_token(rsa_key("theirs"), f"made-up-{number}"))
        await asyncio.gather(
            *(tokens.verify(signed_token(rsa_key("theirs"), f"too-{n}")) for n in range(20)), return_exceptions=True
        )
        assert issuer.requests == requests
        clock.step(9.9)
        with pytest.raises(InvalidToken):
            await tokens.verify(signed_token(rsa_key("theirs"), "made-up"))
        assert issuer.requests == requests
        clock.step(0.1)


async def test_a_token_that_can_never_be_valid_causes_no_request_to_the_issuer(tokens: Tokens, issuer: Issuer) -> None:
    for token in ("", "x", hs256_token(claims()), raw(b'{"alg": "none", "kid": "x"}', b"{}"), "x" * 9000):
        with pytest.raises(InvalidToken):
            await tokens.verify(token)
    assert issuer.requests == 0


async def test_a_known_key_does_not_wait_for_a_running_fetch(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    token = long_lived_token(rsa_key("ours"), "rsa-1")
    await tokens.verify(token)
    asked, go_on = issuer.hold_responses()
    clock.step(300)
    first = asyncio.create_task(tokens.verify(token))
    await asked.wait()
    assert await tokens.verify(token)
    assert not first.done()
    go_on.set()
    assert await first
    assert issuer.requests == 2


async def test_a_cancelled_verification_does_not_affect_others(tokens: Tokens, issuer: Issuer) -> None:
    asked, go_on = issuer.hold_responses()
    first, *others = (asyncio.create_task(tokens.verify(signed_token(rsa_key("ours"), "rsa-1"))) for _ in range(5))
    await asked.wait()
    first.cancel()
    go_on.set()
    assert len(await asyncio.gather(*others)) == 4
    assert first.cancelled()


async def test_keys_fetched_in_the_future_are_fetched_again_after_the_clock_goes_back(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    token = signed_token(rsa_key("ours"), "rsa-1")
    await tokens.verify(token)
    clock.step(-86_400)
    assert await tokens.verify(token)
    assert issuer.requests == 2


# --- when the issuer does not answer ---------------------------------------------------------------------


async def test_without_any_key_tokens_cannot_be_verified_until_the_issuer_answers(
    issuer: Issuer, clock: SteppableClock
) -> None:
    await issuer.stop()
    tokens, token = issuer_tokens(issuer, clock), signed_token(rsa_key("ours"), "rsa-1")
    with pytest.raises(KeysUnavailable) as refusal:
        await tokens.verify(token)
    assert refusal.value.code == "unavailable"
    await issuer.start()
    with pytest.raises(KeysUnavailable):
        await tokens.verify(token)
    assert issuer.requests == 0
    clock.step(1)
    assert await tokens.verify(token)
    with pytest.raises(InvalidToken):
        await tokens.verify(signed_token(rsa_key("theirs"), "made-up"))


async def test_known_keys_are_used_for_an_hour_while_the_issuer_is_down(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    token = long_lived_token(rsa_key("ours"), "rsa-1")
    await tokens.verify(token)
    await issuer.stop()
    for _ in range(59):
        clock.step(60)
        assert await tokens.verify(token)
    clock.step(60)
    with pytest.raises(KeysUnavailable):
        await tokens.verify(token)
    await issuer.start()
    clock.step(1)
    assert await tokens.verify(token)


async def test_a_failing_issuer_is_asked_once_in_ten_seconds_while_keys_are_cached(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    token = long_lived_token(rsa_key("ours"), "rsa-1")
    await tokens.verify(token)
    issuer.respond_with_error(503)
    clock.step(300)
    for requests in (2, 3, 4):
        await asyncio.gather(*(tokens.verify(token) for _ in range(20)))
        clock.step(9.9)
        assert await tokens.verify(token)
        assert issuer.requests == requests
        clock.step(0.1)


async def test_an_unknown_key_id_is_unavailable_and_not_invalid_while_the_issuer_is_down(
    tokens: Tokens, issuer: Issuer
) -> None:
    await tokens.verify(signed_token(rsa_key("ours"), "rsa-1"))
    issuer.respond_with_error(500)
    for _ in range(2):
        with pytest.raises(KeysUnavailable):
            await tokens.verify(signed_token(rsa_key("next"), "rsa-2"))
    assert await tokens.verify(signed_token(rsa_key("ours"), "rsa-1"))
    assert issuer.requests == 2


async def test_a_token_that_is_invalid_with_any_key_is_rejected_while_the_issuer_is_down(issuer: Issuer) -> None:
    await issuer.stop()
    for token in ("", "x.y.z", hs256_token(claims())):
        with pytest.raises(InvalidToken):
            await issuer_tokens(issuer).verify(token)


GOOD_DOCUMENT = json.dumps({"keys": [jwk(ec_key("ours"), kid="ec-1")]}).encode()


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<html>Sign in</html>",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"keys": ' + b"[" * 100_000,
        b"null",
        b"[]",
        b"{}",
        b'{"keys": null}',
        b'{"keys": {}}',
        b'{"keys": "rsa"}',
        b'{"keys": []}',
        b'{"keys": [' + b"9" * 5000 + b"]}",
        GOOD_DOCUMENT[:-1],
        GOOD_DOCUMENT + b" " * 256 * 1024,
    ],
    ids=lambda document: repr(document[:20]),
)
async def test_a_malformed_key_set_keeps_the_cached_keys(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock, document: bytes
) -> None:
    issuer.respond_with(document)
    token = long_lived_token(ec_key("ours"), "ec-1")
    with pytest.raises(KeysUnavailable):
        await tokens.verify(token)
    issuer.respond_with(GOOD_DOCUMENT)
    clock.step(1)
    assert await tokens.verify(token)
    issuer.respond_with(document)
    clock.step(300)
    assert await tokens.verify(token)
    assert issuer.requests == 3


async def test_a_key_set_may_have_256_kilobytes(tokens: Tokens, issuer: Issuer) -> None:
    issuer.respond_with(GOOD_DOCUMENT.ljust(256 * 1024))
    assert await tokens.verify(signed_token(ec_key("ours"), "ec-1"))


async def test_compressed_key_set_is_not_decompressed(tokens: Tokens, issuer: Issuer) -> None:
    asked_for: list[str] = []

    async def compressed(request: web.Request) -> web.Response:
        asked_for.append(request.headers["Accept-Encoding"])
        answer = web.Response(body=GOOD_DOCUMENT)
        answer.enable_compression(web.ContentCoding.gzip)
        return answer

    issuer.answer = compressed
    with pytest.raises(KeysUnavailable):
        await tokens.verify(signed_token(ec_key("ours"), "ec-1"))
    assert asked_for == ["identity"]


@pytest.mark.parametrize("status", [204, 301, 302, 307, 401, 404, 500, 503])
async def test_other_status_than_200_counts_as_a_failure(tokens: Tokens, issuer: Issuer, status: int) -> None:
    issuer.respond_with_error(status, Location=f"{issuer.url}-elsewhere")
    with pytest.raises(KeysUnavailable):
        await tokens.verify(signed_token(ec_key("ours"), "ec-1"))
    assert issuer.requests == 1


async def test_endless_key_set_is_cut_off(issuer: Issuer) -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            await answer.write(b" ")
            await asyncio.sleep(0.02)

    for answer in (drip, issuer.hold_responses() and issuer.answer):
        issuer.answer = answer
        async with asyncio.timeout(30):
            with pytest.raises(KeysUnavailable):
                await issuer_tokens(issuer, timeout=0.2).verify(signed_token(ec_key("ours"), "ec-1"))


async def test_server_without_http_counts_as_a_failure(clock: SteppableClock) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.test ESMTP\r\n")
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for scheme in ("http", "https"):
            keys = JwksKeys(f"{scheme}://127.0.0.1:{port}/keys", clock=clock)
            with pytest.raises(KeysUnavailable):
                await Tokens(keys, clock=clock).verify(signed_token(ec_key("ours"), "ec-1"))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/", "keys", "http://", "http://[", "http://a:b/"]
)
async def test_an_invalid_url_yields_no_keys(clock: SteppableClock, url: str) -> None:
    with pytest.raises(KeysUnavailable):
        await Tokens(JwksKeys(url, clock=clock), clock=clock).verify(signed_token(ec_key("ours"), "ec-1"))


async def test_the_certificate_of_an_issuer_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ec_key("tls")
    pem = tmp_path / "issuer.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem.write_bytes(certificate_of(key) + private)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)

    issuer, clock, token = Issuer(), SteppableClock(), signed_token(ec_key("ours"), "ec-1")
    issuer.publish(jwk(ec_key("ours"), kid="ec-1"))
    await issuer.start(server)
    try:
        proven, unproven = (f"https://{host}:{issuer.port}/keys" for host in ("localhost", "127.0.0.1"))
        with pytest.raises(KeysUnavailable):
            await Tokens(JwksKeys(proven, clock=clock), clock=clock).verify(token)
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        fresh = ssl_context.__wrapped__()
        assert await Tokens(JwksKeys(proven, clock=clock, timeout=LONG_TIMEOUT, trust=fresh), clock=clock).verify(token)
        with pytest.raises(KeysUnavailable):
            await Tokens(JwksKeys(unproven, clock=clock, trust=fresh), clock=clock).verify(token)
    finally:
        await issuer.close()


async def test_proxies_of_the_environment_are_not_used(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert await tokens.verify(signed_token(ec_key("ours"), "ec-1"))


# --- logging ----------------------------------------------------------------------------------------------


async def test_neither_secrets_nor_tokens_are_logged(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="adapters")
    secret = SecretKey(SECRET)
    clock = SteppableClock()
    address = issuer.url.replace("http://", "http://user:hunter2@") + "?key=hunter2"
    texts = [repr(secret), str(secret.key), repr(secret.key), repr(Tokens(secret, clock=clock))]
    good = hs256_token(claims(aud="x"))
    refused: list[Refusal] = []
    issuer.respond_with_error(500)
    for tokens, token in (
        (Tokens(secret, clock=clock), good),
        (Tokens(secret, clock=clock), good[:-3]),
        (Tokens(secret, clock=clock), hs256_token(claims(exp=1))),
        (
            Tokens(JwksKeys(address, clock=clock, timeout=LONG_TIMEOUT), clock=clock),
            signed_token(rsa_key("ours"), "rsa-1"),
        ),
        (
            Tokens(JwksKeys(address.replace("http", "ftp"), clock=clock), clock=clock),
            signed_token(rsa_key("ours"), "rsa-1"),
        ),
    ):
        with pytest.raises(Refusal) as refusal:
            await tokens.verify(token)
        refused.append(refusal.value)
        texts += [str(refusal.value), repr(refusal.value), repr(tokens)]
        assert token[-20:] not in caplog.text
    assert [type(each) for each in refused] == [
        *(InvalidToken, InvalidToken, TokenExpired, KeysUnavailable, KeysUnavailable)
    ]
    assert "cannot be fetched: status 500" in caplog.text
    assert "cannot be fetched: UnsupportedProtocol" in caplog.text
    for text in (*texts, caplog.text):
        assert SECRET.decode() not in text
        assert part(SECRET) not in text
        assert "hunter2" not in text
