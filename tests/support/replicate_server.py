"""A local server with Replicate's HTTP API for predictions, which fails in the ways that a test asks for."""

import asyncio
import json
import socket
import ssl
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any, Final, NamedTuple

from aiohttp import web

TOKEN: Final = "r8_" + "n0b0dyMayReadTh1s" * 2
#: Part of every message of the server; may only appear in the log.
WORDS: Final = "cog: /src/predict.py, worker 7 at 43%"

#: By model: its version if it is a community model, and the names of its inputs.
MODELS: Final[Mapping[str, tuple[str | None, tuple[str, str]]]] = {
    "cdingram/face-swap": (
        "d1d6ea8c8be89d664a07a457526f7128109dee7030fdac424788d762c71ed111",
        ("input_image", "swap_image"),
    ),
    "lucataco/faceswap": (
        "9a4298548422074c3f57258c5d544497314ae4112df80d116f0d2109e843d20d",
        ("target_image", "swap_image"),
    ),
    "someone/official-swap": (None, ("input_image", "swap_image")),
}

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Seen(NamedTuple):
    """One complete request."""

    #: ``create``, ``poll``, ``cancel``, ``upload`` or ``output``.
    what: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Replicate:
    """The server, with its behaviour and the requests that it got."""

    port: int = 0
    #: The content of ``/output/…``.
    picture: bytes = b""
    #: The statuses in the responses to the create and the polls, in turn; the last one repeats.
    statuses: Sequence[str] = ("starting", "processing", "succeeded")
    output: Any = None
    error: str | None = None
    #: By kind of request, what is done instead of the normal response, in turn.
    acts: dict[str, Iterator[Answer]] = field(default_factory=lambda: defaultdict(lambda: iter(())))
    #: The base of the URLs in responses, if it is another one.
    elsewhere: str | None = None
    seen: list[Seen] = field(default_factory=list)
    uploads: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Releases `held` responses.
    released: asyncio.Event = field(default_factory=asyncio.Event)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.origin}/v1"

    def will(self, what: str, *answers: Answer) -> None:
        """Set what is done for the next requests of this kind, one each."""
        self.acts[what] = iter(answers)

    def asked(self, what: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.what == what]

    def count(self, what: str) -> int:
        return len(self.asked(what))

    async def until_asked(self, what: str, times: int = 1) -> None:
        """Wait until this many requests of this kind have arrived in total."""
        while self.count(what) < times:
            self._news.clear()
            await self._news.wait()

    # --- the API

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "owner" in request.match_info:
            name = "{owner}/{name}".format(**request.match_info)
            if MODELS.get(name, ("none",))[0] is not None:
                return problem(404, "The requested resource could not be found.")
        else:
            known = {version: name for name, (version, _) in MODELS.items() if version}
            if body.get("version") not in known:
                return problem(422, "Invalid version or not permitted")
            name = known[body["version"]]
        missing = [each for each in MODELS[name][1] if each not in body["input"]]
        if missing:
            return problem(422, f"- input: {missing[0]} is required")
        ident = f"p{len(self.predictions)}rediction"
        self.predictions[ident] = {"model": name, "input": body["input"], "told": 0}
        return web.json_response(self.report(ident), status=201)

    async def poll(self, request: web.Request) -> web.StreamResponse:
        ident = request.match_info["id"]
        if ident not in self.predictions:
            return problem(404, "The requested resource could not be found.")
        return web.json_response(self.report(ident))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        ident = request.match_info["id"]
        if ident not in self.predictions:
            return problem(404, "The requested resource could not be found.")
        self.statuses = ("canceled",)
        return web.json_response(self.report(ident))

    async def upload(self, request: web.Request) -> web.StreamResponse:
        head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
        [content] = BytesParser(policy=HTTP).parsebytes(head + await request.read()).iter_parts()
        if content.get_param("name", header="Content-Disposition") != "content" or not content.get_filename():
            return problem(400, "Missing content")
        ident = f"f{len(self.uploads)}ile"
        self.uploads[f"{self.url}/files/{ident}"] = content.get_content_type(), content.get_content()
        return web.json_response({"id": ident, "urls": {"get": f"{self.url}/files/{ident}"}}, status=201)

    async def deliver(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self.picture, content_type="image/png")

    def report(self, ident: str) -> dict[str, Any]:
        prediction = self.predictions[ident]
        status = self.statuses[min(prediction["told"], len(self.statuses) - 1)]
        prediction["told"] += 1
        urls = f"{self.elsewhere or self.url}/predictions/{ident}"
        output = f"{self.origin}/output/out.png" if self.output is None else self.output
        return {
            "id": ident,
            "model": prediction["model"],
            "version": MODELS[prediction["model"]][0] or "hidden",
            "input": prediction["input"],
            "logs": WORDS,
            "output": output if status == "succeeded" else None,
            "error": self.error if status == "failed" else None,
            "status": status,
            "created_at": "2026-11-22T17:30:00.123Z",
            "data_removed": False,
            "urls": {"get": urls, "cancel": f"{urls}/cancel", "web": "https://replicate.com/p/" + ident},
        }

    # --- the serving

    def _route(self, what: str, handler: Answer) -> Answer:
        async def serve(request: web.Request) -> web.StreamResponse:
            self.seen.append(Seen(what, request.path, request.headers, await request.read()))
            self._news.set()
            act = next(self.acts[what], None)
            if act is not None:
                return await act(request)
            if what != "output" and request.headers.get("Authorization") != f"Bearer {TOKEN}":
                return problem(401, "You did not pass a valid authentication token")
            return await handler(request)

        return serve

    @asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None) -> AsyncIterator["Replicate"]:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/predictions", self._route("create", self.create))
        app.router.add_post("/v1/models/{owner}/{name}/predictions", self._route("create", self.create))
        app.router.add_get("/v1/predictions/{id}", self._route("poll", self.poll))
        app.router.add_post("/v1/predictions/{id}/cancel", self._route("cancel", self.cancel))
        app.router.add_post("/v1/files", self._route("upload", self.upload))
        app.router.add_route("*", "/{path:.*}", self._route("output", self.deliver))
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
            await site.start()
            self.port = runner.addresses[0][1]
            yield self
        finally:
            await runner.cleanup()


