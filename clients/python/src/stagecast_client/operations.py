"""What the client does, without I/O: generators that yield commands, which the two clients carry out.

An operation yields `Command` objects and is sent their results; transport errors are thrown into it. It yields `Emit`
for each value that the caller iterates over, and returns its result.
"""

import io
import json
import random
import re
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Final, Generic, Literal, TypeVar, Unpack, cast
from urllib.parse import quote

import httpx2

from stagecast_client.errors import GenerationFailed, HistoryLost, StagecastError
from stagecast_client.models import (
    JSON,
    Account,
    Event,
    Generation,
    Kind,
    Options,
    TransitionFields,
    camel_case,
)

E = TypeVar("E")
T = TypeVar("T")

#: A path, the bytes of a file, or an open binary file, which is read once.
Image = str | PathLike[str] | bytes | BinaryIO
Token = str | Callable[[], Any]
Generations = list[Generation]

#: Codes for which a new token is requested, once.
_TOKEN_ERRORS: Final = ("unauthenticated", "invalid_token", "token_expired")
#: What a header's value cannot have: control characters, and spaces at its ends.
_UNSENDABLE: Final = re.compile(rb"[\x00-\x1f\x7f]|^\s|\s$")
#: Seconds without a byte after which a stream counts as broken; the service sends a comment every 15.
SILENCE: Final = 40.0
#: Seconds between two attempts: it doubles up to the second value, and is taken at random around it.
_DELAYS: Final = (0.25, 4.0)
_PAGE: Final = 100


@dataclass(frozen=True)
class Send:
    """Send a request. Result: the response; if it is an event stream, `Read` reads from it, else its body is read."""

    method: str
    url: str
    headers: dict[str, Any] = field(repr=False)  # It has the token.
    stream: bool = False
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of httpx2's methods."""
        return {"url": self.url, "headers": self.headers, **self.content}


@dataclass(frozen=True)
class Read:
    """Read the next event of the stream. Result: ``None`` at its end."""


