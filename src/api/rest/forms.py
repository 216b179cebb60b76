"""The form that starts a generation: read within limits, validated, and turned into a `domain.workflow.Wish`.

The form's models are what OpenAPI shows. FastAPI would read the whole body before anything else is asked; here it
is read last.
"""

import codecs
import difflib
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final

from fastapi import Request
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, WithJsonSchema
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError, from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from api.rest.bodies import limited
from api.rest.problems import Invalid, InvalidField, invalid_fields
from api.rest.spool import Spool, SpooledPart
from domain.errors import Failure
from domain.requests import Options
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
#: Charsets in which texts are read, as Python names them. Others are rare, slow or no charsets of texts at all.
_CHARSETS: Final = re.compile(r"utf-8|iso8859-[0-9]+|cp125[0-9]")
#: Enough of a file to tell PNG, JPEG and WebP from text: a byte that is not UTF-8, or a NUL.
_HEAD: Final = 8
_HTTP_URL: Final = re.compile(r"https?://[^\x00-\x20\x7f/?#]+[^\x00-\x20\x7f]*", re.IGNORECASE)


def _file(value: object) -> UploadFile:
    if not isinstance(value, UploadFile) or not _is_file(value):
        raise PydanticCustomError("file", "This must be a file; URLs belong in imageUrls")
    return value


def _is_file(part: UploadFile) -> bool:
    """Whether this is a file, and not text. Many clients send files without a name: then the content decides."""
    head = part.file.read(_HEAD)
    part.file.seek(0)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return bool(part.filename) or "\0" in text


def _text(value: object) -> object:
    """Forms send each line break as two characters, whatever was typed."""
    return value.replace("\r\n", "\n") if isinstance(value, str) else value


def _visible(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise PydanticCustomError("blank", "This must not be blank, and must not contain NUL")
    return value


def _urls(values: object) -> object:
    """The field as it came: repeated, or once with a JSON array."""
    first = values[0] if isinstance(values, list) and len(values) == 1 else None
    if isinstance(first, str) and first.lstrip().startswith("["):
        try:
            values = from_json(first)
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
        str,
        Field(min_length=1, max_length=4000, examples=["Make it a watercolour"], description="not only white space"),
        BeforeValidator(_text),
        AfterValidator(_visible),
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
        Field(description="the first image URL is the face; default: true when there is an image URL"),
    ] = None


_FORMS: Final[dict[Kind, type[GenerateForm]]] = {"edit": EditForm, "generate": GenerateForm}


def form_body(kind: Kind) -> dict[str, Any]:
    """The form as OpenAPI shows it."""
    schema = _FORMS[kind].model_json_schema(ref_template="#/components/schemas/{model}")
    del schema["$defs"]  # JsonValue, which is a component anyway
    for field in schema["properties"].values():
        if "anyOf" in field:  # A form has no null: what is not given is left out.
            field |= next(each for each in field.pop("anyOf") if each != {"type": "null"})
            del field["default"]
    encoding = {
        "imageUrls": {"style": "form", "explode": True},
        "metadata": {"contentType": "application/json"},
    }
    content = {"multipart/form-data": {"schema": schema, "encoding": encoding}}
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
    if media_type != b"multipart/form-data":
        raise HTTPException(415, "The content type must be multipart/form-data.")
    if b"boundary" not in options:
        raise HTTPException(400, "The content type has no boundary. Let the HTTP client set this header.")
    model = _FORMS[kind]
    names = _names(model)
    known = _names(EditForm)  # What one form has, the other takes empty: pages send every input that they show.
    async with _form(request, options, known) as form:
        fields: dict[str, Any] = {}
        for name in form:
            optional = name in known and name != "prompt"
            values = [value for value in form.getlist(name) if not (optional and _is_empty(value))]
            if values:
                fields[name] = values if name in ("images", "imageUrls") or len(values) != 1 else values[0]
        try:
            wanted = model.model_validate(fields)
        except ValidationError as error:
            raise Invalid(*invalid_fields(_explained(each, names) for each in error.errors()[:_MAX_ERRORS])) from None
        yield _wish(kind, wanted, external)


