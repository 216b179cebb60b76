"""Edits and generates pictures with OpenAI's image edit endpoint, or a compatible one.

The SDK is imported on first use, because that takes a second. Unlike the SDK, nothing about the account is read from
the environment.
"""

import asyncio
import codecs
import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import httpx2

from adapters.images.codec import Unreadable
from adapters.images.threads import ImageThreads
from adapters.outbound.url_fetcher import UrlFetcher
from adapters.providers import attempts
from adapters.providers.attempts import Declined, attempt, broken, joined, provider_client, same_origin
from adapters.providers.pictures import candidates, inline, preview, usable
from domain.errors import Failure
from domain.ports.images import Picture
from domain.ports.providers import Report
from domain.requests import Options

if TYPE_CHECKING:
    from openai import AsyncAPIResponse
    from openai.resources import AsyncImages

DEFAULT_MODEL: Final = "gpt-image-2.5-flare"

BASE_URL: Final = "https://api.openai.com/v1"

SIZES: Final = {"2:3": "1024x1536", "1:1": "1024x1024", "3:2": "1536x1024"}

#: Models with streaming, quality and background. Requests to others have only what every edit endpoint supports.
_GPT_IMAGE: Final = ("gpt-image-", "chatgpt-image-")
#: The values of `input_fidelity` by model. Later models always use high fidelity, and refuse the parameter.
_FIDELITIES: Final[Mapping[str, tuple[str, ...]]] = {"gpt-image-1.5": ("low", "high"), "gpt-image-1-mini": ("low",)}
_PARTIAL_IMAGES: Final = 2

#: Put before the user's prompt.
_GENERATE: Final = (
    "Make a new picture after the attached sheet, which shows one or more reference pictures on white paper. "
    "Take up their subjects, style and mood; do not copy the sheet, its layout or its white margins. "
    "The new picture is to show:\n\n"
)

#: The minimum of a picture's shorter side, in pixels.
_MIN_SIDE: Final = 64
#: In bytes. Three incompressible pictures of 1.5 megapixels with transparency are 26 MB in base64.
MAX_ANSWER: Final = 32 * 1024 * 1024
#: How many candidates for the picture are tried.
_MAX_TRIED: Final = 8

#: The start of an event stream, and how many bytes are enough to recognise it.
_STREAM: Final = re.compile(rb"(?:data|event|id|retry)?:")
_STREAM_PREFIX: Final = 6

#: Codes of OpenAI's errors.
_CONTENT_RULES: Final = ("moderation_blocked", "content_policy_violation")
_ACCOUNT: Final = ("insufficient_quota", "billing_hard_limit_reached", "model_not_found")
_USER_ERRORS: Final = ("invalid_request_error", "image_generation_user_error")

_CONTENT_REFUSED: Final = (
    "The image service declined this request because of its content rules. Please change the prompt or the images."
)


