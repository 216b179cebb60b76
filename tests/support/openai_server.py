"""OpenAI's image edit endpoint on a free port: keys, multipart forms, JSON, streams, errors, as OpenAI sends them.

Its pictures are PNGs in one colour, of the requested size.
"""

import base64
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from PIL import Image

from support.pictures import ORANGE, encoded
from support.provider_faults import Answer, Origin, Request, as_json, head, in_turn, listening, raw

KEY: Final = "sk-proj-Vq7T4mZs0bD9xLrWcKe2hNfYpGu8aJi3"
REQUEST_ID: Final = "req_5f0c1d2e3b4a"

USAGE: Final = {
    "input_tokens": 50,
    "input_tokens_details": {"image_tokens": 40, "text_tokens": 10},
    "output_tokens": 50,
    "total_tokens": 100,
}


class Part(NamedTuple):
    """A file of a form."""

    name: str
    data: bytes
    media_type: str


class Call(NamedTuple):
    """One request for an edit."""

    target: str
    headers: Mapping[str, str]
    fields: Mapping[str, str]
    files: Mapping[str, Part]


class OpenAIServer:
    """Sends the given responses in turn, and repeats the last one; by default it sends a picture."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.calls: list[Call] = []
        self._next = in_turn([self.draw])

    @property
    def base_url(self) -> str:
        return f"{self.origin.address}/v1"

    def answer(self, *answers: Answer) -> None:
        """Set the responses to the next calls."""
        self._next = in_turn(answers)

    async def draw(self, writer: Any) -> None:
        """Send a picture as requested, streamed if requested."""
        await drawn(self.calls[-1].fields)(writer)

    def respond(self, request: Request) -> Answer:
        if (request.method, request.target.removeprefix("http://openai.test")) != ("POST", "/v1/images/edits"):
            return error(404, "invalid_request_error", None, f"Invalid URL ({request.method} {request.target})")
        self.calls.append(Call(request.target, request.headers, *_form(request)))
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key != KEY:
            shown = f"{key[:11]}{'*' * 20}{key[-4:]}"
            return error(401, "invalid_request_error", "invalid_api_key", f"Incorrect API key provided: {shown}.")
        return self._next()


@asynccontextmanager
async def openai_server(port: int = 0) -> AsyncIterator[OpenAIServer]:
    origin = Origin(lambda request: server.respond(request))
    server = OpenAIServer(origin)
    async with listening(origin, port):
        yield server


def _form(request: Request) -> tuple[dict[str, str], dict[str, Part]]:
    media_type, _, boundary = request.headers["content-type"].partition("; boundary=")
    assert media_type == "multipart/form-data"
    first, *parts, last = (b"\r\n" + request.body).split(b"\r\n--" + boundary.encode())
    assert (first, last) == (b"", b"--\r\n")
    fields: dict[str, str] = {}
    files: dict[str, Part] = {}
    for part in parts:
        lines, _, data = part.partition(b"\r\n\r\n")
        head = dict(line.split(": ", 1) for line in lines.decode().strip().split("\r\n"))
        names = re.fullmatch(r'form-data; name="([^"]+)"(?:; filename="([^"]+)")?', head["Content-Disposition"])
        assert names is not None
        name, file_name = names.groups()
        assert name not in fields | files, f"{name} was sent twice"
        if file_name is None:
            fields[name] = data.decode()
        else:
            files[name] = Part(file_name, data, head["Content-Type"])
    return fields, files


# --- answers ---------------------------------------------------------------------------------------------


def error(
    status: int, kind: str | None, code: str | None, message: str = "Something was wrong.", **headers: str
) -> Answer:
    return as_json(error_body(kind, code, message), status, x_request_id=REQUEST_ID, **headers)


def error_body(kind: str | None, code: str | None, message: str = "Something was wrong.") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def picture(size: str, colour: tuple[int, int, int] = ORANGE) -> bytes:
    width, height = map(int, size.split("x"))
    return encoded(Image.new("RGB", (width, height), colour), compress_level=1)


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_of(*pictures: object) -> dict[str, Any]:
    """The body of a response without streaming."""
    return {"created": 1763829000, "data": [{"b64_json": one} for one in pictures], "usage": USAGE}


def pictures(*data: bytes) -> Answer:
    return as_json(data_of(*map(in_base64, data)), x_request_id=REQUEST_ID)


def event(name: str, **data: object) -> bytes:
    """One event of a stream."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


def partial(index: int, data: bytes) -> bytes:
    return event("image_edit.partial_image", b64_json=in_base64(data), partial_image_index=index, **_DETAILS)


def completed(data: bytes) -> bytes:
    return event("image_edit.completed", b64_json=in_base64(data), usage=USAGE, **_DETAILS)


STREAM: Final = head(media_type="text/event-stream; charset=utf-8", x_request_id=REQUEST_ID)


def stream(*events: bytes) -> Answer:
    return raw(STREAM, *events)


_DETAILS: Final = {
    "created_at": 1763829000,
    "size": "1024x1536",
    "quality": "high",
    "background": "opaque",
    "output_format": "png",
}

#: Made once per size.
_drawings: dict[str, bytes] = {}


def drawn(fields: Mapping[str, str]) -> Answer:
    size = fields["size"]
    data = _drawings.setdefault(size, picture(size))
    if fields.get("stream") != "true":
        return pictures(data)
    events: Sequence[bytes] = [partial(index, data) for index in range(int(fields.get("partial_images", "0")))]
    return stream(*events, completed(data))
