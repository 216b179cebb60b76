"""The form that starts a generation. FastAPI would read it before it knows who calls, so it is read here.

Its models are what OpenAPI shows.
"""

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from tempfile import SpooledTemporaryFile
from typing import Annotated, Any, Final
from urllib.parse import unquote

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, WithJsonSchema
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError, from_json
from starlette.exceptions import HTTPException

from api.rest.multipart import FormFile, read_multipart
from api.rest.problems import Invalid
from domain.requests import GenerationRequest, Options, Prompt
from domain.stages import Kind
from domain.workflow import Upload

MAX_IMAGES: Final = 5
#: Bytes of one file, of the whole form, and of the metadata.
MAX_FILE: Final = 10 * 1024 * 1024
MAX_BODY: Final = MAX_IMAGES * MAX_FILE + 64 * 1024
MAX_METADATA: Final = 2 * 1024
_MAX_METADATA_DEPTH: Final = 32
#: Characters of JSON that are parsed: white space and escapes included.
_MAX_JSON: Final = 64 * 1024
#: Characters of a URL, or of the name of an image.
_MAX_URL: Final = 2048
#: Invalid fields in one answer, so that it is not much longer than the request.
_MAX_ERRORS: Final = 20
#: The letters that names of stored images have.
_IMAGE_NAME: Final = re.compile(r"[a-z0-9_-]+\.[a-z]+")
_HTTP_URL: Final = re.compile(r"https?://[^\x00-\x20\x7f/?#][^\x00-\x20\x7f]*", re.IGNORECASE)


def _upload(value: object) -> FormFile:
    if not isinstance(value, FormFile) or not value.is_file:
        raise PydanticCustomError("file", "This must be a file; URLs belong in imageUrls")
    return value


def _unix_lines(value: object) -> object:
    """Browsers send each line break as CR LF."""
    return value.replace("\r\n", "\n") if isinstance(value, str) else value


