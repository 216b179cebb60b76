"""OpenAI's published OpenAPI document for its image edit endpoint, abridged, as JSON Schemas.

``python tests/providers/openai_description.py openapi.json`` compares all of it with the document, which is at
https://github.com/openai/openai-openapi.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

Schema = dict[str, Any]

#: Of the document.
VERSION: Final = "2.3.0"

TEXT: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
TRUTH: Final[Schema] = {"type": "boolean"}


def integer(minimum: int, maximum: int) -> Schema:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def one_of(*texts: str) -> Schema:
    return {"type": "string", "enum": sorted(texts)}


def thing(required: str = "", /, **properties: Schema) -> Schema:
    """An object. `required`: names between spaces."""
    return {"type": "object", "properties": properties, "required": sorted(required.split())}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas]}


_TOKENS: Final = thing("image_tokens text_tokens", image_tokens=INTEGER, text_tokens=INTEGER)
_MANY: Final = {"input_tokens": INTEGER, "output_tokens": INTEGER, "total_tokens": INTEGER}
_MADE: Final = {
    "b64_json": TEXT,
    "created_at": INTEGER,
    "size": one_of("1024x1024", "1024x1536", "1536x1024", "auto"),
    "quality": one_of("low", "medium", "high", "auto"),
    "background": one_of("transparent", "opaque", "auto"),
    "output_format": one_of("png", "webp", "jpeg"),
}
_OF_ALL_EVENTS: Final = "type b64_json created_at size quality background output_format"

#: The fields of the form. A file is a text here.
FORM: Final = thing(
    "prompt image",
    image=either(TEXT, {"type": "array", "maxItems": 16, "items": TEXT}),
    prompt=TEXT,
    mask=TEXT,
    background=one_of("transparent", "opaque", "auto"),
    model=TEXT,
    n=integer(1, 10),
    size=one_of("256x256", "512x512", "1024x1024", "1536x1024", "1024x1536", "auto"),
    response_format=one_of("url", "b64_json"),
    output_format=one_of("png", "jpeg", "webp"),
    output_compression=INTEGER,
    user=TEXT,
    input_fidelity=one_of("high", "low"),
    stream=TRUTH,
    partial_images=integer(0, 3),
    quality=one_of("standard", "low", "medium", "high", "auto"),
)

#: The answer that is not streamed.
ANSWER: Final = thing(
    "created",
    created=INTEGER,
    data={"type": "array", "items": thing(b64_json=TEXT, url=TEXT, revised_prompt=TEXT)},
    background=one_of("transparent", "opaque"),
    output_format=one_of("png", "webp", "jpeg"),
    size=one_of("1024x1024", "1024x1536", "1536x1024"),
    quality=one_of("low", "medium", "high"),
    usage=thing(
        "input_tokens output_tokens total_tokens input_tokens_details",
        input_tokens_details=_TOKENS,
        output_tokens_details=_TOKENS,
        **_MANY,
    ),
)

#: One event of the answer that is.
EVENT: Final = either(
    thing(
        f"{_OF_ALL_EVENTS} partial_image_index",
        type=one_of("image_edit.partial_image"),
        partial_image_index=INTEGER,
        **_MADE,
    ),
    thing(
        f"{_OF_ALL_EVENTS} usage",
        type=one_of("image_edit.completed"),
        usage=thing(
            "input_tokens output_tokens total_tokens input_tokens_details",
            input_tokens_details=_TOKENS,
            **_MANY,
        ),
        **_MADE,
    ),
)

#: The answer that is an error holds one of these as ``error``.
ERROR: Final = thing(
    "type message param code",
    type=TEXT,
    message=TEXT,
    param=either(TEXT, {"type": "null"}),
    code=either(TEXT, {"type": "null"}),
)


def published(document: Mapping[str, Any]) -> dict[str, Schema]:
    """The same four of the document."""
    operation = document["paths"]["/images/edits"]["post"]
    answers = operation["responses"]["200"]["content"]
    return {
        name: _short(document, schema)
        for name, schema in {
            "FORM": operation["requestBody"]["content"]["multipart/form-data"]["schema"],
            "ANSWER": answers["application/json"]["schema"],
            "EVENT": answers["text/event-stream"]["schema"],
            "ERROR": document["components"]["schemas"]["ErrorResponse"]["properties"]["error"],
        }.items()
    }


def _short(document: Mapping[str, Any], schema: Schema) -> Schema:
    """Without references, prose, defaults, formats, and the null that a form cannot send.

    Where a text is allowed beside those that are named, these alone will do; models come faster than documents.
    """
    if "$ref" in schema:
        return _short(document, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        options = [_short(document, option) for option in schema["anyOf"]]
        if TEXT in options:
            named = [option for option in options if "enum" in option]
            if named:
                return TEXT if "gpt-image-1" in named[0]["enum"] else named[0]
        if len(options) == 2 and options[1] == {"type": "null"} and options[0] != TEXT:
            return options[0]
        return either(*options)
    short = {key: value for key, value in schema.items() if key in ("type", "minimum", "maximum", "maxItems")}
    if "enum" in schema:
        short["enum"] = sorted(schema["enum"])
    if "items" in schema:
        short["items"] = _short(document, schema["items"])
    if short["type"] == "object":
        short["properties"] = {name: _short(document, each) for name, each in schema.get("properties", {}).items()}
        short["required"] = sorted(schema.get("required", []))
    return short


if __name__ == "__main__":
    document = json.loads(Path(sys.argv[1]).read_bytes())
    version = document["info"]["version"]
    ours = {"FORM": FORM, "ANSWER": ANSWER, "EVENT": EVENT, "ERROR": ERROR}
    theirs = published(document)
    for name in ours:
        print(f"{name}: {'the same' if ours[name] == theirs[name] else json.dumps(theirs[name], indent=2)}")
    sys.exit(ours != theirs or version != VERSION)
