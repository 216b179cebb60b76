"""Calls to paid services: retries that cannot pay twice, and the failure that each error becomes.

A retry is safe only if the provider refused before it did any work: no connection, 429, or 503 with Retry-After. After
any other error the work may have been done and charged.
"""

import asyncio
import json
import logging
import math
import random
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, TypeVar

import httpx2

from adapters.outbound.calls import bounded, compressions, retry_after, ssl_context
from domain.errors import Failure, FailureCode
from domain.ports.providers import Report

T = TypeVar("T")
#: Logs what failed, and the details.
Log = Callable[[str, object], None]

logger = logging.getLogger(__name__)

#: For errors of the operator: a wrong key, an account without credit, an unknown model.
MISCONFIGURED: Final = "The image service does not work with this server's settings. Please tell whoever runs it."

_TRIES: Final = 4
#: The share of the stage's progress that waits for retries may take.
_WAITING: Final = 0.4
#: Seconds; for a longer Retry-After there is no retry.
_MAX_WAIT: Final = 60
#: Characters of a provider's message that are logged.
_MAX_LOGGED: Final = 500
#: The prompt that the current task works on.
PROMPT: Final = ContextVar("PROMPT", default="")
#: Characters in a row of a prompt that no logged message repeats. A shorter prompt is looked for as a whole, unless it
#: is shorter than a word.
_SHARED: Final = 12
_SHORTEST: Final = 4
#: Addresses may be signed, and name pictures.
_URLS: Final = re.compile(r"\b(?:https?|data):[^\s\"'<>]+", re.IGNORECASE)
#: Text that looks like an API key. OpenAI quotes parts of a wrong key.
_KEYS: Final = re.compile(r"\b(?:sk|r8|Bearer)[-_ ][^\s\"',]+", re.IGNORECASE)

#: How many compressions may be nested.
_MAX_CODINGS: Final = 3
#: The start of JSON, of an event stream, or of a picture. No compressed data starts like this.
_PLAIN: Final = re.compile(
    rb'\s*[{\[]\s*[{}"\[\]]|(?:data|event|id|retry): ?|\x89PNG\r\n|\xff\xd8\xff|(?s:RIFF.{4}WEBP)|GIF8'
)


class Declined(Failure):
    """The provider refused before it did any work, so a retry cannot pay twice."""

    def __init__(self, code: FailureCode, *, after: float | None = None) -> None:
        """`after`: seconds, from Retry-After."""
        super().__init__(code)
        self.after = after


async def attempt(call: Callable[[], Awaitable[T]], report: Report, *, within: float, backoff: float = 1) -> T:
    """Return the result of `call`, made at most four times in `within` seconds while it raises `Declined`.

    Before each retry it waits for the Retry-After, plus a random time of up to `backoff` seconds that doubles each
    time (jittered exponential backoff). Each wait is reported. If it would be too long, there is no retry.

    Raises:
        Failure: ``provider_timeout`` after `within` seconds, the last `Declined`, or what `call` raises.
    """
    clock = asyncio.get_running_loop().time
    end, count = clock() + within, 0
    try:
        async with asyncio.timeout_at(end):
            while True:
                try:
                    return await call()
                except Declined as declined:
                    wait = (declined.after or 0) + random.uniform(0, backoff * 2**count)  # noqa: S311 (no secret)
                    count += 1
                    if count == _TRIES or wait > _MAX_WAIT or clock() + wait >= end:
                        raise
                    state = "is busy" if declined.code == "provider_rate_limited" else "cannot be reached"
                message = f"The image service {state}; trying again in {math.ceil(wait)} s."
                await report(_WAITING * count / _TRIES, message, None)
                await asyncio.sleep(wait)
    except TimeoutError:
        raise Failure("provider_timeout") from None


def answered(status: int, headers: Mapping[str, str]) -> Failure:
    """The failure for an unsuccessful response. `headers` are case-insensitive, or have lower-case names."""
    after = retry_after(headers.get("retry-after", ""))
    if status == 429:
        return Declined("provider_rate_limited", after=after)
    if status == 503 and after is not None:
        return Declined("provider_unavailable", after=after)
    if status in (401, 402, 403, 404):
        return Failure("provider_rejected", MISCONFIGURED)
    if 400 <= status < 500:
        return Failure("provider_rejected", retryable=status in (408, 409, 425))
    return Failure("provider_unavailable")


def broken(error: BaseException | None) -> Failure:
    """The failure for a call without a complete or usable response."""
    if isinstance(error, httpx2.ConnectError):
        return Declined("provider_unavailable")
    return Failure("provider_timeout" if isinstance(error, httpx2.TimeoutException) else "provider_unavailable")


