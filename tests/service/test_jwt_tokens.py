"""Tokens: who is taken for whom, until when, and by which keys. Keys, signatures and the issuer are real."""

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import RSAAlgorithm

from adapters.outbound.tls import ssl_context
from adapters.tokens.jwt_tokens import JwksKeys, SecretKey, Tokens, issue
from domain.errors import Refusal
from domain.identity import Identity, InvalidToken, InvalidUserId, KeysUnavailable, TokenExpired
from support.builders import NOON, PROPERTY, SteppableClock
from support.jwks_issuer import (
    LATER,
    NOW,
    PATIENT,
    SECRET,
    Issuer,
    PrivateKey,
    by_key,
    by_secret,
    claims,
    ec_key,
    jwk,
    part,
    raw,
    rsa_key,
    running_issuer,
)


def secret_tokens(clock: SteppableClock | None = None, **options: Any) -> Tokens:
    return Tokens(SecretKey(SECRET), clock=clock or SteppableClock(), **options)


async def verify(payload: Mapping[str, Any], **options: Any) -> Identity:
    return await secret_tokens(**options).verify(by_secret(payload))


# --- whom a token names ----------------------------------------------------------------------------------


async def test_a_token_names_its_user_until_it_expires() -> None:
    assert await verify(claims()) == Identity("ada", datetime.fromtimestamp(LATER, UTC), service=False)


async def test_the_user_is_named_by_the_configured_claim() -> None:
    named = await verify(claims(sub="somebody else", uid="ada"), user_claim="uid")
    assert named.user_id == "ada"
    with pytest.raises(InvalidToken):
        await verify(claims(), user_claim="uid")


async def test_an_integer_is_a_user_id_too() -> None:
    assert (await verify(claims(sub=123))).user_id == "123"


async def test_claims_that_nobody_needs_may_be_anything() -> None:
    assert (await verify(claims(jti=123, sub=["?"], uid="ada", typ=None), user_claim="uid")).user_id == "ada"


@pytest.mark.parametrize(
    "sub", ["", "x" * 129, "a\x00b", "a\nb", "a\x7fb", "\ud800", True, False, 1.5, 10**200, None, ["ada"], {"id": 1}]
)
async def test_what_is_no_user_id_names_nobody(sub: object) -> None:
    with pytest.raises(InvalidToken):
        await verify(claims(sub=sub))


async def test_a_token_without_its_user_claim_names_nobody() -> None:
    with pytest.raises(InvalidToken):
        await verify({"exp": LATER})


@pytest.mark.parametrize(
    "scope",
    ["stagecast:service", "read stagecast:service write", ["read", "stagecast:service"], [{}, "stagecast:service"]],
)
async def test_the_service_scope_makes_a_service(scope: object) -> None:
    assert (await verify(claims(scope=scope))).service


@pytest.mark.parametrize(
    "scope",
    [
        "",
        "read",
        "stagecast:services",
        "not-stagecast:service",
        "STAGECAST:SERVICE",
        "read,stagecast:service",
        "read\tstagecast:service",
        [],
        ["read stagecast:service"],
        [["stagecast:service"]],
        {"stagecast:service": True},
        True,
        1,
        None,
    ],
)
async def test_any_other_scope_makes_an_ordinary_user(scope: object) -> None:
    assert not (await verify(claims(scope=scope))).service


# --- from when and until when ----------------------------------------------------------------------------


@pytest.mark.parametrize("exp", [LATER, LATER + 0.5])
async def test_a_token_is_good_to_the_last_moment_and_no_longer(exp: float) -> None:
    clock, end = SteppableClock(), datetime.fromtimestamp(exp, UTC)
    tokens, token = secret_tokens(clock), by_secret(claims(exp=exp))
    clock.present = end - timedelta(microseconds=1)
    assert (await tokens.verify(token)).expires_at == end
    clock.present = end
    with pytest.raises(TokenExpired):
        await tokens.verify(token)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"sub": "ada"}',
        *(
            b'{"sub": "ada", "exp": %s}' % exp
            for exp in (
                *(b"null", b"true", b'"%d"' % LATER, b"[]", b"{}", b"-1", b"NaN", b"Infinity", b"-Infinity", b"1e999"),
                *(b"%d000" % LATER, b"253402300800", b"9" * 300, b"9" * 5000, b"1e300"),
            )
        ),
    ],
)
async def test_a_token_has_to_say_when_it_expires(payload: bytes) -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(raw(b'{"alg": "HS256"}', payload))


