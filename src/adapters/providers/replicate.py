"""Face swap with a model on Replicate, over its HTTP API.

A prediction is created once, as after a lost response it may run and be charged. All other requests cost nothing and
are retried. An abandoned prediction is cancelled; if that request fails, Replicate ends it by itself
(``Cancel-After``). Of the URLs in its responses only the output's is used.
"""

import asyncio
import base64
import codecs
import math
import re
import ssl
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Annotated, Any, Final, TypeVar

import httpx2
from pydantic import AliasPath, BaseModel, Field, JsonValue, ValidationError

from adapters.images.codec import Unreadable
from adapters.images.threads import ImageThreads
from adapters.providers import attempts
from adapters.providers.attempts import Declined, attempt, broken, provider_client, same_origin
from adapters.providers.pictures import candidates, inline, usable
from domain.errors import Failure
from domain.ports.images import Picture
from domain.ports.providers import Report

#: The most used model. Community models need a version.
DEFAULT_MODEL: Final = "cdingram/face-swap:d1d6ea8c8be89d664a07a457526f7128109dee7030fdac424788d762c71ed111"
BASE_URL: Final = "https://api.replicate.com/v1"
#: Replicate's hosts for outputs, including subdomains.
OUTPUT_HOSTS: Final = ("replicate.delivery",)

#: Pictures up to this size, in bytes, are sent as data URLs, as Replicate recommends; larger ones are uploaded as
#: files, which Replicate keeps for a day.
MAX_DATA_URL: Final = 256 * 1024
#: Bytes of an API response, which repeats the request, and of an output.
_MAX_ANSWER: Final = 2 * 1024 * 1024
MAX_OUTPUT: Final = 32 * 1024 * 1024

#: Seconds for each network operation of a request, and the maximum of a Retry-After between polls.
_STEP: Final = 30
_MAX_WAIT: Final = 30
#: Seconds that cancelling a swap waits for its prediction to be cancelled. That continues in the background.
_LINGER: Final = 0.5

_MODEL: Final = re.compile(r"([a-z0-9][\w.-]*/[a-z0-9][\w.-]*)(?::([0-9a-z]+))?", re.IGNORECASE | re.ASCII)

_TERMINAL: Final = ("succeeded", "failed", "canceled", "aborted")
#: The maximum fraction of progress of each phase, and its message.
_STARTING: Final = 0.4, "Waiting for the face swap to begin..."
_PROCESSING: Final = 0.9, "Swapping the face..."

#: The models' errors if there is no face; most use insightface, and some crash on its empty result.
_NO_FACE: Final = re.compile(
    r"\bno\b[\w ]{0,20}\bface|\bface[\w ]{0,20}\bnot\b[\w ]{0,9}(found|detect)|\b(find|detect)\b[\w ]{0,20}\bface"
    r"|'NoneType' object has no attribute '(kps|bbox|embedding|normed_embedding)'",
    re.IGNORECASE,
)


#: By model, its names for the picture and the face.
_INPUTS: Final = {
    "lucataco/faceswap": ("target_image", "swap_image"),
    "yan-ops/face_swap": ("target_image", "source_image"),
    "ddvinh1/faceswap-photo-id": ("target_image", "source_image"),
    "xiankgx/face-swap": ("local_target", "local_source"),
}
_OTHER_INPUTS: Final = ("input_image", "swap_image")


class _Prediction(BaseModel):
    id: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,100}$")]
    status: str
    output: JsonValue = None
    error: JsonValue = None


class _File(BaseModel):
    url: Annotated[str, Field(validation_alias=AliasPath("urls", "get"))]


Answer = TypeVar("Answer", bound=BaseModel)
T = TypeVar("T")