def log_problem(provider: str, what: object, message: object = "", *, request_id: str | None, secret: str) -> None:
    """Log a problem with the provider's own message: escaped, truncated, and without keys, URLs and the prompt."""
    logged = []
    for text in map(str, (what, request_id, message)):
        # Keys are replaced before the text is cut, as a part of a key would not be found.
        text = text.replace(secret, "[key]") if secret else text
        text = _URLS.sub("[url]", _KEYS.sub("[key]", text[: _MAX_LOGGED * 2]))[:_MAX_LOGGED]
        logged.append("[it quotes the prompt]" if _quotes(text, PROMPT.get()) else text)
    logger.warning("%s: %a (request %a): %a", provider, *logged)


def _quotes(text: str, prompt: str) -> bool:
    """Whether the text repeats a part of the prompt, as it is or as in JSON."""
    text = text.lower()
    for form in (prompt.lower(), json.dumps(prompt)[1:-1].lower()):
        size = min(_SHARED, max(len(form), _SHORTEST))
        if any(form[start : start + size] in text for start in range(len(form) - size + 1)):
            return True
    return False


def provider_client(
    timeout: float,
    limit: int,
    trust: ssl.SSLContext | None,
    *,
    base_url: str = "",
    headers: Mapping[str, str] = {},
    check: Callable[[httpx2.Request], Awaitable[None]] | None = None,
) -> httpx2.AsyncClient:
    """A client with `timeout` seconds for each network operation, that reads responses of up to `limit` bytes.

    The limit holds before and after each decompression. A larger response, or a damaged one, raises
    `httpx2.DecodingError`. Compression is not requested, but some gateways compress anyway.

    Connections are not reused: a kept-alive one may break under a paid request, which then may have arrived or not.
    Redirects are followed only with a `check`, which gets every request, the first one too, and may raise. Of the
    environment, only proxies and certificates are used.
    """

    async def bound(response: httpx2.Response) -> None:
        codings = compressions(response.headers.get_list("content-encoding"))
        if len(codings) > _MAX_CODINGS:
            raise httpx2.DecodingError("compressed too often")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Bounded(response.stream, limit)
        for coding in reversed(codings):
            response.stream = _Bounded(response.stream, limit, coding)
        response.headers.pop("content-encoding", None)

    return httpx2.AsyncClient(
        base_url=base_url,
        headers={"Accept-Encoding": "identity", **headers},
        timeout=httpx2.Timeout(timeout, connect=min(timeout, 10)),
        limits=httpx2.Limits(max_keepalive_connections=0),
        verify=trust or ssl_context(),
        follow_redirects=check is not None,
        max_redirects=3,
        event_hooks={"request": [check] if check else [], "response": [bound]},
    )


@dataclass
class _Bounded(httpx2.AsyncByteStream):
    """A decompressed body of at most `limit` bytes."""

    stream: httpx2.AsyncByteStream
    limit: int
    coding: str = "identity"

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self.stream)
        first = await anext(chunks, b"")
        # Some gateways decompress a response, and leave its header unchanged.
        coding = "identity" if _PLAIN.match(first) else self.coding
        # httpx2's decoders are reached through a response; they return at most a megabyte at a time.
        body = httpx2.Response(200, headers={"Content-Encoding": coding}, content=joined(first, chunks))
        async for chunk in bounded(body.aiter_bytes(), self.limit):
            yield chunk

    async def aclose(self) -> None:
        await self.stream.aclose()


async def joined(first: bytes, chunks: AsyncIterator[bytes], last: bytes = b"") -> AsyncIterator[bytes]:
    """The chunks with another before and after them."""
    yield first
    async for chunk in chunks:
        yield chunk
    yield last


def same_origin(one: httpx2.URL, other: httpx2.URL) -> bool:
    """Whether both have the same scheme, host and port."""
    return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)


async def download(web: httpx2.AsyncClient, url: httpx2.URL | str, log: Log) -> httpx2.Response:
    """The response with the finished picture, or a redirect.

    Raises:
        Declined: it may be there later; a retry costs nothing.
        Failure: it is not there.
    """
    try:
        response = await web.get(url)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        log(f"the picture could not be fetched: {type(error).__name__}", error)
        failure = broken(error)
        raise (Declined(failure.code) if isinstance(error, httpx2.TransportError) else failure) from None
    if response.status_code == 200 or response.next_request:
        return response
    log(f"the picture was answered with {response.status_code}", "")
    again = response.status_code == 429 or response.status_code >= 500
    raise Declined("provider_unavailable") if again else Failure("provider_unavailable")
