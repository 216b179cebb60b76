"""JSON Web Tokens with PyJWT: HS256 with a shared secret, or RS256 and ES256 with an issuer's published keys (JWKS)."""

import asyncio
import base64
import json
import logging
import math
import ssl
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import httpx2
import jwt
from jwt.types import Options

from adapters.outbound.calls import TooLarge, bounded, ssl_context
from domain.identity import Identity, InvalidToken, InvalidUserId, KeysUnavailable, TokenExpired
from domain.identity import user_id as valid_user_id
from domain.ports.system import Clock

logger = logging.getLogger(__name__)

SERVICE_SCOPE: Final = "stagecast:service"

#: In characters.
_MAX_TOKEN: Final = 8 * 1024
#: Tolerance for `nbf` and `iat` from a clock ahead of ours. `exp` gets none, as sockets end exactly then.
_LEEWAY: Final = timedelta(seconds=5)
#: The last second that a `datetime` can represent.
_LAST: Final = 253_402_300_799

# These claims are checked here: PyJWT takes no clock, accepts "1" as a time, and refuses an integer `sub`.
_OPTIONS: Final[Options] = {
    "require": ["exp"],
    "verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_sub": False, "verify_jti": False,
}  # fmt: skip

#: How long fetched keys are used, and how long while the issuer cannot be reached.
_FRESH: Final = timedelta(minutes=5)
_STALE: Final = timedelta(hours=1)
#: How long the issuer is not asked again: for an unknown key id, or after a failure with usable keys, or without any.
_PAUSE: Final = timedelta(seconds=10)
_RETRY: Final = timedelta(seconds=1)
#: In bytes.
_MAX_DOCUMENT: Final = 256 * 1024

#: The algorithms of public keys, and the fewest bits of such a key.
_PUBLIC: Final = {"RS256": 2048, "ES256": 256}


@dataclass(repr=False, eq=False)
class Tokens:
    """Verifies tokens.

    A token must have `exp`, the user id in `user_claim`, and the `audience` and `issuer` if these are configured. If no
    audience is configured, a token with one is refused, as RFC 7519 requires.
    """

    keys: "SecretKey | JwksKeys"
    _: KW_ONLY
    clock: Clock
    user_claim: str = "sub"
    audience: str | None = None
    issuer: str | None = None

    async def verify(self, token: object) -> Identity:
        """The identity in the token.

        Raises:
            InvalidToken
            TokenExpired: the token is valid except for its expiry.
            KeysUnavailable: the issuer's keys are needed and cannot be fetched.
        """
        # Clients may send any JSON value.
        if not isinstance(token, str) or len(token) > _MAX_TOKEN or not token.isascii():
            raise InvalidToken
        try:
            header = jwt.get_unverified_header(token)
            key = await self.keys.find(header.get("alg"), header.get("kid"))
            if key is None:
                raise InvalidToken
            claims = jwt.decode(token, key, [key.algorithm_name], _OPTIONS, audience=self.audience, issuer=self.issuer)
        except jwt.PyJWTError as error:
            if isinstance(error, jwt.InvalidAudienceError) and self.audience is None:
                logger.warning("a token that names an audience was refused, since no audience is configured")
            raise InvalidToken from None
        return self._identity(claims)

    def _identity(self, claims: dict[str, Any]) -> Identity:
        now = self.clock()
        expires_at = _moment(claims["exp"])
        if any(_moment(claims[name]) > now + _LEEWAY for name in ("nbf", "iat") if name in claims):
            raise InvalidToken
        try:
            user = valid_user_id(claims.get(self.user_claim))
        except InvalidUserId:
            raise InvalidToken from None
        if expires_at <= now:
            raise TokenExpired
        scope = claims.get("scope")
        scopes = scope.split(" ") if isinstance(scope, str) else scope if isinstance(scope, list) else []
        return Identity(user, expires_at, SERVICE_SCOPE in scopes)

    def issue(self, user_id: str, *, service: bool, ttl: timedelta) -> str:
        """A token that is valid for `ttl`, rounded up to a whole second. Only with a `SecretKey`.

        Raises:
            InvalidUserId
            ValueError: `ttl` is not positive, or ends after the year 9999.
        """
        assert isinstance(self.keys, SecretKey)
        now = self.clock().timestamp()
        expires = math.ceil(now + ttl.total_seconds())
        if ttl <= timedelta() or expires > _LAST:
            raise ValueError("the time to live must be positive, and end before the year 10000")
        optional = {"aud": self.audience, "iss": self.issuer, "scope": SERVICE_SCOPE if service else None}
        claims = {self.user_claim: valid_user_id(user_id), "iat": int(now), "exp": expires}
        claims |= {name: value for name, value in optional.items() if value is not None}
        return jwt.encode(claims, self.keys.key, "HS256")


