"""``GET /asyncapi.json``: the events of Socket.IO and event streams as AsyncAPI 3, with the models of OpenAPI.

What these models do not say is in the file ``asyncapi.json`` beside this one.
"""

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from api.realtime.sockets import Authenticate, Subscribe, Welcome
from domain.events import Event
from domain.generation import Snapshot


class _NeverNull(GenerateJsonSchema):
    """Absent values are omitted."""

    def nullable_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"]) if schema["default"] is None else super().default_schema(schema)


class SocketEvent(Event):
    """One transition of a generation. Over Socket.IO the cursor is a second argument; `recovery: false`: a key."""

    cursor: Annotated[str | None, Field(description="with `recovery: false`")] = None


class Subscribed(Snapshot):
    """The answer to `subscribe_to_generation`."""

    ok: Literal[True]


_MODELS: Final[list[tuple[type[BaseModel], JsonSchemaMode]]] = [
    (model, "validation") for model in (SocketEvent, Authenticate, Welcome, Subscribe, Subscribed)
]


@cache
def document(version: str, public_url: str) -> dict[str, Any]:
    """The description of this service."""
    content: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    reference = "#/components/schemas/{model}"
    schemas = models_json_schema(_MODELS, ref_template=reference, schema_generator=_NeverNull)[1]["$defs"]
    content["components"]["schemas"] |= schemas
    content["info"]["version"] = version
    public = urlsplit(public_url)
    for server in content["servers"].values():
        server |= {"host": public.netloc, "pathname": public.path or "/"}
    content["servers"]["http"]["protocol"] = public.scheme
    return content