@dataclass(repr=False, eq=False)
class OpenAIEditor:
    """`domain.ports.providers.ImageEditor`: one call of the endpoint for each picture, with the sheet as its image.

    Raises:
        ValueError: `api_key` is not valid.
    """

    free = False

    threads: ImageThreads
    #: For pictures on other hosts.
    fetcher: UrlFetcher
    _: KW_ONLY
    #: Printable ASCII without spaces.
    api_key: str
    base_url: str = BASE_URL
    model: str = DEFAULT_MODEL
    #: Seconds for a picture, including all waits.
    deadline: float
    #: See `attempt`.
    backoff: float = 1
    trust: ssl.SSLContext | None = None
    _images: "AsyncImages | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not re.fullmatch("[!-~]+", self.api_key):
            # The HTTP library would quote the key in its error.
            raise ValueError("The OpenAI API key is printable ASCII without spaces.")

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        attempts.PROMPT.set(prompt)
        call = partial(self._call, _request(self.model, sheet, prompt, options), report)
        return await attempt(call, report, within=self.deadline, backoff=self.backoff)

    async def generate(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self.edit(sheet, _GENERATE + prompt, options, report)

    def _connect(self) -> "AsyncImages":
        from openai import AsyncOpenAI

        http = provider_client(self.deadline, MAX_ANSWER, self.trust)
        client = AsyncOpenAI(
            api_key=self.api_key, base_url=self.base_url, timeout=http.timeout, max_retries=0, http_client=http
        )
        # The SDK has read these from the environment.
        client.organization = client.project = client.admin_api_key = client.webhook_secret = None
        client._custom_headers = {}
        return client.images

    async def _call(self, request: dict[str, Any], report: Report) -> Picture:
        if self._images is None:
            self._images = await asyncio.to_thread(self._connect)
        from openai import APIError

        request_id: str | None = None
        try:
            async with self._images.with_streaming_response.edit(**request) as response:
                request_id = response.request_id
                found = await self._read(response, report)
            return await self._picture(found, response.http_request.url.copy_with(userinfo=b""), report, request_id)
        except asyncio.CancelledError:
            # By the deadline or by the user. The call may be charged.
            self._log("gave up waiting", "", request_id)
            raise
        except (APIError, httpx2.HTTPError, Unreadable, ValueError, RecursionError) as error:
            outcome = _outcome(error)
            what = f"{type(error.__cause__ or error).__name__} {getattr(error, 'code', None) or ''}".strip()
            self._log(what, error, request_id or getattr(error, "request_id", None))
        # Outside the except block: the SDK's error, which contains the key, must not become the context.
        raise outcome

    def _log(self, what: str, message: object, request_id: str | None) -> None:
        attempts.log_problem("OpenAI", what, message, request_id=request_id, secret=self.api_key)

    async def _read(self, response: "AsyncAPIResponse[Any]", report: Report) -> list[str | bytes]:
        """The candidates for the finished picture, best first. Reports partial pictures as previews."""
        from openai import APIError

        found: list[str | bytes] = []
        previews = 0
        document: Any = None
        documents = _documents(response)
        try:
            async for name, document in documents:
                if isinstance(document, bytes):
                    return [document]
                if not isinstance(document, dict):
                    document = {"data": document}
                kind = str(document.get("type") or name).rpartition(".")[2]
                if kind == "partial_image":
                    try:
                        shown = await self.threads.run(_preview, document)
                    except Unreadable:
                        continue  # A bad preview must not fail a paid picture.
                    previews += 1
                    message = "The picture takes shape..." if previews == 1 else "Working on the details..."
                    await report(1 - 0.5**previews, message, shown)
                    continue
                # Some gateways send the picture before the ``completed`` event.
                found[:0] = candidates(document)
                if found and kind == "completed":
                    break
                error = document.get("error") or (document if kind == "error" else None)
                if error and not found and name is not None:
                    raise APIError(_message(error), response.http_request, body=error)
        except httpx2.HTTPError:
            if not found:
                raise
        finally:
            # Exhaust the nested generators: the garbage collector might close them after the event loop has ended.
            await response.close()
            with contextlib.suppress(Exception):  # Reading a closed response fails.
                async for _ in documents:
                    pass
        if not found:
            # Only the keys: the values may repeat the prompt.
            names = ", ".join(document) if isinstance(document, dict) else ""
            raise Unreadable(f"no picture in an answer with {names or 'nothing'}. {_message(document)}")
        return found

    async def _picture(
        self, found: Sequence[str | bytes], base: httpx2.URL, report: Report, request_id: str | None
    ) -> Picture:
        """The first candidate that is a picture. Raises `Unreadable`."""
        reasons = []
        for each in found[:_MAX_TRIED]:
            try:
                if isinstance(each, bytes):
                    return await self.threads.run(usable, each, _MIN_SIDE)
                with contextlib.suppress(Unreadable):
                    return await self.threads.run(_inline, each)
                url = _url(each, base)
                get = partial(self._get, url, partial(self._log, request_id=request_id))
                data = await attempt(get, report, within=self.deadline, backoff=self.backoff)
                return await self.threads.run(usable, data, _MIN_SIDE)
            except (Unreadable, Failure) as error:
                reasons.append(each.decode(errors="replace") if isinstance(each, bytes) else str(error))
        raise Unreadable("; ".join(reasons))

    async def _get(self, url: httpx2.URL, log: attempts.Log) -> bytes:
        """The picture at this URL, fetched without the key.

        On the API's own host it is fetched directly; from other hosts, and after a redirect, like users' image URLs.
        """
        if same_origin(url, httpx2.URL(self.base_url)) and not url.userinfo:
            async with provider_client(self.deadline, MAX_ANSWER, self.trust) as web:
                response = await attempts.download(web, url, log)
            if response.next_request is None:
                return response.content
            target = response.next_request.url
            if (url.scheme, target.scheme) == ("https", "http"):
                raise Unreadable("a redirect from https to http")
            url = target
        try:
            return await self.fetcher.download(str(url), MAX_ANSWER)
        except Failure as failure:
            log("the picture could not be fetched", failure.sentence)
            kind = Declined if failure.retryable else Failure
            raise kind("provider_unavailable") from None


def _request(model: str, sheet: Picture, prompt: str, options: Options) -> dict[str, Any]:
    """The request's `openai.types.ImageEditParams`. Options that are ``auto`` are omitted."""
    file = "sheet." + sheet.media_type.removeprefix("image/"), sheet.data, sheet.media_type
    request: dict[str, Any] = {"model": model, "image": file, "prompt": prompt, "size": SIZES[options.aspect_ratio]}
    if not model.startswith(_GPT_IMAGE):
        return request | {"response_format": "b64_json"}
    # PNG is lossless, and has transparency.
    request |= {"output_format": "png", "stream": True, "partial_images": _PARTIAL_IMAGES}
    chosen = {"quality": options.quality, "background": options.background}
    request |= {name: value for name, value in chosen.items() if value != "auto"}
    fidelities = next((known for family, known in _FIDELITIES.items() if model.startswith(family)), ())
    if options.input_fidelity in fidelities:
        request["input_fidelity"] = options.input_fidelity
    return request


async def _documents(response: "AsyncAPIResponse[Any]") -> AsyncIterator[tuple[str | None, Any]]:
    """The JSON values of a response, each with its event's name; ``None`` and one value if it is not a stream.

    A body that is not JSON is yielded as bytes. Whether it is a stream is taken from its start, as gateways send wrong
    media types.
    """
    chunks = response.iter_bytes()
    start = b""
    async for chunk in chunks:
        start = (start + chunk).removeprefix(codecs.BOM_UTF8).lstrip()
        if len(start) >= _STREAM_PREFIX:
            break
    if not _STREAM.match(start):
        document = start + b"".join([chunk async for chunk in chunks])
        with contextlib.suppress(ValueError):
            document = json.loads(document)
        yield None, document
        return

    # httpx2's decoder checks the media type. Some streams do not end their last event.
    media_type, body = {"Content-Type": "text/event-stream"}, joined(start, chunks, b"\n\n")
    stream = httpx2.Response(200, headers=media_type, content=body, request=response.http_request)
    async for event in httpx2.EventSource(stream, max_event_size=None):
        if event.data.startswith("[DONE]"):
            return
        try:
            document = json.loads(event.data)
        except ValueError:
            continue
        yield event.event, document


def _inline(text: str) -> Picture:
    return usable(inline(text), _MIN_SIDE)


def _preview(document: Mapping[str, object]) -> Picture:
    encoded = document.get("partial_image_b64") or next(candidates(document), "")
    return preview(inline(str(encoded)))


def _message(error: object) -> str:
    """The message of an error, or of a response that contains one."""
    if not isinstance(error, dict):
        return error if isinstance(error, str) else ""
    return _message(error.get("message") or error.get("error"))


def _url(text: str, base: httpx2.URL) -> httpx2.URL:
    """The absolute URL of a candidate. Raises `Unreadable`."""
    text = text.strip()
    if not text[:8].lower().startswith(("http://", "https://", "/", "../")):
        raise Unreadable("no image")
    try:
        return base.join(text)
    except (httpx2.InvalidURL, ValueError):
        raise Unreadable("an invalid URL") from None


def _outcome(error: Exception) -> Failure:
    from openai import APIConnectionError, APIError, APIStatusError

    if isinstance(error, APIConnectionError) or not isinstance(error, APIError):
        return broken(error.__cause__ or error)
    refused = Failure("provider_rejected", _CONTENT_REFUSED) if error.code in _CONTENT_RULES else None
    if not isinstance(error, APIStatusError):  # An error event in the middle of a stream.
        if error.code == "rate_limit_exceeded":
            return Failure("provider_rate_limited")
        return refused or Failure("provider_rejected" if error.type in _USER_ERRORS else "provider_unavailable")
    outcome = attempts.answered(error.status_code, error.response.headers)
    if error.code in _ACCOUNT:
        return Failure(outcome.code, attempts.MISCONFIGURED, retryable=False)
    return refused if refused and outcome.code == "provider_rejected" else outcome