# --- what may happen instead of an answer ------------------------------------------------------------------


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """An error in the shape of Replicate's."""
    return web.json_response({"title": WORDS, "detail": detail, "status": status}, status=status, headers=headers)


def refusal(status: int, **headers: str) -> Answer:
    """An error response. Header names have underscores for hyphens."""

    async def refuse(request: web.Request) -> web.StreamResponse:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        # Some services quote a wrong key.
        return problem(status, f"No: {request.headers.get('Authorization')}", names)

    return refuse


def page(body: bytes, content_type: str = "text/html", status: int = 200, **headers: str) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=content_type, status=status, headers=headers)

    return answer


def redirect(to: str) -> Answer:
    return page(b"", status=302, Location=to)


async def reset(request: web.Request) -> web.StreamResponse:
    """Close the connection after reading the request."""
    assert request.transport is not None
    line = request.transport.get_extra_info("socket")
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
    return web.Response()


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def drip(request: web.Request) -> web.StreamResponse:
    """Send single bytes, endlessly."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.005)


async def flood(request: web.Request) -> web.StreamResponse:
    """Send megabytes, endlessly."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(bytes(1 << 20))


async def flood_with_length(request: web.Request) -> web.StreamResponse:
    """Send 100 MB with a Content-Length."""
    response = web.StreamResponse(headers={"Content-Length": str(100 << 20)})
    await response.prepare(request)
    for _ in range(100):
        await response.write(bytes(1 << 20))
    return response


def held(replicate: Replicate, handler: Answer) -> Answer:
    """A response that waits for `release`."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await replicate.released.wait()
        return await handler(request)

    return answer