def _moment(value: object) -> datetime:
    """Parse a NumericDate. NaN, infinities and milliseconds are out of range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LAST:
        raise InvalidToken
    return datetime.fromtimestamp(value, UTC)


class SecretKey:
    """A secret of at least 32 bytes for HS256. Raises `ValueError` if it is a public key."""

    def __init__(self, secret: bytes) -> None:
        try:
            jwt.encode({}, secret, "HS256")
        except jwt.InvalidKeyError:
            raise ValueError("the secret must not be a public key, a certificate or a JWK") from None
        self.key: Final = jwt.PyJWK({"kty": "oct", "k": base64.urlsafe_b64encode(secret).decode()}, "HS256")

    async def find(self, algorithm: object, kid: str | None) -> jwt.PyJWK | None:
        """The key for a token with this header, or ``None``."""
        return self.key if algorithm == "HS256" else None


@dataclass(repr=False, eq=False)
class JwksKeys:
    """An issuer's public keys for RS256 and ES256, from a JWKS URL (http or https).

    Redirects are not followed, and proxies of the environment are not used.
    """

    url: str
    _: KW_ONLY
    clock: Clock
    #: Seconds for one fetch.
    timeout: float = 5
    trust: ssl.SSLContext = field(default_factory=ssl_context)
    _keys: Sequence[jwt.PyJWK] = field(default=(), init=False)
    #: When they were fetched, when the issuer was last asked, and for how long it is not asked again.
    _fetched: datetime | None = field(default=None, init=False)
    _asked: datetime | None = field(default=None, init=False)
    _pause: timedelta = field(default=timedelta(), init=False)
    _failed: bool = field(default=False, init=False)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def find(self, algorithm: object, kid: str | None) -> jwt.PyJWK | None:
        """The key for a token with this header, or ``None``. May raise `KeysUnavailable`."""
        if algorithm not in tuple(_PUBLIC):
            return None
        key = self._known(algorithm, kid)
        # With a stale key, do not wait for a refresh that is already in progress.
        if self._due(key) and not (key and self._lock.locked()):
            async with self._lock:
                if self._due(self._known(algorithm, kid)):
                    await self._refresh()
            key = self._known(algorithm, kid)
        if key is None and self._failed:
            raise KeysUnavailable
        return key

    def _within(self, age: timedelta, moment: datetime | None) -> bool:
        # Ignore a time in the future: the clock was set back.
        return moment is not None and timedelta() <= self.clock() - moment < age

    def _known(self, algorithm: object, kid: str | None) -> jwt.PyJWK | None:
        if not self._within(_STALE, self._fetched):
            return None
        keys = [key for key in self._keys if key.algorithm_name == algorithm]
        for key in keys:
            if kid is not None and key.key_id == kid:
                return key
        return keys[0] if len(keys) == 1 and None in (kid, keys[0].key_id) else None

    def _due(self, key: jwt.PyJWK | None) -> bool:
        wanted = key is None or not self._within(_FRESH, self._fetched)
        return wanted and not self._within(self._pause, self._asked)

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(self.timeout):
                keys = _usable(await self._fetch())
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RecursionError) as error:
            self._failed = True
            self._pause = _PAUSE if self._within(_STALE, self._fetched) else _RETRY
            # Other messages may contain the URL, or data that the issuer sent.
            reason = error if isinstance(error, _BadResponse | TooLarge) else type(error).__name__
            logger.warning("the issuer's keys cannot be fetched: %s", reason)
        else:
            # Fresh keys were fetched again because of an unknown key id.
            self._pause = _PAUSE if self._within(_FRESH, self._fetched) else timedelta()
            self._keys, self._fetched, self._failed = keys, self.clock(), False
        self._asked = self.clock()

    async def _fetch(self) -> bytes:
        client = httpx2.AsyncClient(trust_env=False, timeout=self.timeout, verify=self.trust)
        # Raw and uncompressed, so that the limit holds for the parsed document.
        async with client, client.stream("GET", self.url, headers={"Accept-Encoding": "identity"}) as response:
            if response.status_code != 200:
                raise _BadResponse(f"status {response.status_code}")
            return b"".join([chunk async for chunk in bounded(response.aiter_raw(), _MAX_DOCUMENT)])


class _BadResponse(ValueError):
    """The issuer's response has no usable keys. The message may be logged."""


def _usable(document: bytes) -> list[jwt.PyJWK]:
    match json.loads(document):
        case {"keys": [*entries]}:
            keys = [key for entry in entries if isinstance(entry, dict) and (key := _public_key(entry))]
            if keys:
                return keys
    raise _BadResponse("no usable key")


def _public_key(entry: dict[str, Any]) -> jwt.PyJWK | None:
    """The key; ``None`` if it is for another algorithm or use, too short, malformed, or contains a private key."""
    operations = entry.get("key_ops", ["verify"])
    to_verify = entry.get("use", "sig") == "sig" and isinstance(operations, list) and "verify" in operations
    known = isinstance(entry.get("kid"), str | None) and entry.get("crv", "P-256") == "P-256"
    if not to_verify or not known or "d" in entry:
        return None
    try:
        key = jwt.PyJWK(entry)
        least = _PUBLIC[key.algorithm_name]
        return key if key.key.key_size >= least else None
    except (jwt.PyJWTError, LookupError, TypeError, ValueError):
        return None