def _names(model: type[GenerateForm]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _explained(error: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """The error; of an unknown field it says which one was probably meant, of a repeated one that it is repeated."""
    if error["type"] != "extra_forbidden":
        repeated = isinstance(error["input"], list) and error["loc"] not in (("images",), ("imageUrls",))
        return {**error, "msg": "This field must not be repeated"} if repeated else error
    value = error["input"][0] if isinstance(error["input"], list) else error["input"]
    if isinstance(value, UploadFile) and _is_file(value):
        similar = ["images"]
    else:
        texts = {_plain(name): name for name in names if name != "images"}
        similar = [texts[each] for each in difflib.get_close_matches(_plain(error["loc"][0]), texts, n=1)]
    hint = f"did you mean {similar[0]}?" if similar else f"the fields are {', '.join(names)}"
    return {**error, "msg": f"There is no such field; {hint}"}


def _plain(name: str) -> str:
    """The letters alone: `image_urls[0]` is written much like `imageUrls`."""
    return re.sub("[^a-z]", "", name.lower())


class _Parser(MultiPartParser):
    """Starlette's parser, for what clients really send.

    Whether a part is a file is decided by its field, not by headers that every client sets differently. Texts are
    decoded by their own charset, and a JSON string is unwrapped: clients send `application/json` for any value. What
    precedes the first boundary is skipped, and a form that ends early is not taken for a whole one.
    """

    def __init__(self, request: Request, options: Mapping[bytes, bytes], names: Collection[str], spool: Spool) -> None:
        super().__init__(request.headers, self._whole(request.stream()))
        self._spool = spool
        # Read as the first part, so that the library finds the boundary after it.
        self._preamble = b"--%b\r\n\r\n\r\n" % options[b"boundary"]
        self._in_preamble = True
        self._form_charset = _codec(options.get(b"charset") or b"utf-8")
        self._texts = {name.encode() for name in names if name != "images"}
        self._json = self._ended = False

    def on_headers_finished(self) -> None:
        if self._in_preamble:
            return
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        headers = dict(part.item_headers)
        if headers.get(b"content-transfer-encoding", b"binary").strip().lower() not in (b"7bit", b"8bit", b"binary"):
            raise HTTPException(415, "The parts of a form must be sent as they are, without a transfer encoding.")
        media_type, parameters = parse_options_header(headers.get(b"content-type"))
        self._json = media_type == b"application/json"
        if options.get(b"name") in self._texts:
            part.content_disposition = b"form-data; name=%b" % options[b"name"]
            charset = parameters.get(b"charset")
            self._charset = _codec(charset) if charset else self._form_charset
        elif b"filename" not in options:
            # At the front, where nothing that is wrong with the rest can hide it.
            part.content_disposition = b'form-data; filename="";' + (part.content_disposition or b"").partition(b";")[2]
        super().on_headers_finished()
        if part.file is not None:
            part.file.file.close()
            part.file.file = SpooledPart(self._spool)  # type: ignore[assignment]  # all of a file that is used

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_preamble:
            super().on_part_data(data, start, end)

    def on_part_end(self) -> None:
        if self._in_preamble:
            self._in_preamble = False
            return
        super().on_part_end()
        name, value = self.items[-1]
        if self._json and isinstance(value, str):
            self.items[-1] = name, _unwrapped(value)

    def on_end(self) -> None:
        self._ended = True

    async def _whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        yield self._preamble
        async for chunk in stream:
            yield chunk
        if not self._ended:
            raise MultiPartException("The form is not complete.")


def _codec(charset: bytes) -> str:
    try:
        name = codecs.lookup(charset.decode("ascii")).name.replace("ascii", "utf-8")
    except (LookupError, ValueError):
        name = ""
    if not _CHARSETS.fullmatch(name):
        raise HTTPException(415, "The texts of a form must be in UTF-8, ISO-8859 or a Windows code page.")
    return name


def _unwrapped(text: str) -> str:
    """A JSON string's value; all else as it is."""
    try:
        value = from_json(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


@asynccontextmanager
async def _form(request: Request, options: Mapping[bytes, bytes], names: Collection[str]) -> AsyncIterator[FormData]:
    with Spool() as spool:
        try:
            body = limited(request, MAX_BODY, "The request may have 5 files of 10 MB at most.")
            form = await _Parser(body, options, names, spool).parse()
        except MultiPartException as error:
            too_much = error.message.startswith(_TOO_MUCH)
            raise HTTPException(413 if too_much else 400, error.message) from None
        except OSError as error:  # Large files are put on the disk while they come.
            logger.error("an upload cannot be kept: %s", error.strerror)
            raise Failure("storage_failed") from None
        yield form


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
        self.size = file.size or 0

    async def read(self) -> bytes:
        await self._file.seek(0)
        return await self._file.read()


def _is_empty(value: str | UploadFile) -> bool:
    """Whether this counts as not given: an empty text, or a file input in which nothing was chosen."""
    return value == "" if isinstance(value, str) else not (value.filename or value.size)
