"""How paid services are called: one attempt per call that may cost money, and what a call that failed comes to.

Asking again is safe only where the provider refused before it worked: no connection, 429, 503 with Retry-After.
After anything else nobody knows whether the work was done and paid for.
"""

import asyncio
import logging
import math
import random
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, TypeVar

import httpx2

from adapters.outbound.content_coding import compressions
from adapters.outbound.retry_after import retry_after
from adapters.outbound.tls import ssl_context
from domain.errors import Failure
from domain.ports import Report

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: For what the user cannot help: a wrong key, an account without money, a model that is not there.
MISCONFIGURED: Final = "The image service does not work with this server's settings. Please tell whoever runs it."

#: What of the stage's progress the waits may take; the rest is for the work itself.
_WAITING: Final = 0.4
#: Retry-After beyond this many seconds is longer than a person would want to watch.
_MAX_WAIT: Final = 60
#: Of a provider's words, in characters.
_MAX_WORDS: Final = 500
#: What looks like a key, whoever's it is: OpenAI quotes a wrong one in part.
_KEYS: Final = re.compile(r"\b(?:sk|r8|Bearer)[-_ ][^\s\"',]+", re.IGNORECASE)

#: What httpx2 can decompress, and how many times over it is done.
_DECODABLE: Final = frozenset(("gzip", "deflate", "br", "zstd"))
_MAX_CODINGS: Final = 3
#: The beginning of JSON, of an event stream, or of a picture. Nothing compressed begins like this.
_PLAIN: Final = re.compile(
    rb'\s*[{\[]\s*[{}"\[\]]|(?:data|event|id|retry): ?|\x89PNG\r\n|\xff\xd8\xff|(?s:RIFF.{4}WEBP)|GIF8'
)


class Declined(Exception):
    """The provider refused before it worked, so asking again cannot pay twice."""

    def __init__(self, failure: Failure, *, after: float | None = None) -> None:
        """`failure`: what it comes to when nobody asks again. `after`: seconds, from Retry-After."""
        super().__init__(str(failure))
        self.failure = failure
        self.after = after


async def attempt(
    call: Callable[[], Awaitable[T]], report: Report, *, within: float, tries: int = 4, backoff: float = 1
) -> T:
    """What `call` returns. Where it is `Declined` it is made again, `tries` times at most, all in `within` seconds.

    Before each repetition it waits for what the provider asked, and for a random time on top: up to `backoff`
    seconds, twice as much each time. Every wait is reported. One that is too long is not begun.

    Raises:
        Failure: ``provider_timeout`` after `within` seconds, that of the last `Declined`, or what `call` raises.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + within
    try:
        async with asyncio.timeout_at(end):
            for count in range(1, tries + 1):
                try:
                    return await call()
                except Declined as error:
                    declined = error
                wait = (declined.after or 0) + random.uniform(0, backoff * 2 ** (count - 1))  # noqa: S311 (no secret)
                if count == tries or wait > _MAX_WAIT or clock() + wait >= end:
                    break
                await report(_WAITING * count / tries, _waiting(declined.failure, wait), None)
                await asyncio.sleep(wait)
    except TimeoutError:
        raise Failure("provider_timeout") from None
    raise declined.failure


def _waiting(failure: Failure, seconds: float) -> str:
    state = "is busy" if failure.code == "provider_rate_limited" else "cannot be reached"
    return f"The image service {state}; trying again in {math.ceil(seconds)} s."


def answered(status: int, headers: Mapping[str, str]) -> Failure | Declined:
    """What an answer that is no success comes to. `headers`: found in any case, or in lower case."""
    after = retry_after(headers.get("retry-after", ""))
    if status == 429:
        return Declined(Failure("provider_rate_limited"), after=after)
    if status == 503 and after is not None:
        return Declined(Failure("provider_unavailable"), after=after)
    if status in (401, 402, 403, 404):
        return Failure("provider_rejected", MISCONFIGURED)
    if 400 <= status < 500:
        return Failure("provider_rejected", retryable=status in (408, 409, 425))
    return Failure("provider_unavailable")


def broken(error: BaseException | None) -> Failure | Declined:
    """What a call comes to that brought no whole answer; `error` is what httpx2 raised."""
    if isinstance(error, httpx2.ConnectError):
        return Declined(Failure("provider_unavailable"))
    return Failure("provider_timeout" if isinstance(error, httpx2.TimeoutException) else "provider_unavailable")


def tell_operator(provider: str, what: object, words: object = "", *, request_id: str | None, secret: str) -> None:
    """Log what went wrong in a provider's own words: escaped, short, and without the key."""
    told = (_without_keys(str(text), secret)[:_MAX_WORDS] for text in (what, request_id, words))
    logger.warning("%s: %a (request %a): %a", provider, *told)


