"""The AI stage by OpenAI's image edit endpoint. Needs the extra ``openai``.

The SDK is imported when it is first used, since that takes a second. Nothing about the account is read from the
environment, though the SDK would.
"""

import asyncio
import binascii
import contextlib
import json
import re
import ssl
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import httpx2
from PIL import Image

from adapters.image_work import ImageThreads
from adapters.pillow_codec import Unreadable, decoded, encode, load, opened, reading
from adapters.pillow_intake import MAX_PIXELS
from adapters.provider_attempts import (
    MISCONFIGURED,
    Declined,
    answered,
    attempt,
    broken,
    provider_client,
    tell_operator,
)
from domain.errors import Failure
from domain.orders import Options
from domain.ports import Picture, Report

if TYPE_CHECKING:
    from openai import APIError, AsyncStream
    from openai.resources import AsyncImages
    from openai.types import ImageEditStreamEvent

DEFAULT_MODEL: Final = "gpt-image-2.5-flare"

BASE_URL: Final = "https://api.openai.com/v1"

SIZES: Final = {"2:3": "1024x1536", "1:1": "1024x1024", "3:2": "1536x1024"}

#: These stream, and know quality and background. Of another model, behind another base URL, only what every edit
#: endpoint has is asked.
_GPT_IMAGE: Final = ("gpt-image-", "chatgpt-image-")
#: The models that can be told. Later ones look closely at every input, and refuse the question.
_FIDELITIES: Final[Mapping[str, tuple[str, ...]]] = {"gpt-image-1.5": ("low", "high"), "gpt-image-1-mini": ("low",)}
_PARTIAL_IMAGES: Final = 2

#: Around the user's own words, which stay as they are.
_ANEW: Final = (
    "Make a new picture after the attached sheet, which shows one or more reference pictures on white paper. "
    "Take up their subjects, style and mood; do not copy the sheet, its layout or its white margins. "
    "The new picture is to show:\n\n"
)

#: The shorter side that a picture has at least, in pixels.
_MIN_SIDE: Final = 64
#: The most that is read of one answer, in bytes. Three pictures of 1.5 megapixels that could not be compressed, with
#: transparency, in base64, are 26 MB.
MAX_ANSWER: Final = 32 * 1024 * 1024
#: The longer side of a preview, in pixels.
_PREVIEW: Final = 768

#: Codes of OpenAI's errors.
_CONTENT_RULES: Final = ("moderation_blocked", "content_policy_violation")
_ACCOUNT: Final = ("insufficient_quota", "billing_hard_limit_reached", "model_not_found")
_USER_ERRORS: Final = ("invalid_request_error", "image_generation_user_error")

_AGAINST_THE_RULES: Final = (
    "The image service declined this request because of its content rules. Please change the prompt or the images."
)