async def test_a_token_may_expire_in_the_last_second_of_time() -> None:
    assert (await verify(claims(exp=253402300799))).expires_at == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


@pytest.mark.parametrize("year", [1971, 2500])
async def test_the_time_is_what_the_given_clock_says(year: int) -> None:
    clock = SteppableClock(datetime(year, 1, 1, tzinfo=UTC))
    now = clock().timestamp()
    assert await verify(claims(nbf=now, iat=now, exp=now + 60), clock=clock)
    with pytest.raises(InvalidToken):
        await verify(claims(nbf=now + 60, exp=now + 60), clock=clock)
    with pytest.raises(TokenExpired):
        await verify(claims(exp=now), clock=clock)


@pytest.mark.parametrize("claim", ["nbf", "iat"])
async def test_another_clock_may_be_five_seconds_ahead(claim: str) -> None:
    assert await verify(claims(**{claim: NOW + 4.9}))
    with pytest.raises(InvalidToken):
        await verify(claims(**{claim: NOW + 5.1}))


@pytest.mark.parametrize("claim", ["nbf", "iat"])
@pytest.mark.parametrize("value", [None, True, "0", "soon", [], -1, 10**30])
async def test_a_beginning_that_is_no_moment_is_refused(claim: str, value: object) -> None:
    with pytest.raises(InvalidToken):
        await verify(claims(**{claim: value}))


async def test_an_expired_token_is_called_so_only_where_nothing_else_is_wrong() -> None:
    expired = claims(exp=int(NOW) - 1)
    with pytest.raises(TokenExpired):
        await verify(expired)
    for wrong in ({**expired, "sub": ""}, {**expired, "aud": "others"}, {**expired, "nbf": LATER}):
        with pytest.raises(InvalidToken):
            await verify(wrong)
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(by_secret(expired, secret=b"x" * 32))


# --- for whom and by whom --------------------------------------------------------------------------------


@pytest.mark.parametrize("aud", ["stagecast", ["others", "stagecast"]])
async def test_a_token_for_us_is_taken(aud: object) -> None:
    assert await verify(claims(aud=aud), audience="stagecast")


@pytest.mark.parametrize("others", [{}, {"aud": "others"}, {"aud": []}, {"aud": [1]}, {"aud": {"stagecast": 1}}])
async def test_a_token_for_somebody_else_is_refused(others: dict[str, Any]) -> None:
    with pytest.raises(InvalidToken):
        await verify(claims(**others), audience="stagecast")


async def test_without_a_configured_audience_a_token_for_anybody_in_particular_is_refused_and_the_operator_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokens = secret_tokens()
    for _ in range(3):
        with pytest.raises(InvalidToken):
            await tokens.verify(by_secret(claims(aud="stagecast")))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no audience is configured" in caplog.text


async def test_a_token_by_our_issuer_is_taken_and_no_other() -> None:
    assert await verify(claims(iss="https://issuer.test/"), issuer="https://issuer.test/")
    assert await verify(claims(iss="whoever"))
    for others in ({}, {"iss": "https://issuer.test"}, {"iss": ["https://issuer.test/"]}, {"iss": 1}):
        with pytest.raises(InvalidToken):
            await verify(claims(**others), issuer="https://issuer.test/")


# --- what is no token ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b.c",
        "\x00",
        "tökên.a.b",
        "\ud800.a.b",
        "😀" * 100,
        by_secret(claims()) + "\n",
        by_secret(claims()) + ".x",
        by_secret(claims()).replace(".", " ."),
        raw(b'{"alg": "HS256"}', b"[" * 3000),
        raw(b'{"alg": "HS256"}', b"[" * 2500 + b"]" * 2500),
        raw(b'{"alg": "HS256", "x": ' + b"[" * 2500 + b"]" * 2500 + b"}", b"{}"),
        raw(b'{"alg": "HS256"}', b"[]"),
        raw(b'{"alg": "HS256"}', b"\xff\xfe"),
        raw(b"\xff\xfe", b"{}"),
        raw(b"null", json.dumps(claims()).encode()),
        *(
            raw(header, json.dumps(claims()).encode())
            for header in (
                *(b"{}", b'{"alg": null}', b'{"alg": ["HS256"]}', b'{"alg": {}}', b'{"alg": 1}', b'{"alg": "hs256"}'),
                *(b'{"alg": "HS256", "kid": 1}', b'{"alg": "HS256", "kid": ["x"]}', b'{"alg": "HS256", "crit": []}'),
                *(b'{"alg": "HS256", "crit": ["x"], "x": 1}', b'{"alg": "HS256", "crit": ["b64"], "b64": false}'),
            )
        ),
    ],
)
async def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(token)


