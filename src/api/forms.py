"""The form that starts a generation: read within limits, validated, and turned into a `domain.workflow.Wish`.

The form's models are what OpenAPI shows. FastAPI would read the whole body before anything else is asked; here it
is read last.
"""

import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final

from fastapi import Request
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, WithJsonSchema
from pydantic.alias_generators import to_camel
from pydantic.types import Strict
from pydantic_core import PydanticCustomError, from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from api.bodies import limited
from api.problems import Invalid, InvalidField, invalid_fields
from domain.errors import Failure
from domain.orders import Options
from domain.stages import Kind
from domain.workflow import Wish

logger = logging.getLogger(__name__)

MAX_IMAGES: Final = 5
MAX_FILE: Final = 10 * 1024 * 1024
MAX_BODY: Final = MAX_IMAGES * MAX_FILE + 64 * 1024
MAX_METADATA: Final = 2 * 1024
_MAX_METADATA_DEPTH: Final = 32
#: A boundary has 70 characters. Reading the header's parameters takes time by the square of its length.
_MAX_CONTENT_TYPE: Final = 1_000
#: How many wrong fields are told. An answer is not much longer than what it answers.
_MAX_ERRORS: Final = 20
#: How Starlette begins what it says of a form that goes beyond its limits.
_TOO_MUCH: Final = ("Too many", "Part exceeded")
_HTTP_URL: Final = re.compile(r"https?://[^\x00-\x20\x7f/?#]+[^\x00-\x20\x7f]*", re.IGNORECASE)


def _file(value: object) -> UploadFile:
    if not isinstance(value, UploadFile):
        raise PydanticCustomError("file", "This must be a file")
    return value


def _text(value: object) -> object:
    """Forms send each line break as two characters, whatever was typed."""
    return value.replace("\r\n", "\n") if isinstance(value, str) else value