class OpenAIEditor:
    """One call of the endpoint for each picture, with the sheet as its image."""

    def __init__(
        self,
        threads: ImageThreads,
        *,
        api_key: str,
        base_url: str | None = None,
        model: str = DEFAULT_MODEL,
        deadline: float,
        backoff: float = 1,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        """`base_url`: OpenAI's own, if none is given. `deadline`: seconds for a picture, with all waits.

        `backoff`: see `attempt`.

        Raises:
            ValueError: `api_key` is empty, or has what no key has: a space, an end of line, a letter beyond ASCII.
        """
        if not re.fullmatch("[!-~]+", api_key):
            # The HTTP library would quote it.
            raise ValueError("The OpenAI API key is printable ASCII without spaces.")
        self._threads = threads
        self._api_key = api_key
        self._base_url = base_url or BASE_URL
        self._model = model
        self._deadline = deadline
        self._backoff = backoff
        self._trust = trust
        self._images: AsyncImages | None = None

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self._make(_request(self._model, sheet, prompt, options), report)

    async def generate(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self._make(_request(self._model, sheet, _ANEW + prompt, options), report)

    async def _make(self, request: dict[str, Any], report: Report) -> Picture:
        call = partial(self._call, request, report)
        return await attempt(call, report, within=self._deadline, backoff=self._backoff)

    def _connect(self) -> "AsyncImages":
        from openai import AsyncOpenAI

        http = provider_client(self._deadline, MAX_ANSWER, self._trust)
        client = AsyncOpenAI(
            api_key=self._api_key, base_url=self._base_url, timeout=http.timeout, max_retries=0, http_client=http
        )
        # These it has taken from the environment, where they are there.
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
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    encoded = await self._last(await response.parse(), report)
                else:
                    encoded = _only(await response.text())
            return await self._threads.run(_checked, encoded)
        except asyncio.CancelledError:
            # The deadline, or somebody who does not want it any more. It may be on the bill.
            self._tell("gave up waiting", "", request_id)
            raise
        except APIError as error:
            outcome = _outcome(error)
            request_id = request_id or getattr(error, "request_id", None)
            what, words = f"{type(error.__cause__ or error).__name__} {error.code or ''}".strip(), error.message
        except httpx2.HTTPError as error:
            outcome = broken(error)
            what, words = type(error).__name__, str(error)
        except (_Unusable, ValueError, RecursionError) as error:
            outcome = Failure("provider_unavailable")
            what, words = "unusable answer", str(error)
        self._tell(what, words, request_id)
        # Out here, so that the SDK's error, which holds the key, is not its context.
        raise outcome

    def _tell(self, what: str, words: str, request_id: str | None) -> None:
        tell_operator("OpenAI", what, words, request_id=request_id, secret=self._api_key)

    async def _last(self, stream: "AsyncStream[ImageEditStreamEvent]", report: Report) -> object:
        """The finished picture, in base64. Those that come before it are reported."""
        previews = 0
        try:
            async for event in stream:
                kind, encoded = str(getattr(event, "type", "")), getattr(event, "b64_json", None)
                if kind.endswith(".completed"):
                    return encoded
                if kind.endswith(".partial_image"):
                    try:
                        preview = await self._threads.run(_preview, encoded)
                    except _Unusable:
                        continue  # A preview is not worth a paid picture.
                    previews += 1
                    message = "The picture takes shape..." if previews == 1 else "Working on the details..."
                    await report(1 - 0.5**previews, message, preview)
            raise _Unusable("the stream ended without a picture")
        finally:
            await _end(stream)


class _Unusable(Exception):
    """A good answer by its status, and no picture in it."""


def _request(model: str, sheet: Picture, prompt: str, options: Options) -> dict[str, Any]:
    """What `openai.types.ImageEditParams` describes. ``auto`` is what is left out."""
    name = "sheet." + sheet.media_type.removeprefix("image/")
    request: dict[str, Any] = {
        "model": model,
        "image": (name, sheet.data, sheet.media_type),
        "prompt": prompt,
        "size": SIZES[options.aspect_ratio],
    }
    if not model.startswith(_GPT_IMAGE):
        return request | {"response_format": "b64_json"}
    # PNG has transparency and loses nothing.
    request |= {"output_format": "png", "stream": True, "partial_images": _PARTIAL_IMAGES}
    if options.quality != "auto":
        request["quality"] = options.quality
    if options.background != "auto":
        request["background"] = options.background
    fidelities = next((known for family, known in _FIDELITIES.items() if model.startswith(family)), ())
    if options.input_fidelity in fidelities:
        request["input_fidelity"] = options.input_fidelity
    return request


async def _end(stream: "AsyncStream[ImageEditStreamEvent]") -> None:
    """Close a stream that may have been left before its end, with the SDK's generators inside one another.

    Else the garbage collector would close each, when there may be no event loop any more to do it in.
    """
    await stream.close()
    with contextlib.suppress(Exception):  # It reads on from what is closed.
        async for _ in stream:
            pass


def _only(text: str) -> object:
    """The picture of an answer that was not streamed, in base64."""
    try:
        return json.loads(text)["data"][0]["b64_json"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _Unusable(text) from None


def _image(encoded: object) -> tuple[bytes, Image.Image]:
    """The bytes and, not yet decoded, the image. Raises `_Unusable`."""
    try:
        data = binascii.a2b_base64(encoded if isinstance(encoded, str) else "", strict_mode=True)
        image = opened(data)
    except (ValueError, Unreadable):
        raise _Unusable("no image") from None
    if min(image.size) < _MIN_SIDE or image.width * image.height > MAX_PIXELS:
        raise _Unusable(f"an image of {image.width} × {image.height} pixels")
    return data, image


def _checked(encoded: object) -> Picture:
    """The picture as it came, with the marks of its origin in it, once it has been decoded."""
    data, image = _image(encoded)
    media_type = Image.MIME[image.format or ""]
    try:
        with reading():
            load(image)
    except Unreadable:
        raise _Unusable("a broken image") from None
    return Picture(data, media_type)


def _preview(encoded: object) -> Picture:
    _, image = _image(encoded)
    try:
        image = decoded(image, near=(_PREVIEW, _PREVIEW))
    except Unreadable:
        raise _Unusable("a broken image") from None
    image.thumbnail((_PREVIEW, _PREVIEW))
    return encode(image, quality=80)


def _outcome(error: "APIError") -> Failure | Declined:
    from openai import APIConnectionError, APIStatusError

    rejected = error.code in _CONTENT_RULES
    if isinstance(error, APIStatusError):
        outcome = answered(error.status_code, error.response.headers)
        if rejected and isinstance(outcome, Failure) and outcome.code == "provider_rejected":
            return Failure("provider_rejected", _AGAINST_THE_RULES)
        if error.code in _ACCOUNT:
            failure = outcome.failure if isinstance(outcome, Declined) else outcome
            return Failure(failure.code, MISCONFIGURED, retryable=False)
        return outcome
    if isinstance(error, APIConnectionError):
        return broken(error.__cause__)
    # It broke off in the middle of a stream, and said why.
    if rejected:
        return Failure("provider_rejected", _AGAINST_THE_RULES)
    if error.code == "rate_limit_exceeded":
        return Failure("provider_rate_limited")
    return Failure("provider_rejected" if error.type in _USER_ERRORS else "provider_unavailable")