@pytest.mark.parametrize("value", [None, b"", by_secret(claims()).encode(), 1, ["x"], {}])
async def test_what_is_not_even_text_is_refused(value: Any) -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(value)


async def test_a_token_of_over_eight_kilobytes_is_not_read() -> None:
    def sized(size: int) -> str:
        payload = json.dumps(claims(pad="x" * 5_900)).encode()
        tokens = (raw(b'{"alg": "HS256"}' + b" " * n, payload + b" " * m) for n in range(4) for m in range(200))
        return next(token for token in tokens if len(token) == size)

    assert await secret_tokens().verify(sized(8192))
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(sized(8193))


# --- which keys and algorithms ---------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
async def test_a_secret_verifies_by_one_algorithm(algorithm: str) -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(jwt.encode(claims(), SECRET, algorithm))


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", ""])
@pytest.mark.parametrize("signature", ["", "x", "AAAA"])
async def test_an_unsigned_token_is_refused(algorithm: str, signature: str) -> None:
    header = json.dumps({"alg": algorithm}).encode()
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(f"{part(header)}.{part(json.dumps(claims()).encode())}.{signature}")


async def test_another_secret_is_refused() -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(by_secret(claims(), secret=SECRET[:-1] + b"!"))


@pytest.mark.parametrize("secret", [b"", b"hunter2", b"hunter2" * 4 + b"abc"])
def test_a_short_secret_is_refused_and_not_repeated(secret: bytes) -> None:
    assert len(secret) < 32
    with pytest.raises(ValueError, match="32 bytes") as refusal:
        SecretKey(secret)
    assert "hunter2" not in str(refusal.value)
    with pytest.raises(ValueError, match="32 bytes"):
        issue(secret, "ada", service=False, ttl=timedelta(hours=1), now=NOON)


def test_a_public_key_is_no_secret() -> None:
    public = rsa_key("ours").public_key()
    for secret in (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(jwk(rsa_key("ours"))).encode(),
    ):
        with pytest.raises(ValueError, match="must not be a public key"):
            SecretKey(secret)


# --- tokens of our own -----------------------------------------------------------------------------------


async def test_an_issued_token_is_taken_until_its_time_is_over() -> None:
    clock = SteppableClock()
    tokens = secret_tokens(clock)
    token = issue(SECRET, "ada", service=False, ttl=timedelta(seconds=60), now=clock())
    assert (await tokens.verify(token)).user_id == "ada"
    clock.step(60)
    assert await tokens.verify(token)
    clock.step(1)
    with pytest.raises(TokenExpired):
        await tokens.verify(token)


@pytest.mark.parametrize("service", [True, False])
async def test_an_issued_token_says_whether_it_is_a_service(service: bool) -> None:
    token = issue(SECRET, "ada", service=service, ttl=timedelta(hours=1), now=NOON)
    assert (await secret_tokens().verify(token)).service is service


async def test_an_issued_token_fits_what_is_configured() -> None:
    options: dict[str, Any] = {"user_claim": "uid", "audience": "stagecast", "issuer": "us"}
    token = issue(SECRET, "çağla 😀", service=False, ttl=timedelta(hours=1), now=NOON, **options)
    assert (await secret_tokens(**options).verify(token)).user_id == "çağla 😀"


@pytest.mark.parametrize("ttl", [timedelta(), timedelta(seconds=-1), timedelta(days=365 * 9000), timedelta.max])
def test_a_token_is_issued_for_some_time(ttl: timedelta) -> None:
    with pytest.raises(ValueError, match="time to live"):
        issue(SECRET, "ada", service=False, ttl=ttl, now=NOON)


@pytest.mark.parametrize("user_id", ["", "x" * 129, "a\x00", "\ud800"])
def test_no_token_is_issued_for_what_is_no_user_id(user_id: str) -> None:
    with pytest.raises(InvalidUserId):
        issue(SECRET, user_id, service=False, ttl=timedelta(hours=1), now=NOON)