def _flag(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _urls(values: object) -> object:
    """The field as it came: repeated, or once with a JSON array."""
    if isinstance(values, list) and len(values) == 1 and isinstance(values[0], str) and values[0].startswith("["):
        try:
            values = from_json(values[0])
        except ValueError:
            raise PydanticCustomError("json", "This must be a JSON array, or the field repeated") from None
    if isinstance(values, list) and len(values) > MAX_IMAGES:
        raise PydanticCustomError("too_many", "There may be 5 at most")
    return values


def _http_url(value: str) -> str:
    if _HTTP_URL.fullmatch(value) is None:
        raise PydanticCustomError("url", "This must be an http or https URL")
    return value


def _metadata(value: object) -> object:
    try:
        parsed = from_json(value, allow_inf_nan=False) if isinstance(value, str) else None
        size = len(json.dumps(parsed, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode())
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise PydanticCustomError("json", "This must be a JSON object")
    if size > MAX_METADATA or _depth(parsed) > _MAX_METADATA_DEPTH:
        raise PydanticCustomError("size", "This may have 2 kB as compact JSON, and 32 levels, at most")
    return parsed


def _depth(value: JsonValue) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


_Images = list[Annotated[Any, BeforeValidator(_file), WithJsonSchema({"type": "string", "format": "binary"})]]
#: An http or https URL.
HttpUrl = Annotated[str, Field(max_length=2048, json_schema_extra={"format": "uri"}), AfterValidator(_http_url)]


class GenerateForm(Options):
    """The fields of ``POST /generations/generate``."""

    model_config = ConfigDict(alias_generator=to_camel)

    prompt: Annotated[
        str, Field(min_length=1, max_length=4000, examples=["Make it a watercolour"]), BeforeValidator(_text)
    ]
    images: Annotated[
        _Images,
        Field(
            default_factory=list,
            json_schema_extra={"maxItems": MAX_IMAGES},
            description="PNG, JPEG or WebP, each at most 10 MB and 25 megapixels; with `imageUrls` 1 to 5 in all",
        ),
    ]
    image_urls: Annotated[
        list[HttpUrl],
        BeforeValidator(_urls),
        Field(
            default_factory=list,
            json_schema_extra={"maxItems": MAX_IMAGES},
            description="the field repeated, or once with a JSON array",
            examples=[["https://example.com/face.jpg"]],
        ),
    ]
    metadata: Annotated[
        dict[str, JsonValue] | None,
        BeforeValidator(_metadata),
        Field(description="comes back in every event; at most 2 kB of JSON", examples=[{"album": 7}]),
    ] = None


class EditForm(GenerateForm):
    """The fields of ``POST /generations/edit``."""

    face_swap: Annotated[
        bool | None,
        Strict(),
        BeforeValidator(_flag),
        Field(description="the first image URL is the face; default: true when there is an image URL"),
    ] = None


_FORMS: Final[dict[Kind, type[GenerateForm]]] = {"edit": EditForm, "generate": GenerateForm}


def form_body(kind: Kind) -> dict[str, Any]:
    """The form as OpenAPI shows it."""
    schema = _FORMS[kind].model_json_schema(ref_template="#/components/schemas/{model}")
    del schema["$defs"]  # JsonValue, which is a component anyway
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


@asynccontextmanager
async def read_wish(request: Request, kind: Kind, *, external: bool) -> AsyncIterator[Wish]:
    """What the request's form asks for; its files can be read until the end of the context.

    `external`: the caller's own pipeline does the work, and may have the images already.

    Raises:
        Invalid: fields are not as they have to be.
        HTTPException: 400, 413, 415: the body is not a form, or too large.
        Failure: ``storage_failed``: there is no room for it.
    """
    content_type = request.headers.get("content-type", "")
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise HTTPException(400, "The content type is too long.")
    media_type, options = parse_options_header(content_type)
    if media_type != b"multipart/form-data" or options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise HTTPException(415, "The content type must be multipart/form-data.")
    async with _form(request) as form:
        fields: dict[str, Any] = {}
        for name in form:
            values = [value for value in form.getlist(name) if not _is_empty_input(value)]
            fields[name] = values if name in ("images", "imageUrls") or len(values) != 1 else values[0]
        try:
            wanted = _FORMS[kind].model_validate(fields)
        except ValidationError as error:
            raise Invalid(*invalid_fields(error.errors()[:_MAX_ERRORS])) from None
        yield _wish(kind, wanted, external)


class _Parser(MultiPartParser):
    """Starlette's, but what is left of a form that breaks off is not taken for a whole one."""

    _ended = False

    def on_end(self) -> None:
        self._ended = True

    async def parse(self) -> FormData:
        self.stream = self._whole(self.stream)
        return await super().parse()

    async def _whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self._ended:
            raise MultiPartException("The form is not complete.")


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    try:
        body = limited(request, MAX_BODY, "The request may have 5 files of 10 MB at most.")
        form = await _Parser(request.headers, body.stream()).parse()
    except MultiPartException as error:
        too_much = error.message.startswith(_TOO_MUCH)
        raise HTTPException(413 if too_much else 400, error.message) from None
    except OSError as error:  # Large files are put on the disk while they come.
        logger.error("an upload cannot be kept: %s", error.strerror)
        raise Failure("storage_failed") from None
    try:
        yield form
    finally:
        await form.close()


def _wish(kind: Kind, form: GenerateForm, external: bool) -> Wish:
    least = 0 if external else 1
    if not least <= len(form.images) + len(form.image_urls) <= MAX_IMAGES:
        message = f"There must be {least} to {MAX_IMAGES} images in all, files and URLs"
        raise Invalid(InvalidField(field="images", message=message))
    for index, file in enumerate(form.images):
        if file.size > MAX_FILE:
            raise HTTPException(413, f"images.{index}: A file may have 10 MB at most.")
    face_swap = form.face_swap if isinstance(form, EditForm) else False
    if face_swap and not form.image_urls:
        raise Invalid(
            InvalidField(field="faceSwap", message="A face swap needs an image URL: the first one is the face")
        )
    return Wish(
        kind=kind,
        prompt=form.prompt,
        options=Options(**form.model_dump(include=set(Options.model_fields))),
        uploads=[_Upload(file) for file in form.images],
        image_urls=tuple(form.image_urls),
        face_swap=bool(form.image_urls) if face_swap is None else face_swap,
        metadata=form.metadata,
        external=external,
    )


class _Upload:
    """`domain.workflow.Upload`."""

    def __init__(self, file: UploadFile) -> None:
        self._file = file

    async def read(self) -> bytes:
        await self._file.seek(0)
        return await self._file.read()


def _is_empty_input(value: str | UploadFile) -> bool:
    """Whether this is what browsers send for a file input in which nothing was chosen."""
    return isinstance(value, UploadFile) and not value.filename and not value.size