def _without_keys(text: str, secret: str) -> str:
    # The key goes first: once the text is cut, what is left of a key would not be found.
    text = text.replace(secret, "[key]") if secret else text
    return _KEYS.sub("[key]", text[: _MAX_WORDS * 2])


def provider_client(
    timeout: float,
    limit: int,
    trust: ssl.SSLContext | None = None,
    *,
    base_url: httpx2.URL | str = "",
    headers: Mapping[str, str] | None = None,
) -> httpx2.AsyncClient:
    """Calls with this client have `timeout` seconds for each step, and read answers up to `limit` bytes.

    The limit is for the bytes that arrive, and again for those that each decompression makes of them. An answer that
    is larger, or cannot be decompressed, is a `httpx2.DecodingError`. Compression is not asked for, but some gateways
    compress anyway.

    Every call has a connection of its own: one kept from earlier may break just when a paid request is on it, and
    nobody would know whether it arrived. Redirects are not followed, or the call would be made twice. The
    environment has a say in the way out (proxies, certificates), and in nothing else.
    """

    async def bound(response: httpx2.Response) -> None:
        codings = compressions(response.headers.get_list("content-encoding"))
        if len(codings) > _MAX_CODINGS or not _DECODABLE.issuperset(codings):
            raise httpx2.DecodingError(f"compressed by {', '.join(codings)[:100]}")
        if int(response.headers.get("content-length", 0)) > limit:
            raise httpx2.DecodingError(f"larger than {limit} bytes")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Bounded(response.stream, limit)
        for coding in reversed(codings):
            response.stream = _Bounded(response.stream, limit, coding)
        response.headers.pop("content-encoding", None)

    return httpx2.AsyncClient(
        base_url=base_url,
        headers={"Accept-Encoding": "identity", **(headers or {})},
        timeout=httpx2.Timeout(timeout, connect=min(timeout, 10)),
        limits=httpx2.Limits(max_keepalive_connections=0),
        verify=trust or ssl_context(),
        follow_redirects=False,
        event_hooks={"response": [bound]},
    )


class _Bounded(httpx2.AsyncByteStream):
    """A body, decompressed, of `limit` bytes at most; more of it is not read."""

    def __init__(self, stream: httpx2.AsyncByteStream, limit: int, coding: str = "identity") -> None:
        self._stream = stream
        self._limit = limit
        self._coding = coding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces = aiter(self._stream)
        first = await anext(pieces, b"")

        async def whole() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        # Some gateways decompress an answer and leave the header as it was.
        coding = "identity" if _PLAIN.match(first) else self._coding
        # A response of its own, since that is how httpx2 decompresses: in steps of a megabyte at most.
        body = httpx2.Response(200, headers={"Content-Encoding": coding}, content=whole())
        left = self._limit
        async for piece in body.aiter_bytes():
            left -= len(piece)
            if left < 0:
                raise httpx2.DecodingError(f"larger than {self._limit} bytes")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


async def download(web: httpx2.AsyncClient, url: httpx2.URL, log: Callable[[str, object], None]) -> bytes | str:
    """The paid picture that is at this URL, or the address that it redirects to. `log` is for the operator.

    Raises:
        Declined: it may be there later. To ask again costs nothing.
        Failure: it is not there.
    """
    try:
        async with web.stream("GET", url) as response:
            if response.has_redirect_location:
                return str(response.headers["location"])
            body = await response.aread()
    except httpx2.HTTPError as error:
        log(f"the picture could not be fetched: {type(error).__name__}", error)
        failed = broken(error)
        if isinstance(failed, Failure) and isinstance(error, httpx2.TransportError):
            failed = Declined(failed)
        raise failed from None
    if response.status_code == 200:
        return body
    log(f"the picture was answered with {response.status_code}", "")
    failure = Failure("provider_unavailable")
    raise Declined(failure) if response.status_code == 429 or response.status_code >= 500 else failure