@dataclass(frozen=True)
class Sleep:
    """Wait for so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Call:
    """Call a function of the user, which may be asynchronous. Result: its result."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class ReadFiles:
    """Call a function that reads files. Result: its result."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Emit(Generic[E]):
    """Hand a value to the caller."""

    value: E


Command = Send | Read | Sleep | Call | ReadFiles
Operation = Generator[Command | Emit[E], Any, T]


class Steps(Generic[E, T]):
    """Steps through an operation: `next_command`, then `succeed` or `fail` with what has become of it."""

    result: T

    def __init__(self, operation: Operation[E, T]) -> None:
        self._operation = operation
        self._resume: Callable[[], Command | Emit[E]] = partial(next, operation)

    def next_command(self) -> Command | Emit[E] | None:
        """``None``: the operation has ended, with `result`."""
        try:
            return self._resume()
        except StopIteration as end:
            self.result = end.value
            return None

    def succeed(self, value: Any = None) -> None:
        """The command is carried out, with this result."""
        self._resume = partial(self._operation.send, value)

    def fail(self, error: httpx2.TransportError) -> None:
        """The command failed."""
        self._resume = partial(self._operation.throw, error)

    def close(self) -> None:
        """End the operation where it is."""
        self._operation.close()


def is_stream(response: httpx2.Response) -> bool:
    """Whether a response is an event stream."""
    return response.status_code == 200 and response.headers.get("content-type", "").startswith("text/event-stream")


class Operations:
    """The operations of one client."""

    def __init__(self, url: str, user_id: str | int | None, token: Token | None, retry_for: float) -> None:
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError("The URL of the service has to begin with http:// or https://.")
        self._url = url.rstrip("/")
        self._user_id = user_id
        self._token = token
        self._known_token = None if callable(token) else token
        self._retry_for = retry_for

    # -- Requests

    def _send(
        self, method: str, path: str, *, headers: Mapping[str, str] = {}, stream: bool = False, **content: Any
    ) -> Operation[Any, httpx2.Response]:
        """Send a request once, or twice if the service rejects a token that can be renewed. Raises `StagecastError`."""
        for renewed in (False, True):
            if self._known_token is None and callable(self._token):
                self._known_token = yield Call(self._token)
            own = {"Authorization": f"Bearer {self._known_token}".encode()} if self._known_token else {}
            if self._user_id is not None:
                own["X-User-Id"] = str(self._user_id).encode()
            for name, value in own.items():
                if _UNSENDABLE.search(value):
                    raise ValueError(f"The header {name} cannot have control characters, or spaces at its ends.")
            try:
                response: httpx2.Response = yield Send(method, self._url + path, {**own, **headers}, stream, content)
            except httpx2.TransportError as error:
                raise StagecastError("network", "The service does not answer. Please try again.") from error
            if response.is_success:
                return response
            refusal = _error_of(response)
            if renewed or not callable(self._token) or refusal.code not in _TOKEN_ERRORS:
                raise refusal
            self._known_token = None
        raise AssertionError

    def _request(self, method: str, path: str, **options: Any) -> Operation[Any, Any]:
        """Send a request that may be repeated until it is answered, and return the JSON of the response."""
        attempts = _Attempts(self._retry_for)
        while True:
            try:
                response: httpx2.Response = yield from self._send(method, path, **options)
            except StagecastError as error:
                if method == "DELETE" and error.code == "not_found" and attempts.made:
                    return None  # The response to an earlier attempt was lost.
                yield Sleep(attempts.pause(error))
                continue
            return _json_of(response)

    def _follow(
        self, path: str, after: str | None, handle: Callable[[str, Any, str], Operation[E, bool]]
    ) -> Operation[E, None]:
        """Pass the events of a stream to `handle` until it returns true; after a break, those after the last one."""
        attempts = _Attempts(self._retry_for)
        while True:
            error = StagecastError("network", "The connection to the service is lost.")
            try:
                headers = {} if after is None else {"Last-Event-ID": after}
                response = yield from self._send("GET", path, headers=headers, stream=True)
                if response.status_code == 204:
                    return
                if not is_stream(response):
                    raise _error_of(response)
                while (event := (yield Read())) is not None:
                    if event.data:
                        attempts.reset()
                    if event.event == "authentication_expired" and callable(self._token):
                        self._known_token = None
                    elif event.data and (yield from handle(event.event, json.loads(event.data), event.id)):
                        return
                    after = event.id or after
            except httpx2.TransportError:
                pass
            except StagecastError as refusal:
                error = refusal
            yield Sleep(attempts.pause(error))

    # -- Generations

    def start(
        self,
        kind: Kind,
        *,
        prompt: str,
        images: Image | Iterable[Image] = (),
        image_urls: str | Iterable[str] = (),
        runner: Literal["external"] | None = None,
        **options: Unpack[Options],
    ) -> Operation[Any, Generation]:
        """Start a generation and return it. A lost request is sent again with its key, so that it starts only one.

        Files are read once. `runner`: for services, an own pipeline does the work and reports it with `transition`.
        """
        key = options.pop("idempotency_key", None) or secrets.token_hex(16)
        urls = [image_urls] if isinstance(image_urls, str) else [*image_urls]
        given = {"prompt": prompt, "image_urls": urls, **options}
        form: list[tuple[str, Any]] = [
            (camel_case(name), (None, value if isinstance(value, str) else json.dumps(value)))
            for name, value in given.items()
            if value is not None and value != []
        ]
        chosen = _images(images)
        form += [("images", file) for file in (yield ReadFiles(lambda: [*map(_file, chosen)]))]
        path = f"/generations/{kind}{'?runner=external' if runner else ''}"
        snapshot = yield from self._request("POST", path, headers={"Idempotency-Key": key}, files=form)
        return Generation.from_json(snapshot)

    def run(
        self,
        kind: Kind,
        *,
        prompt: str,
        images: Image | Iterable[Image] = (),
        image_urls: str | Iterable[str] = (),
        on_progress: Callable[[Generation], Any] | None = None,
        **options: Unpack[Options],
    ) -> Operation[Any, Generation]:
        """Start a generation, follow it to its end, and return it.

        `on_progress` is called with the generation after each change. What it raises is raised here; the generation
        then goes on in the service, as it does after an interruption.

        Raises:
            GenerationFailed: the generation failed.
            StagecastError: it was refused, or the service did not answer for long.
        """
        generation = yield from self.start(kind, prompt=prompt, images=images, image_urls=image_urls, **options)

        def handle(_: str, data: JSON, __: str) -> Operation[Any, bool]:
            nonlocal generation
            generation = generation.after(Event.from_json(data))
            if on_progress:
                yield Call(on_progress, (generation,))
            return generation.finished

        if on_progress:
            yield Call(on_progress, (generation,))
        if not generation.finished:
            yield from self._follow(f"{_path(generation.generation_id)}/events", str(generation.sequence), handle)
        if generation.status == "failed":
            raise GenerationFailed(generation)
        return generation

    def events(self, generation_id: str | None = None, *, after: str | int | None = None) -> Operation[Event, None]:
        """Each event once and in order: those of one generation until its end, or of all of the user's, without end.

        `after`: of one generation a sequence; of all a cursor, to go on where another process has stopped. Without it
        the events of one generation begin with the first, those of all with the first of each unfinished one.

        Raises:
            HistoryLost: the events after the cursor are gone.
        """
        position = None if after is None else str(after)
        following = after is not None

        def handle(name: str, data: Any, event_id: str) -> Operation[Event, bool]:
            nonlocal following
            if name == "authenticated":
                if following and not data["recovered"]:
                    raise HistoryLost
                following = True
            elif "sequence" in data:
                event = Event.from_json(data)
                yield Emit(event if generation_id else replace(event, cursor=event_id))
                return bool(generation_id) and event.finished
            return False

        path = "/events" if generation_id is None else f"{_path(generation_id)}/events"
        yield from self._follow(path, position, handle)

    def watch(self, generation_id: str | None = None) -> Operation[Generation, None]:
        """The state after each change: of one generation until its end, or of all of the user's, without end.

        First come the present states: those of all begin with the oldest. Nothing is raised for a lost history: what
        the service has now follows.
        """
        known: dict[str, Generation] = {}

        def show(generation: Generation) -> Operation[Generation, None]:
            if known.get(generation.generation_id) != generation:
                known[generation.generation_id] = generation
                yield Emit(generation)

        def handle(name: str, data: Any, _: str) -> Operation[Generation, bool]:
            if name == "authenticated":
                listed = [Generation.from_json(each) for each in data["generations"]]
                if not data["recovered"]:
                    known.clear()
                for each in reversed(listed):
                    if each.generation_id not in known or not data["recovered"]:
                        yield from show(each)
                return False
            generation = known.get(data["generationId"])
            if name == "generation_removed":
                known.pop(data["generationId"], None)
            elif name == "queue_position" and generation and generation.sequence == 1:
                yield from show(replace(generation, queue_position=data["queuePosition"]))
            elif "sequence" in data and data["sequence"] > (generation.sequence if generation else 0):
                if generation is None or data["sequence"] > generation.sequence + 1:
                    try:
                        generation = yield from self.get(data["generationId"])
                    except StagecastError as error:
                        if generation_id is not None or error.code != "not_found":
                            raise
                        return False  # It has been removed since.
                else:
                    generation = generation.after(Event.from_json(data))
                yield from show(generation)
            return bool(generation_id and generation and generation.finished)

        if generation_id is None:
            yield from self._follow("/events", None, handle)
            return
        generation = yield from self.get(generation_id)
        yield from show(generation)
        if not generation.finished:
            yield from self._follow(f"{_path(generation_id)}/events", str(generation.sequence), handle)

    def get(self, generation_id: str) -> Operation[Any, Generation]:
        """One generation."""
        return Generation.from_json((yield from self._request("GET", _path(generation_id))))

    def list(
        self, *, status: Literal["active", "finished"] | None = None, limit: int | None = None
    ) -> Operation[Any, Generations]:
        """The user's generations, newest first: all, or so many."""
        found: Generations = []
        params: dict[str, Any] = {} if status is None else {"status": status}
        while limit is None or len(found) < limit:
            params["limit"] = _PAGE if limit is None else min(_PAGE, limit - len(found))
            page = yield from self._request("GET", "/generations", params=params)
            found += map(Generation.from_json, page["generations"])
            if not page.get("next"):
                break
            params["before"] = page["next"]
        return found

    def cancel(self, generation_id: str) -> Operation[Any, Literal["cancelled", "already_finished"]]:
        """Cancel a generation, which then fails with the code ``cancelled``."""
        answer: Any = yield from self._request("POST", f"{_path(generation_id)}/cancel")
        outcome: Literal["cancelled", "already_finished"] = answer["outcome"]
        return outcome

    def delete(self, generation_id: str) -> Operation[Any, None]:
        """Delete a finished generation permanently, with its history and its images."""
        yield from self._request("DELETE", _path(generation_id))

    def transition(self, generation_id: str, status: str, **fields: Unpack[TransitionFields]) -> Operation[Any, Event]:
        """Report a stage of a generation that was started with `runner`; a repeated report enters it only once."""
        body = {"status": status, **{camel_case(name): value for name, value in fields.items()}}
        return Event.from_json((yield from self._request("POST", f"{_path(generation_id)}/transitions", json=body)))

    def me(self) -> Operation[Any, Account]:
        """The user and the balance."""
        return Account.from_json((yield from self._request("GET", "/me")))