def certificate_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """That this is the key of localhost, as its owner says."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    return (
        x509.CertificateBuilder(name, name, key.public_key(), 1, datetime(2020, 1, 1), datetime(2100, 1, 1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    """One that has published the key `ours`, both as RSA and as EC."""
    async with running_issuer(jwk(rsa_key("ours"), kid="rsa-1"), jwk(ec_key("ours"), kid="ec-1")) as running:
        yield running


@pytest.fixture
def clock() -> SteppableClock:
    return SteppableClock()


@pytest.fixture
def tokens(issuer: Issuer, clock: SteppableClock) -> Tokens:
    return issuer_tokens(issuer, clock)


def issuer_tokens(issuer: Issuer, clock: SteppableClock | None = None, timeout: float = PATIENT) -> Tokens:
    clock = clock or SteppableClock()
    return Tokens(JwksKeys(issuer.url, clock=clock, timeout=timeout), clock=clock)


def lasting(key: PrivateKey, kid: str | None = None) -> str:
    """A token that outlives the caches."""
    return by_key(key, kid, exp=LATER + 86_400)


@pytest.mark.parametrize("kid", ["rsa-1", "ec-1"])
async def test_a_token_by_a_published_key_is_taken(tokens: Tokens, kid: str) -> None:
    key: PrivateKey = rsa_key("ours") if kid == "rsa-1" else ec_key("ours")
    assert await tokens.verify(by_key(key, kid)) == Identity("ada", datetime.fromtimestamp(LATER, UTC), service=False)


async def test_a_token_by_an_unpublished_key_is_refused(tokens: Tokens) -> None:
    for token in (
        by_key(rsa_key("theirs"), "rsa-1"),
        by_key(ec_key("theirs"), "ec-1"),
        by_key(rsa_key("theirs"), "rsa-2"),
        by_key(rsa_key("ours"), "ec-1"),
        by_key(ec_key("ours"), "rsa-1"),
    ):
        with pytest.raises(InvalidToken):
            await tokens.verify(token)


async def test_a_public_key_is_never_taken_for_a_secret(tokens: Tokens, issuer: Issuer) -> None:
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


async def test_an_unsigned_token_is_refused_by_public_keys_too(tokens: Tokens) -> None:
    for algorithm in ("none", "RS256", "ES256"):
        header = json.dumps({"alg": algorithm, "kid": "rsa-1"}).encode()
        with pytest.raises(InvalidToken):
            await tokens.verify(f"{part(header)}.{part(json.dumps(claims()).encode())}.")


@pytest.mark.parametrize("algorithm", ["RS384", "RS512", "PS256"])
async def test_an_rsa_key_verifies_by_one_algorithm(tokens: Tokens, algorithm: str) -> None:
    with pytest.raises(InvalidToken):
        await tokens.verify(jwt.encode(claims(), rsa_key("ours"), algorithm, headers={"kid": "rsa-1"}))


async def test_a_token_without_a_key_id_is_taken_where_only_one_key_can_be_meant(issuer: Issuer) -> None:
    tokens = issuer_tokens(issuer)
    assert await tokens.verify(by_key(rsa_key("ours")))
    assert await tokens.verify(by_key(ec_key("ours")))
    issuer.publish(jwk(rsa_key("ours"), kid="rsa-1"), jwk(rsa_key("next"), kid="rsa-2"))
    with pytest.raises(InvalidToken):
        await issuer_tokens(issuer).verify(by_key(rsa_key("ours")))


async def test_a_key_without_an_id_is_used_where_it_is_the_only_one_of_its_type(issuer: Issuer) -> None:
    issuer.publish(jwk(rsa_key("ours")), jwk(ec_key("ours")))
    tokens = issuer_tokens(issuer)
    for kid in (None, "any"):
        assert await tokens.verify(by_key(rsa_key("ours"), kid))
        assert await tokens.verify(by_key(ec_key("ours"), kid))
    issuer.publish(jwk(rsa_key("ours")), jwk(rsa_key("next")))
    for kid in (None, "any"):
        with pytest.raises(InvalidToken):
            await issuer_tokens(issuer).verify(by_key(rsa_key("ours"), kid))


#: What an issuer may publish beside its signing keys, all with the id "odd".
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
async def test_what_is_published_but_not_for_this_is_ignored(issuer: Issuer, odd: str) -> None:
    issuer.publish(ODD[odd](), jwk(ec_key("good"), kid="good"))
    tokens = issuer_tokens(issuer)
    assert await tokens.verify(by_key(ec_key("good"), "good"))
    for forged in (
        by_key(rsa_key("ours"), "odd"),
        by_key(rsa_key("ours")),
        by_key(ec_key("ours"), "odd"),
        raw(b'{"alg": "HS256", "kid": "odd"}', json.dumps(claims()).encode()),
    ):
        with pytest.raises(InvalidToken):
            await tokens.verify(forged)


@pytest.mark.parametrize("odd", ODD)
async def test_a_set_without_a_usable_key_counts_as_no_answer(issuer: Issuer, odd: str) -> None:
    issuer.publish(ODD[odd]())
    with pytest.raises(KeysUnavailable):
        await issuer_tokens(issuer).verify(by_key(rsa_key("ours"), "odd"))


@pytest.mark.parametrize("members", [{"use": "sig"}, {"alg": "RS256"}, {"key_ops": ["verify"]}, {"x5t": "?", "new": 1}])
async def test_what_a_key_says_of_itself_may_fit(issuer: Issuer, members: dict[str, Any]) -> None:
    issuer.publish(jwk(rsa_key("ours"), kid="rsa-1", **members))
    assert await issuer_tokens(issuer).verify(by_key(rsa_key("ours"), "rsa-1"))


# --- when the issuer is asked ----------------------------------------------------------------------------


async def test_the_issuer_is_asked_once_in_five_minutes(tokens: Tokens, issuer: Issuer, clock: SteppableClock) -> None:
    token = lasting(rsa_key("ours"), "rsa-1")
    for minutes, requests in ((0, 1), (4.9, 1), (5, 2), (9.9, 2), (10, 3)):
        clock.present = NOON + timedelta(minutes=minutes)
        assert await tokens.verify(token)
        assert issuer.requests == requests


async def test_verifications_at_once_share_one_request(tokens: Tokens, issuer: Issuer) -> None:
    asked, go_on = issuer.waits()
    waiting = asyncio.gather(*(tokens.verify(by_key(rsa_key("ours"), "rsa-1")) for _ in range(50)))
    await asked.wait()
    go_on.set()
    assert {identity.user_id for identity in await waiting} == {"ada"}
    assert issuer.requests == 1


async def test_a_new_key_is_noticed_at_once_with_one_request_for_all(tokens: Tokens, issuer: Issuer) -> None:
    await tokens.verify(by_key(rsa_key("ours"), "rsa-1"))
    issuer.publish(jwk(rsa_key("next"), kid="rsa-2"))
    asked, go_on = issuer.waits()
    waiting = asyncio.gather(*(tokens.verify(by_key(rsa_key("next"), "rsa-2")) for _ in range(50)))
    await asked.wait()
    go_on.set()
    assert len(await waiting) == 50
    assert issuer.requests == 2
    with pytest.raises(InvalidToken):
        await tokens.verify(by_key(rsa_key("ours"), "rsa-1"))


async def test_a_withdrawn_key_is_good_for_five_minutes_at_most(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    token = lasting(rsa_key("ours"), "rsa-1")
    await tokens.verify(token)
    issuer.publish(jwk(rsa_key("next"), kid="rsa-2"))
    clock.step(300)
    with pytest.raises(InvalidToken):
        await tokens.verify(token)


async def test_made_up_key_ids_bring_the_issuer_one_request_in_ten_seconds(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    await tokens.verify(by_key(rsa_key("ours"), "rsa-1"))
    for requests in (2, 3, 4):
        for number in range(20):
            with pytest.raises(InvalidToken):
                await tokens.verify(by_key(rsa_key("theirs"), f"made-up-{number}"))
        await asyncio.gather(
            *(tokens.verify(by_key(rsa_key("theirs"), f"too-{n}")) for n in range(20)), return_exceptions=True
        )
        assert issuer.requests == requests
        clock.step(9.9)
        with pytest.raises(InvalidToken):
            await tokens.verify(by_key(rsa_key("theirs"), "made-up"))
        assert issuer.requests == requests
        clock.step(0.1)


async def test_a_token_that_can_never_be_good_does_not_bring_the_issuer_a_request(
    tokens: Tokens, issuer: Issuer
) -> None:
    for token in ("", "x", by_secret(claims()), raw(b'{"alg": "none", "kid": "x"}', b"{}"), "x" * 9000):
        with pytest.raises(InvalidToken):
            await tokens.verify(token)
    assert issuer.requests == 0


async def test_who_has_a_known_key_does_not_wait_while_somebody_else_asks(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    token = lasting(rsa_key("ours"), "rsa-1")
    await tokens.verify(token)
    asked, go_on = issuer.waits()
    clock.step(300)
    first = asyncio.create_task(tokens.verify(token))
    await asked.wait()
    assert await tokens.verify(token)
    assert not first.done()
    go_on.set()
    assert await first
    assert issuer.requests == 2


async def test_who_gives_up_waiting_does_not_spoil_it_for_others(tokens: Tokens, issuer: Issuer) -> None:
    asked, go_on = issuer.waits()
    first, *others = (asyncio.create_task(tokens.verify(by_key(rsa_key("ours"), "rsa-1"))) for _ in range(5))
    await asked.wait()
    first.cancel()
    go_on.set()
    assert len(await asyncio.gather(*others)) == 4
    assert first.cancelled()


async def test_keys_of_a_future_that_was_taken_back_are_asked_for_again(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    token = by_key(rsa_key("ours"), "rsa-1")
    await tokens.verify(token)
    clock.step(-86_400)
    assert await tokens.verify(token)
    assert issuer.requests == 2


# --- when the issuer does not answer ---------------------------------------------------------------------


async def test_without_any_key_nobody_can_be_verified_until_the_issuer_answers(
    issuer: Issuer, clock: SteppableClock
) -> None:
    await issuer.stop()
    tokens, token = issuer_tokens(issuer, clock), by_key(rsa_key("ours"), "rsa-1")
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
        await tokens.verify(by_key(rsa_key("theirs"), "made-up"))


async def test_known_keys_serve_for_an_hour_while_the_issuer_is_down(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    token = lasting(rsa_key("ours"), "rsa-1")
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


async def test_an_issuer_that_fails_is_asked_once_in_ten_seconds_while_there_are_keys_to_go_on_with(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock
) -> None:
    token = lasting(rsa_key("ours"), "rsa-1")
    await tokens.verify(token)
    issuer.fails(503)
    clock.step(300)
    for requests in (2, 3, 4):
        await asyncio.gather(*(tokens.verify(token) for _ in range(20)))
        clock.step(9.9)
        assert await tokens.verify(token)
        assert issuer.requests == requests
        clock.step(0.1)


async def test_while_the_issuer_is_down_an_unknown_key_id_is_not_called_wrong(tokens: Tokens, issuer: Issuer) -> None:
    await tokens.verify(by_key(rsa_key("ours"), "rsa-1"))
    issuer.fails(500)
    for _ in range(2):
        with pytest.raises(KeysUnavailable):
            await tokens.verify(by_key(rsa_key("next"), "rsa-2"))
    assert await tokens.verify(by_key(rsa_key("ours"), "rsa-1"))
    assert issuer.requests == 2


async def test_what_is_wrong_without_any_key_is_called_wrong_while_the_issuer_is_down(issuer: Issuer) -> None:
    await issuer.stop()
    for token in ("", "x.y.z", by_secret(claims())):
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
async def test_garbage_counts_as_no_answer_and_spoils_no_key(
    tokens: Tokens, issuer: Issuer, clock: SteppableClock, document: bytes
) -> None:
    issuer.says(document)
    token = lasting(ec_key("ours"), "ec-1")
    with pytest.raises(KeysUnavailable):
        await tokens.verify(token)
    issuer.says(GOOD_DOCUMENT)
    clock.step(1)
    assert await tokens.verify(token)
    issuer.says(document)
    clock.step(300)
    assert await tokens.verify(token)
    assert issuer.requests == 3


async def test_an_answer_may_have_256_kilobytes(tokens: Tokens, issuer: Issuer) -> None:
    issuer.says(GOOD_DOCUMENT.ljust(256 * 1024))
    assert await tokens.verify(by_key(ec_key("ours"), "ec-1"))


async def test_a_compressed_answer_is_not_unpacked(tokens: Tokens, issuer: Issuer) -> None:
    asked_for: list[str] = []

    async def compressed(request: web.Request) -> web.Response:
        asked_for.append(request.headers["Accept-Encoding"])
        answer = web.Response(body=GOOD_DOCUMENT)
        answer.enable_compression(web.ContentCoding.gzip)
        return answer

    issuer.answer = compressed
    with pytest.raises(KeysUnavailable):
        await tokens.verify(by_key(ec_key("ours"), "ec-1"))
    assert asked_for == ["identity"]


@pytest.mark.parametrize("status", [204, 301, 302, 307, 401, 404, 500, 503])
async def test_any_other_status_than_200_counts_as_no_answer(tokens: Tokens, issuer: Issuer, status: int) -> None:
    issuer.fails(status, Location=f"{issuer.url}-elsewhere")
    with pytest.raises(KeysUnavailable):
        await tokens.verify(by_key(ec_key("ours"), "ec-1"))
    assert issuer.requests == 1


async def test_an_answer_that_never_ends_is_not_waited_for(issuer: Issuer) -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            await answer.write(b" ")
            await asyncio.sleep(0.02)

    for answer in (drip, issuer.waits() and issuer.answer):
        issuer.answer = answer
        async with asyncio.timeout(30):
            with pytest.raises(KeysUnavailable):
                await issuer_tokens(issuer, timeout=0.2).verify(by_key(ec_key("ours"), "ec-1"))


async def test_a_server_that_does_not_speak_http_counts_as_no_answer(clock: SteppableClock) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.test ESMTP\r\n")
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for scheme in ("http", "https"):
            keys = JwksKeys(f"{scheme}://127.0.0.1:{port}/keys", clock=clock)
            with pytest.raises(KeysUnavailable):
                await Tokens(keys, clock=clock).verify(by_key(ec_key("ours"), "ec-1"))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/", "keys", "http://", "http://[", "http://a:b/"]
)
async def test_an_address_that_is_none_gives_no_keys(clock: SteppableClock, url: str) -> None:
    with pytest.raises(KeysUnavailable):
        await Tokens(JwksKeys(url, clock=clock), clock=clock).verify(by_key(ec_key("ours"), "ec-1"))


async def test_an_issuer_has_to_prove_its_name_by_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ec_key("tls")
    pem = tmp_path / "issuer.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem.write_bytes(certificate_of(key) + private)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)

    issuer, clock, token = Issuer(), SteppableClock(), by_key(ec_key("ours"), "ec-1")
    issuer.publish(jwk(ec_key("ours"), kid="ec-1"))
    await issuer.start(server)
    try:
        proven, unproven = (f"https://{host}:{issuer.port}/keys" for host in ("localhost", "127.0.0.1"))
        with pytest.raises(KeysUnavailable):
            await Tokens(JwksKeys(proven, clock=clock), clock=clock).verify(token)
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        fresh = ssl_context.__wrapped__()
        assert await Tokens(JwksKeys(proven, clock=clock, timeout=PATIENT, trust=fresh), clock=clock).verify(token)
        with pytest.raises(KeysUnavailable):
            await Tokens(JwksKeys(unproven, clock=clock, trust=fresh), clock=clock).verify(token)
    finally:
        await issuer.close()


async def test_proxies_of_the_environment_are_not_used(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert await tokens.verify(by_key(ec_key("ours"), "ec-1"))


# --- whatever comes --------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["HS256", "RS256", "ES256", "none", "rsa-1", "ada", LATER, "stagecast:service", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def members(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=3), JSON, max_size=6)


HEADERS = members("alg", "kid", "crit", "b64", "typ", "jwk", "jku", "x5c")
PAYLOADS = members("sub", "exp", "nbf", "iat", "aud", "iss", "jti", "scope")


def edited(token: str) -> st.SearchStrategy[str]:
    """The token with some stretch of it replaced."""
    places = st.integers(0, len(token))
    return st.builds(
        lambda start, length, new: token[:start] + new + token[start + length :],
        places,
        st.integers(0, 3),
        st.text(max_size=3) | st.sampled_from(["=", ".", "A", "\x00"]),
    )


async def outcome(tokens: Tokens, token: str) -> Identity | None:
    """The identity, or None where the token was refused; nothing else may happen."""
    try:
        return await tokens.verify(token)
    except (InvalidToken, TokenExpired, KeysUnavailable):
        return None


@PROPERTY
@given(token=st.text() | st.builds(".".join, st.lists(st.text("eyJ0AB_-=", max_size=9), min_size=3, max_size=3)))
def test_any_text_is_refused(token: str) -> None:
    assert asyncio.run(outcome(secret_tokens(), token)) is None


@PROPERTY
@given(token=edited(by_secret(claims())))
def test_an_edited_token_is_refused_unless_it_still_says_the_same(token: str) -> None:
    assert asyncio.run(outcome(secret_tokens(), token)) in (None, asyncio.run(verify(claims())))


@PROPERTY
@given(header=HEADERS, payload=PAYLOADS)
def test_a_signature_makes_no_nonsense_good(header: dict[str, Any], payload: dict[str, Any]) -> None:
    for head in (header, {**header, "alg": "HS256"}, {"alg": "HS256"}):
        for said in (payload, {**payload, "exp": LATER}, {**claims(), **payload}):
            token = raw(json.dumps(head).encode(), json.dumps(said).encode())
            named = asyncio.run(outcome(secret_tokens(), token))
            if named is not None:
                assert named.user_id == str(said["sub"])
                assert named.expires_at == datetime.fromtimestamp(said["exp"], UTC) > NOON


def test_public_keys_refuse_whatever_else_comes_too() -> None:
    whole = {name: by_key(key, name) for name, key in (("rsa-1", rsa_key("ours")), ("ec-1", ec_key("ours")))}
    with asyncio.Runner() as runner:
        context = running_issuer(jwk(rsa_key("ours"), kid="rsa-1"), jwk(ec_key("ours"), kid="ec-1"))
        issuer = runner.run(context.__aenter__())
        tokens = issuer_tokens(issuer)
        honest = runner.run(tokens.verify(whole["rsa-1"]))

        @PROPERTY
        @given(token=st.sampled_from(sorted(whole.values())).flatmap(edited))
        def check_edits(token: str) -> None:
            assert runner.run(outcome(tokens, token)) in (None, honest)

        @PROPERTY
        @given(header=HEADERS, payload=PAYLOADS)
        def check_headers(header: dict[str, Any], payload: dict[str, Any]) -> None:
            for algorithm in ("RS256", "ES256", "HS256"):
                head = {"kid": "rsa-1", **header, "alg": algorithm}
                token = raw(json.dumps(head).encode(), json.dumps({**payload, **claims()}).encode())
                assert runner.run(outcome(tokens, token)) is None

        try:
            check_edits()
            check_headers()
        finally:
            runner.run(context.__aexit__(None, None, None))


def test_whatever_the_issuer_says_nobody_is_taken_for_somebody() -> None:
    forged = by_key(rsa_key("theirs"), "rsa-1", exp=LATER + 86_400 * 365)
    with asyncio.Runner() as runner:
        context = running_issuer()
        issuer, clock = runner.run(context.__aenter__()), SteppableClock()
        tokens = issuer_tokens(issuer, clock)

        @PROPERTY
        @given(
            document=st.binary()
            | st.builds(
                lambda entries: json.dumps({"keys": entries}).encode(),
                JSON
                | st.lists(
                    st.builds(
                        lambda base, odd: {**base, **odd},
                        st.sampled_from([jwk(rsa_key("ours"), kid="rsa-1"), jwk(ec_key("ours"), kid="rsa-1")]),
                        members("kty", "n", "e", "crv", "x", "y", "kid", "use", "alg", "key_ops", "d"),
                    ),
                    max_size=3,
                ),
            )
        )
        def check(document: bytes) -> None:
            issuer.says(document)
            clock.step(7_200)
            assert runner.run(outcome(tokens, forged)) is None

        try:
            check()
        finally:
            runner.run(context.__aexit__(None, None, None))


# --- what is told ----------------------------------------------------------------------------------------


async def test_neither_secrets_nor_tokens_are_told(issuer: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="adapters")
    secret = SecretKey(SECRET)
    clock = SteppableClock()
    address = issuer.url.replace("http://", "http://user:hunter2@") + "?key=hunter2"
    told = [repr(secret), str(secret.key), repr(secret.key), repr(Tokens(secret, clock=clock))]
    good = by_secret(claims(aud="x"))
    refused: list[Refusal] = []
    issuer.fails(500)
    for tokens, token in (
        (Tokens(secret, clock=clock), good),
        (Tokens(secret, clock=clock), good[:-3]),
        (Tokens(secret, clock=clock), by_secret(claims(exp=1))),
        (Tokens(JwksKeys(address, clock=clock, timeout=PATIENT), clock=clock), by_key(rsa_key("ours"), "rsa-1")),
        (Tokens(JwksKeys(address.replace("http", "ftp"), clock=clock), clock=clock), by_key(rsa_key("ours"), "rsa-1")),
    ):
        with pytest.raises(Refusal) as refusal:
            await tokens.verify(token)
        refused.append(refusal.value)
        told += [str(refusal.value), repr(refusal.value), repr(tokens)]
        assert token[-20:] not in caplog.text
    assert [type(each) for each in refused] == [
        *(InvalidToken, InvalidToken, TokenExpired, KeysUnavailable, KeysUnavailable)
    ]
    assert "cannot be fetched: status 500" in caplog.text
    assert "cannot be fetched: UnsupportedProtocol" in caplog.text
    for text in (*told, caplog.text):
        assert SECRET.decode() not in text
        assert part(SECRET) not in text
        assert "hunter2" not in text
