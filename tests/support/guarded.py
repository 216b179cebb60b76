"""A service that asks for tokens, tokens for it, and clients that present them."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import jwt
import websockets

from support.asyncapi import check_message
from support.harness import JSON, Running, frames_until_close, running

SECRET: Final = "correct-horse-battery-staple-0123456789"

MISSING: Final = "edit_1763829000123_k3v9x2ab4c6d8e0f"

#: In the year 2096: good by the real clock, and by one that stands still.
GOOD: Final = 4_000_000_000


def token(sub: object = "ada", *, exp: float = GOOD, secret: str = SECRET, **claims: Any) -> str:
    return jwt.encode({"sub": sub, "exp": exp, **claims}, secret, "HS256")


SERVICE: Final = token("backend", scope="read stagecast:service")

EXPIRED: Final = token(exp=1)


@asynccontextmanager
async def guarded(images: Path, service_token: str = SERVICE, **rest: Any) -> AsyncIterator[Running]:
    """A service that asks for tokens. The harness calls it with a service token."""
    keys: JSON = {} if "jwks_url" in rest else {"jwt_secret": SECRET}
    async with running(images, **keys, **rest) as service:
        service.http.headers["Authorization"] = f"Bearer {service_token}"
        yield service


async def ask(service: Running, bearer: str | None, path: str = "/me", method: str = "GET", **rest: Any) -> Any:
    """The answer to a request with this token, or with none."""
    request = service.http.build_request(method, path, **rest)
    if bearer is None:
        del request.headers["Authorization"]
    else:
        request.headers["Authorization"] = f"Bearer {bearer}"
    return await service.http.send(request)


class FrameClient:
    """Socket.IO on a bare WebSocket: it keeps every frame, in order, and reconnects to nothing."""

    def __init__(self, connection: websockets.ClientConnection) -> None:
        self.connection = connection
        self.frames: list[str] = []
        self._numbers = itertools.count()

    async def next(self) -> str:
        frame = str(await asyncio.wait_for(self.connection.recv(), 30))
        self.frames.append(frame)
        if frame.startswith("42["):
            check_message(*json.loads(frame[2:])[:2])
        return frame

    async def hello(self, auth: object = None) -> str:
        """Say CONNECT, and return what is answered."""
        await self.connection.send("40" if auth is None else f"40{json.dumps(auth)}")
        return await self.next()

    async def say(self, name: str, argument: object) -> str:
        """Send an event, and return how its ack will begin."""
        number = next(self._numbers)
        await self.connection.send(f"42{number}{json.dumps([name, argument])}")
        return f"43{number}["

    async def ack(self, beginning: str) -> JSON:
        while True:
            for frame in self.frames:
                if frame.startswith(beginning):
                    [ack] = json.loads(frame[len(beginning) - 1 :])
                    assert isinstance(ack, dict)
                    return ack
            await self.next()

    async def call(self, name: str, argument: object) -> JSON:
        return await self.ack(await self.say(name, argument))

    async def authenticate(self, **argument: object) -> JSON:
        return await self.call("authenticate", argument)

    def events(self, frames: Iterable[str] | None = None) -> list[list[Any]]:
        """Each as it came: name, data, and mostly a cursor."""
        return [json.loads(frame[2:]) for frame in frames or self.frames if frame.startswith("42[")]

    def sequences(self, generation_id: str) -> list[int]:
        return [each[1]["sequence"] for each in self.events() if each[1].get("generationId") == generation_id]

    async def until(self, generation_id: str, sequence: int) -> None:
        while sequence not in self.sequences(generation_id):
            await self.next()

    async def until_over(self, generation_id: str) -> None:
        await self.until(generation_id, 6)

    async def closed(self) -> None:
        """Wait until the other side has closed the transport. It never says DISCONNECT."""
        self.frames += await frames_until_close(self.connection)
        assert not [frame for frame in self.frames if frame.startswith("41")], "DISCONNECT was sent"


@asynccontextmanager
async def wire(service: Running, auth: object = None, *, hello: bool = True) -> AsyncIterator[FrameClient]:
    """A bare client that has connected."""
    connection = await service.raw()
    try:
        bare = FrameClient(connection)
        if hello:
            assert (await bare.hello(auth)).startswith('40{"sid"')
        yield bare
    finally:
        await connection.close()


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