@dataclass(repr=False, eq=False)
class ReplicateFaceSwap:
    """`domain.ports.providers.FaceSwapper` with a model on Replicate.

    Its inputs are ``input_image`` for the picture and ``swap_image`` for the face, as for most models, unless other
    names are known for it. Its output is an image, a list of images of which the first is used, or an object that
    contains one, such as ``{"image": …}``.

    Raises:
        ValueError: `model` is not such a name.
    """

    free = False

    threads: ImageThreads
    token: str
    #: ``owner/name`` for one of Replicate's official models, else ``owner/name:version``.
    model: str = DEFAULT_MODEL
    _: KW_ONLY
    base_url: str = BASE_URL
    #: In seconds: for the whole swap; after that, to cancel the prediction; before the first poll and the first retry.
    deadline: float = 300
    grace: float = 5
    pace: float = 1
    #: Outputs are fetched from these hosts by https, or from the API's own host.
    output_hosts: Collection[str] = OUTPUT_HOSTS
    trust: ssl.SSLContext | None = None
    _swaps: set[asyncio.Task[Picture]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        found = _MODEL.fullmatch(self.model)
        if found is None:
            raise ValueError("A model on Replicate is owner/name, or owner/name:version.")
        self.name, self.version = found.groups()
        self.inputs = _INPUTS.get(self.name.lower(), _OTHER_INPUTS)

    async def swap(self, picture: Picture, face: Picture, report: Report) -> Picture:
        # In a task, which can still cancel the prediction after this call was cancelled.
        swap = asyncio.create_task(_Swap(self, report).run(picture, face))
        self._swaps.add(swap)
        swap.add_done_callback(self._swaps.discard)
        try:
            return await asyncio.shield(swap)
        except asyncio.CancelledError:
            swap.cancel()
            await asyncio.wait([swap], timeout=_LINGER)
            raise

    def may_download(self, url: httpx2.URL) -> bool:
        """Whether outputs may be fetched from this URL."""
        there = url.scheme == "https" and any(f".{url.host}".endswith(f".{host}") for host in self.output_hosts)
        return (there or same_origin(url, httpx2.URL(self.base_url))) and not url.userinfo


@dataclass(eq=False)
class _Swap:
    """One swap. Its methods raise `Failure`."""

    swapper: ReplicateFaceSwap
    report: Report
    api: httpx2.AsyncClient = field(init=False)
    creating: asyncio.Task[_Prediction] | None = None
    #: Whether the prediction has ended.
    ended: bool = False

    async def run(self, picture: Picture, face: Picture) -> Picture:
        trust, base_url = self.swapper.trust, self.swapper.base_url
        headers = {"Authorization": f"Bearer {self.swapper.token}"}
        picture_input, face_input = self.swapper.inputs
        async with provider_client(_STEP, _MAX_ANSWER, trust, base_url=base_url, headers=headers) as self.api:
            try:
                async with asyncio.timeout(self.swapper.deadline):
                    sent = {picture_input: await self._input(picture), face_input: await self._input(face)}
                    prediction = await self._attempt(partial(self._created, sent))
                    output = self._output(await self._wait(prediction))
                    await self.report(_PROCESSING[0], "Fetching the picture...", None)
                    data = await self._attempt(partial(self._downloaded, output))
                    return await self.swapper.threads.run(usable, data)
            except TimeoutError:
                self._log(f"there was no result within {self.swapper.deadline} s")
                raise Failure("provider_timeout") from None
            except Unreadable as error:
                self._log("the output is no picture", error)
                raise Failure("provider_unavailable") from None
            finally:
                await self._cancel()

    async def _attempt(self, call: Callable[[], Awaitable[T]]) -> T:
        return await attempt(call, self.report, within=self.swapper.deadline, backoff=self.swapper.pace)

    async def _input(self, picture: Picture) -> str:
        if len(picture.data) <= MAX_DATA_URL:
            return f"data:{picture.media_type};base64,{base64.b64encode(picture.data).decode()}"
        return (await self._attempt(partial(self._uploaded, picture))).url

    async def _uploaded(self, picture: Picture) -> _File:
        name = f"picture.{picture.media_type.rpartition('/')[2]}"
        try:
            return await self._call(_File, "POST", "files", files={"content": (name, *picture)})
        except Failure as failure:
            raise (Declined(failure.code) if failure.retryable else failure) from None

    async def _created(self, sent: dict[str, str]) -> _Prediction:
        name, version = self.swapper.name, self.swapper.version
        path = "predictions" if version else f"models/{name}/predictions"
        body = {"input": sent} | ({"version": version} if version else {})
        headers = {"Cancel-After": f"{math.ceil(self.swapper.deadline) + 5}s"}
        # In a task: cancelling the prediction needs the id in its response.
        self.creating = asyncio.create_task(self._call(_Prediction, "POST", path, json=body, headers=headers))
        return await asyncio.shield(self.creating)

    async def _wait(self, prediction: _Prediction) -> _Prediction:
        """Poll the prediction until it has ended, and return it."""
        path = f"predictions/{prediction.id}"
        fraction, pause = 0.0, self.swapper.pace
        while prediction.status not in _TERMINAL:
            most, message = _STARTING if prediction.status == "starting" else _PROCESSING
            fraction += max(0.0, most - fraction) / 5
            await self.report(fraction, message, None)
            await asyncio.sleep(pause)
            pause = min(1.2 * pause, 4 * self.swapper.pace)
            try:
                prediction = await self._call(_Prediction, "GET", path)
            except Declined as declined:
                await asyncio.sleep(min(declined.after or 0, _MAX_WAIT))
            except Failure as failure:
                if not failure.retryable:
                    raise
        self.ended = True
        return prediction

    def _output(self, prediction: _Prediction) -> str:
        """The URL or data URL of the picture."""
        found = next(candidates(prediction.output, "output"), None)
        if prediction.status == "succeeded" and found is not None:
            return found
        message = prediction.error or prediction.output
        self._log(f"the prediction ended as {prediction.status!r} without a picture", message, prediction.id)
        if _NO_FACE.search(str(message)):
            raise Failure("provider_rejected", "No face was found in one of the pictures.")
        raise Failure("provider_timeout" if prediction.status == "aborted" else "provider_unavailable")

    async def _cancel(self) -> None:
        """Cancel the prediction if it may still run."""
        if self.creating is None or self.ended:
            return
        try:
            # Without a prediction, or after its end, there is an error, which has been logged.
            async with asyncio.timeout(self.swapper.grace):
                with suppress(Failure):
                    prediction = await self.creating
                    await self._call(_Prediction, "POST", f"predictions/{prediction.id}/cancel")
        except TimeoutError:
            self._log("a prediction could not be cancelled in time, and may run on for a while")

    async def _downloaded(self, output: str) -> bytes:
        with suppress(Unreadable):
            return inline(output)
        async with provider_client(_STEP, MAX_OUTPUT, self.swapper.trust, check=self._check) as web:
            return (await attempts.download(web, output, self._log)).content

    async def _check(self, request: httpx2.Request) -> None:
        if not self.swapper.may_download(request.url):
            self._log("the output is not where it may be", request.url)
            raise Failure("provider_unavailable")

    async def _call(self, kind: type[Answer], method: str, path: str, **content: Any) -> Answer:
        try:
            response = await self.api.request(method, path, **content)
        except httpx2.HTTPError as error:
            self._log(f"{method} {path} brought no answer: {type(error).__name__}", error)
            raise broken(error) from None
        if response.is_success:
            with suppress(ValidationError):
                return kind.model_validate_json(response.content.removeprefix(codecs.BOM_UTF8))
        what = f"{method} {path} was answered with {response.status_code}"
        self._log(what, response.text, response.headers.get("cf-ray"))
        raise attempts.answered(response.status_code, response.headers)

    def _log(self, what: str, message: object = "", request_id: str | None = None) -> None:
        attempts.log_problem("Replicate", what, message, request_id=request_id, secret=self.swapper.token)