def _visible(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise PydanticCustomError("blank", "This must not be blank, and must not contain NUL")
    return value


def _parsed(value: str) -> Any:
    """The value of JSON that is not too long. Raises `ValueError`."""
    if len(value) > _MAX_JSON:
        raise ValueError
    return from_json(value, allow_inf_nan=False)


def _list(values: object) -> object:
    """The values of a field that is repeated, or sent once with a JSON array."""
    first = values[0] if isinstance(values, list) and len(values) == 1 else None
    if isinstance(first, str) and first.lstrip().startswith("["):
        try:
            values = _parsed(first)
        except ValueError:
            raise PydanticCustomError("json", "This must be a JSON array, or the field repeated") from None
    if isinstance(values, list) and len(values) > MAX_IMAGES:
        raise PydanticCustomError("too_many", "There may be 5 at most")
    return values


def _http_url(value: str) -> str:
    if _HTTP_URL.fullmatch(value) is None:
        raise PydanticCustomError("url", "This must be an http or https URL")
    return value


def _image_name(value: str) -> str:
    """The name in an image URL: its last path segment. ``""``, which no image has, if that cannot be a name."""
    name = unquote(re.split("[?#]", value)[0].rpartition("/")[2]) if len(value) <= _MAX_URL else ""
    return name if _IMAGE_NAME.fullmatch(name) else ""


def _integer(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch("[0-9]{1,3}", value):
        raise PydanticCustomError("integer", "This must be an integer, from 0")
    return value


def _metadata(value: object) -> object:
    try:
        parsed = _parsed(value) if isinstance(value, str) else None
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


_Files = list[Annotated[Any, BeforeValidator(_upload), WithJsonSchema({"type": "string", "format": "binary"})]]
#: An http or https URL.
HttpUrl = Annotated[str, Field(max_length=_MAX_URL, json_schema_extra={"format": "uri"}), AfterValidator(_http_url)]


def _several(description: str, **options: Any) -> Any:
    """A field with any number of values."""
    return Field(default_factory=list, json_schema_extra={"maxItems": MAX_IMAGES}, description=description, **options)


#: The viewer of /docs fills its form with the examples.
_NO_EXAMPLE: Final = [list[str]()]


class GenerateForm(Options):
    """The fields of ``POST /generations/generate``."""

    model_config = ConfigDict(alias_generator=to_camel)

    prompt: Annotated[
        Prompt,
        Field(examples=["Make it a watercolour"], description="not only white space"),
        BeforeValidator(_unix_lines),
        AfterValidator(_visible),
    ]
    images: Annotated[
        _Files,
        _several("PNG, JPEG or WebP, each at most 10 MB and 25 megapixels; with the two below 1 to 5 in all"),
    ]
    image_names: Annotated[
        list[Annotated[str, AfterValidator(_image_name)]],
        BeforeValidator(_list),
        _several(
            "stored images of your own generations, which are copied: each the name or the URL of one;"
            " the field repeated, or once with a JSON array",
            examples=_NO_EXAMPLE,
        ),
    ]
    image_urls: Annotated[
        list[HttpUrl],
        BeforeValidator(_list),
        _several("the field repeated, or once with a JSON array", examples=_NO_EXAMPLE),
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
        Field(description="default: true when there is an image URL, of which the first is the face, or a `face`"),
    ] = None
    face: Annotated[
        int | None,
        BeforeValidator(_integer),
        Field(
            json_schema_extra={"minimum": 0, "maximum": MAX_IMAGES - 1},
            description="the index of the face among all images: first files, then `imageNames`, then `imageUrls`",
            examples=[0],
        ),
    ] = None


#: Fields with any number of values.
_LISTS: Final = ("images", "imageNames", "imageUrls")
_FORMS: Final[dict[Kind, type[GenerateForm]]] = {"edit": EditForm, "generate": GenerateForm}


def form_body(kind: Kind) -> dict[str, Any]:
    """The form's ``requestBody`` in OpenAPI."""
    schema = _FORMS[kind].model_json_schema(ref_template="#/components/schemas/{model}")
    del schema["$defs"]  # JsonValue, which is a component anyway
    for field in schema["properties"].values():
        if "anyOf" in field:  # A form has no null: an absent field is left out.
            field |= next(each for each in field.pop("anyOf") if each != {"type": "null"})
            del field["default"]
    repeated = {"style": "form", "explode": True}
    metadata = {"contentType": "application/json"}
    encoding = {"imageNames": repeated, "imageUrls": repeated, "metadata": metadata}
    content = {"multipart/form-data": {"schema": schema, "encoding": encoding}}
    return {"requestBody": {"required": True, "content": content}}


async def read_form(
    request: Request, kind: Kind, files: SpooledTemporaryFile[bytes], *, external: bool
) -> tuple[GenerationRequest, Sequence[Upload]]:
    """The request in the form, and its uploads, whose content is in `files`.

    `external`: the caller's own pipeline does the work, and may have the images already.

    Raises:
        RequestValidationError: fields are not valid.
        HTTPException, Failure: as `read_multipart`; 413: a file is too large.
    """
    sentence = "The request may have 5 files of 10 MB at most."
    parts = await read_multipart(request, files, _TEXTS, MAX_BODY, sentence)
    fields: dict[str, Any] = {}
    for name, values in parts.items():
        if name == "images" or (name in _TEXTS and name != "prompt"):
            # A form may have the fields of the other one, as long as they are empty: pages send all of their inputs.
            values = [value for value in values if value and not (isinstance(value, FormFile) and value.is_empty)]
        if values:
            fields[name] = values if name in _LISTS or len(values) != 1 else values[0]
    try:
        form = _FORMS[kind].model_validate(fields)
    except ValidationError as error:
        names = _names(_FORMS[kind])
        raise RequestValidationError([_explained(each, names) for each in error.errors()[:_MAX_ERRORS]]) from None
    return _request(form, external), form.images


def _names(model: type[GenerateForm]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


#: The fields of both forms that are texts.
_TEXTS: Final = {*_names(EditForm)} - {"images"}


def _explained(error: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """The error with a message for a repeated field, or for an unknown one, with the name that was probably meant."""
    value = error["input"]
    if error["type"] != "extra_forbidden":
        repeated = isinstance(value, list) and len(error["loc"]) == 1 and error["loc"][0] not in _LISTS
        return {**error, "msg": "This field must not be repeated"} if repeated else error
    first = value[0] if isinstance(value, list) else value
    if isinstance(first, FormFile) and first.is_file:
        similar = ["images"]
    else:
        texts = {_letters(name): name for name in names if name != "images"}
        similar = [texts[each] for each in difflib.get_close_matches(_letters(error["loc"][0]), texts, n=1)]
    hint = f"did you mean {similar[0]}?" if similar else f"the fields are {', '.join(names)}"
    return {**error, "msg": f"There is no such field; {hint}"}


def _letters(name: str) -> str:
    """The letters alone: `image_urls[0]` is similar to `imageUrls`."""
    return re.sub("[^a-z]", "", name.lower())


def _request(form: GenerateForm, external: bool) -> GenerationRequest:
    least = 0 if external else 1
    count = len(form.images) + len(form.image_names) + len(form.image_urls)
    if not least <= count <= MAX_IMAGES:
        message = f"There must be {least} to {MAX_IMAGES} images in all: files, names and URLs"
        raise Invalid("images", message)
    for index, upload in enumerate(form.images):
        if upload.size > MAX_FILE:
            raise HTTPException(413, f"images.{index}: A file may have 10 MB at most.")
    face_swap, face = (form.face_swap, form.face) if isinstance(form, EditForm) else (False, None)
    if face is not None and (face >= count or face_swap is False):
        message = "There is no face without a face swap" if face < count else "There is no image with this index"
        raise Invalid("face", message)
    if face_swap and face is None and not form.image_urls:
        message = "A face swap needs a face: an image URL, of which the first is the face, or `face`"
        raise Invalid("faceSwap", message)
    return GenerationRequest(
        prompt=form.prompt,
        options=Options(**{name: getattr(form, name) for name in Options.model_fields}),
        images=tuple(form.image_names),
        image_urls=tuple(form.image_urls),
        face_swap=face is not None or bool(form.image_urls) if face_swap is None else face_swap,
        face=face,
        metadata=form.metadata,
        external=external,
    )