class _Attempts:
    """The attempts of a request that may be repeated, and how long they have failed."""

    def __init__(self, retry_for: float) -> None:
        self._retry_for = retry_for
        self.reset()

    def reset(self) -> None:
        """The service has answered."""
        self.made = 0
        self._since: float | None = None

    def pause(self, error: StagecastError) -> float:
        """The seconds until the next attempt. Raises the error if it is not temporary, or if it lasts too long."""
        now = time.monotonic()
        since = self._since = self._since or now
        first, longest = _DELAYS
        seconds: float = min(longest, first * 2 ** min(self.made, 10)) * random.uniform(0.5, 1.5)  # noqa: S311
        seconds = max(seconds, error.retry_after or 0)
        if not error.temporary or now + seconds - since > self._retry_for:
            raise error
        self.made += 1
        return seconds


def _path(generation_id: str) -> str:
    # Dots are quoted too: clients resolve "..".
    return f"/generations/{quote(generation_id, safe='').replace('.', '%2E')}"


def _images(images: Image | Iterable[Image]) -> list[Image]:
    """All images, or the only one."""
    if isinstance(images, str | PathLike | bytes | bytearray | memoryview) or hasattr(images, "read"):
        return [cast(Image, images)]
    return [*images]


def _file(image: Image) -> tuple[str, bytes]:
    """The name and the content of an image."""
    if isinstance(image, str | PathLike):
        return Path(image).name, Path(image).read_bytes()
    if isinstance(image, bytes | bytearray | memoryview):
        return "image", bytes(image)
    if not hasattr(image, "read") or isinstance(image, io.TextIOBase):
        raise TypeError("An image is a path, bytes, or a file that is opened in binary mode.")
    content = image.read()
    name = getattr(image, "name", None)
    return Path(name).name if isinstance(name, str) else "image", content


def _json_of(response: httpx2.Response) -> Any:
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError:
        raise _error_of(response) from None


def _error_of(response: httpx2.Response) -> StagecastError:
    """The error for a response."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {}
    errors = problem.get("errors")
    errors = errors if isinstance(errors, list) else []  # A gateway's may be anything.
    retry_after = response.headers.get("retry-after", "")
    return StagecastError(
        problem.get("code", f"http_{response.status_code}"),
        problem.get("detail", f"The service answered {response.status_code}."),
        status=response.status_code,
        field=next((each["field"] for each in errors if isinstance(each, dict) and "field" in each), None),
        retry_after=float(retry_after) if retry_after.isdecimal() else None,
    )
