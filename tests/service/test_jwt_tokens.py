"""Verifying tokens: user, expiry and keys. Keys, signatures and the issuer are real."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from adapters.tokens.jwt_tokens import SecretKey, Tokens
from domain.identity import Identity, InvalidToken, InvalidUserId, KeysUnavailable, TokenExpired
from support.builders import NOON, PROPERTY, SteppableClock
from support.jwks_issuer import (
    LATER,
    NOW,
    SECRET,
    claims,
    ec_key,
    hs256_token,
    issuer_tokens,
    jwk,
    part,
    raw,
    rsa_key,
    running_issuer,
    secret_tokens,
    signed_token,
    verify,
)

# --- whom a token names ----------------------------------------------------------------------------------


async def test_token_identifies_its_user_until_it_expires() -> None:
    assert await verify(claims()) == Identity("ada", datetime.fromtimestamp(LATER, UTC), service=False)


async def test_user_id_comes_from_the_configured_claim() -> None:
    named = await verify(claims(sub="somebody else", uid="ada"), user_claim="uid")
    assert named.user_id == "ada"
    with pytest.raises(InvalidToken):
        await verify(claims(), user_claim="uid")


async def test_integer_user_id_is_accepted() -> None:
    assert (await verify(claims(sub=123))).user_id == "123"


async def test_unused_claims_may_have_any_value() -> None:
    assert (await verify(claims(jti=123, sub=["?"], uid="ada", typ=None), user_claim="uid")).user_id == "ada"


@pytest.mark.parametrize(
    "sub", ["", "x" * 129, "a\x00b", "a\nb", "a\x7fb", "\ud800", True, False, 1.5, 10**200, None, ["ada"], {"id": 1}]
)
async def test_an_invalid_user_id_in_a_token_is_rejected(sub: object) -> None:
    with pytest.raises(InvalidToken):
        await verify(claims(sub=sub))


async def test_a_token_without_its_user_claim_is_rejected() -> None:
    with pytest.raises(InvalidToken):
        await verify({"exp": LATER})


@pytest.mark.parametrize(
    "scope",
    ["stagecast:service", "read stagecast:service write", ["read", "stagecast:service"], [{}, "stagecast:service"]],
)
async def test_service_scope_makes_a_service_token(scope: object) -> None:
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
async def test_other_scopes_make_a_user_token(scope: object) -> None:
    assert not (await verify(claims(scope=scope))).service


# --- from when and until when ----------------------------------------------------------------------------


@pytest.mark.parametrize("exp", [LATER, LATER + 0.5])
async def test_a_token_is_accepted_until_it_expires(exp: float) -> None:
    clock, end = SteppableClock(), datetime.fromtimestamp(exp, UTC)
    tokens, token = secret_tokens(clock), hs256_token(claims(exp=exp))
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
async def test_a_token_without_an_expiry_is_rejected(payload: bytes) -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(raw(b'{"alg": "HS256"}', payload))


async def test_token_may_expire_in_the_last_second_of_year_9999() -> None:
    assert (await verify(claims(exp=253402300799))).expires_at == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


@pytest.mark.parametrize("year", [1971, 2500])
async def test_time_comes_from_the_given_clock(year: int) -> None:
    clock = SteppableClock(datetime(year, 1, 1, tzinfo=UTC))
    now = clock().timestamp()
    assert await verify(claims(nbf=now, iat=now, exp=now + 60), clock=clock)
    with pytest.raises(InvalidToken):
        await verify(claims(nbf=now + 60, exp=now + 60), clock=clock)
    with pytest.raises(TokenExpired):
        await verify(claims(exp=now), clock=clock)


@pytest.mark.parametrize("claim", ["nbf", "iat"])
async def test_issuer_clock_may_be_five_seconds_ahead(claim: str) -> None:
    assert await verify(claims(**{claim: NOW + 4.9}))
    with pytest.raises(InvalidToken):
        await verify(claims(**{claim: NOW + 5.1}))


@pytest.mark.parametrize("claim", ["nbf", "iat"])
@pytest.mark.parametrize("value", [None, True, "0", "soon", [], -1, 10**30])
async def test_an_invalid_nbf_is_rejected(claim: str, value: object) -> None:
    with pytest.raises(InvalidToken):
        await verify(claims(**{claim: value}))


async def test_token_expired_is_raised_only_if_nothing_else_is_wrong() -> None:
    expired = claims(exp=int(NOW) - 1)
    with pytest.raises(TokenExpired):
        await verify(expired)
    for wrong in ({**expired, "sub": ""}, {**expired, "aud": "others"}, {**expired, "nbf": LATER}):
        with pytest.raises(InvalidToken):
            await verify(wrong)
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(hs256_token(expired, secret=b"x" * 32))


# --- for whom and by whom --------------------------------------------------------------------------------


@pytest.mark.parametrize("aud", ["stagecast", ["others", "stagecast"]])
async def test_a_token_for_the_configured_audience_is_accepted(aud: object) -> None:
    assert await verify(claims(aud=aud), audience="stagecast")


@pytest.mark.parametrize("others", [{}, {"aud": "others"}, {"aud": []}, {"aud": [1]}, {"aud": {"stagecast": 1}}])
async def test_a_token_for_another_audience_is_rejected(others: dict[str, Any]) -> None:
    with pytest.raises(InvalidToken):
        await verify(claims(**others), audience="stagecast")


async def test_token_with_an_audience_is_refused_and_logged_if_none_is_configured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(hs256_token(claims(aud="stagecast")))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no audience is configured" in caplog.text


async def test_only_tokens_of_the_configured_issuer_are_accepted() -> None:
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
        hs256_token(claims()) + "\n",
        hs256_token(claims()) + ".x",
        hs256_token(claims()).replace(".", " ."),
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
async def test_a_malformed_token_is_rejected(token: str) -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(token)


@pytest.mark.parametrize("value", [None, b"", hs256_token(claims()).encode(), 1, ["x"], {}])
async def test_a_token_that_is_not_text_is_rejected(value: Any) -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(value)


async def test_token_over_eight_kilobytes_is_refused() -> None:
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
async def test_secret_verifies_only_hs256(algorithm: str) -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(jwt.encode(claims(), SECRET, algorithm))


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", ""])
@pytest.mark.parametrize("signature", ["", "x", "AAAA"])
async def test_unsigned_token_is_refused(algorithm: str, signature: str) -> None:
    header = json.dumps({"alg": algorithm}).encode()
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(f"{part(header)}.{part(json.dumps(claims()).encode())}.{signature}")


async def test_token_of_another_secret_is_refused() -> None:
    with pytest.raises(InvalidToken):
        await secret_tokens().verify(hs256_token(claims(), secret=SECRET[:-1] + b"!"))


def test_a_public_key_is_refused_as_secret() -> None:
    public = rsa_key("ours").public_key()
    for secret in (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(jwk(rsa_key("ours"))).encode(),
    ):
        with pytest.raises(ValueError, match="must not be a public key"):
            SecretKey(secret)


# --- tokens of our own -----------------------------------------------------------------------------------


async def test_issued_token_is_valid_for_its_lifetime() -> None:
    clock = SteppableClock()
    tokens = secret_tokens(clock)
    token = tokens.issue("ada", service=False, ttl=timedelta(seconds=60))
    assert (await tokens.verify(token)).user_id == "ada"
    clock.step(60)
    assert await tokens.verify(token)
    clock.step(1)
    with pytest.raises(TokenExpired):
        await tokens.verify(token)


@pytest.mark.parametrize("service", [True, False])
async def test_issued_token_has_the_service_scope_if_requested(service: bool) -> None:
    token = secret_tokens().issue("ada", service=service, ttl=timedelta(hours=1))
    assert (await secret_tokens().verify(token)).service is service


async def test_issued_token_matches_the_configured_claims() -> None:
    options: dict[str, Any] = {"user_claim": "uid", "audience": "stagecast", "issuer": "us"}
    token = secret_tokens(**options).issue("çağla 😀", service=False, ttl=timedelta(hours=1))
    assert (await secret_tokens(**options).verify(token)).user_id == "çağla 😀"


@pytest.mark.parametrize("ttl", [timedelta(), timedelta(seconds=-1), timedelta(days=365 * 9000), timedelta.max])
def test_an_issued_token_needs_a_positive_lifetime(ttl: timedelta) -> None:
    with pytest.raises(ValueError, match="time to live"):
        secret_tokens().issue("ada", service=False, ttl=ttl)


@pytest.mark.parametrize("user_id", ["", "x" * 129, "a\x00", "\ud800"])
def test_no_token_is_issued_for_an_invalid_user_id(user_id: str) -> None:
    with pytest.raises(InvalidUserId):
        secret_tokens().issue(user_id, service=False, ttl=timedelta(hours=1))


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
    """The token with a random part replaced."""
    places = st.integers(0, len(token))
    return st.builds(
        lambda start, length, new: token[:start] + new + token[start + length :],
        places,
        st.integers(0, 3),
        st.text(max_size=3) | st.sampled_from(["=", ".", "A", "\x00"]),
    )


async def outcome(tokens: Tokens, token: str) -> Identity | None:
    """The identity, or None if the token is refused; other exceptions fail the test."""
    try:
        return await tokens.verify(token)
    except (InvalidToken, TokenExpired, KeysUnavailable):
        return None


@PROPERTY
@given(token=st.text() | st.builds(".".join, st.lists(st.text("eyJ0AB_-=", max_size=9), min_size=3, max_size=3)))
def test_random_text_is_rejected(token: str) -> None:
    assert asyncio.run(outcome(secret_tokens(), token)) is None


@PROPERTY
@given(token=edited(hs256_token(claims())))
def test_an_edited_token_is_rejected_unless_it_decodes_the_same(token: str) -> None:
    assert asyncio.run(outcome(secret_tokens(), token)) in (None, asyncio.run(verify(claims())))


@PROPERTY
@given(header=HEADERS, payload=PAYLOADS)
def test_a_signed_malformed_token_is_rejected(header: dict[str, Any], payload: dict[str, Any]) -> None:
    for head in (header, {**header, "alg": "HS256"}, {"alg": "HS256"}):
        for said in (payload, {**payload, "exp": LATER}, {**claims(), **payload}):
            token = raw(json.dumps(head).encode(), json.dumps(said).encode())
            named = asyncio.run(outcome(secret_tokens(), token))
            if named is not None:
                assert named.user_id == str(said["sub"])
                assert named.expires_at == datetime.fromtimestamp(said["exp"], UTC) > NOON


def test_public_keys_are_refused_in_any_form() -> None:
    whole = {name: signed_token(key, name) for name, key in (("rsa-1", rsa_key("ours")), ("ec-1", ec_key("ours")))}
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


def test_no_answer_of_an_issuer_makes_an_invalid_token_valid() -> None:
    forged = signed_token(rsa_key("theirs"), "rsa-1", exp=LATER + 86_400 * 365)
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
            issuer.respond_with(document)
            clock.step(7_200)
            assert runner.run(outcome(tokens, forged)) is None

        try:
            check()
        finally:
            runner.run(context.__aexit__(None, None, None))
