"""Hand-made tokens, keys, and an issuer that publishes a key set over HTTP."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from functools import cache
from typing import Any

import jwt
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from adapters.tokens.jwt_tokens import JwksKeys, SecretKey, Tokens
from domain.identity import Identity
from support.builders import NOON, SteppableClock

SECRET = b"correct-horse-battery-staple-0123456789"

NOW = NOON.timestamp()

LATER = int(NOW) + 60

#: Seconds for a fetch in tests that are not about timeouts.
LONG_TIMEOUT = 30


PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def claims(**others: Any) -> dict[str, Any]:
    return {"sub": "ada", "exp": LATER, **others}


def part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def raw(header: bytes, payload: bytes, secret: bytes = SECRET) -> str:
    """A token with any header and payload, and a valid HS256 signature."""
    signed = f"{part(header)}.{part(payload)}"
    return f"{signed}.{part(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


def hs256_token(payload: Mapping[str, Any], *, secret: bytes = SECRET) -> str:
    return raw(b'{"alg":"HS256","typ":"JWT"}', json.dumps(payload).encode(), secret)


@cache
def rsa_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    """A key; the same one for the same name."""
    return rsa.generate_private_key(65537, bits)


@cache
def ec_key(name: str, curve: type[ec.EllipticCurve] = ec.SECP256R1) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


def jwk(key: PrivateKey, **members: Any) -> dict[str, Any]:
    """The public key as a JWK. Members that are None are left out."""
    entry = (
        RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
        if isinstance(key, rsa.RSAPrivateKey)
        else ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    )
    return {name: value for name, value in {**entry, **members}.items() if value is not None}


def signed_token(key: PrivateKey, kid: str | None = None, **others: Any) -> str:
    algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
    return jwt.encode(claims(**others), key, algorithm, headers={"kid": kid} if kid is not None else None)


class Issuer:
    """An HTTP server with a key set, which counts requests."""

    def __init__(self) -> None:
        self.requests = 0
        self.port = 0
        self.answer: Answer = self._keys
        self._entries: tuple[object, ...] = ()
        app = web.Application()
        app.router.add_get("/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._kept: socket.socket | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/keys"

    def publish(self, *entries: object) -> None:
        self.answer, self._entries = self._keys, entries

    def respond_with(self, body: bytes, **headers: str) -> None:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(body=body, headers=headers)

        self.answer = answer

    def respond_with_error(self, status: int = 500, **headers: str) -> None:
        async def answer(request: web.Request) -> web.Response:
            return web.json_response({"keys": list(self._entries)}, status=status, headers=headers)

        self.answer = answer

    def hold_responses(self) -> tuple[asyncio.Event, asyncio.Event]:
        """Delay responses until the second event is set. The first one is set by a request."""
        asked, go_on = asyncio.Event(), asyncio.Event()

        async def answer(request: web.Request) -> web.StreamResponse:
            asked.set()
            await go_on.wait()
            return await self._keys(request)

        self.answer = answer
        return asked, go_on

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        if self._runner.server is None:
            await self._runner.setup()
        self._give_up_port()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=tls)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Refuse connections. The port is kept, so that no other process listens there."""
        for site in list(self._runner.sites):
            await site.stop()
        self._kept = socket.socket()
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._kept.bind(("127.0.0.1", self.port))

    async def close(self) -> None:
        self._give_up_port()
        await self._runner.cleanup()

    def _give_up_port(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        return await self.answer(request)

    async def _keys(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"keys": list(self._entries)})


@asynccontextmanager
async def running_issuer(*entries: object) -> AsyncIterator[Issuer]:
    issuer = Issuer()
    issuer.publish(*entries)
    await issuer.start()
    try:
        yield issuer
    finally:
        await issuer.close()


def secret_tokens(clock: SteppableClock | None = None, **options: Any) -> Tokens:
    return Tokens(SecretKey(SECRET), clock=clock or SteppableClock(), **options)


async def verify(payload: Mapping[str, Any], **options: Any) -> Identity:
    return await secret_tokens(**options).verify(hs256_token(payload))


def certificate_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A self-signed certificate of this key for localhost."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    return (
        x509.CertificateBuilder(name, name, key.public_key(), 1, datetime(2020, 1, 1), datetime(2100, 1, 1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def issuer_tokens(issuer: Issuer, clock: SteppableClock | None = None, timeout: float = LONG_TIMEOUT) -> Tokens:
    clock = clock or SteppableClock()
    return Tokens(JwksKeys(issuer.url, clock=clock, timeout=timeout), clock=clock)


def long_lived_token(key: PrivateKey, kid: str | None = None) -> str:
    """A token that is valid longer than keys are cached."""
    return signed_token(key, kid, exp=LATER + 86_400)
