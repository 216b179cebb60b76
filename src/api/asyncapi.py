"""``GET /asyncapi.json``: the events of Socket.IO and event streams as AsyncAPI 3, from the models of OpenAPI."""

from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from api.realtime.sockets import Authenticate, Subscribe, Welcome
from domain.events import CONTINUE, GENERATION_REMOVED, NAMES, QUEUE_POSITION, Event, Wire
from domain.generation import Snapshot

_SCHEMAS: Final = "#/components/schemas/{model}"


class _NeverNull(GenerateJsonSchema):
    """Absent values are omitted."""

    def nullable_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"]) if schema["default"] is None else super().default_schema(schema)


class SocketEvent(Event):
    """One transition of a generation. Over Socket.IO the cursor is a second argument; `recovery: false`: a key."""

    cursor: Annotated[str | None, Field(description="with `recovery: false`")] = None


class Refused(Wire):
    """The answer to an event that the service refuses."""

    ok: Literal[False]
    code: str
    message: str


class Subscribed(Snapshot):
    """The answer to `subscribe_to_generation`."""

    ok: Literal[True]


class QueuePosition(Wire):
    """The place in line of a generation that waits for a worker has changed. Not part of the history."""

    generation_id: str
    queue_position: Annotated[int, Field(ge=1)]


class GenerationRemoved(Wire):
    """A generation was removed. Not part of the history."""

    generation_id: str


class ConnectionEnd(Wire):
    """Why the service closes the connection."""

    code: str


#: Of each event of a generation, what holds besides the model.
_EVENTS: Final[dict[str, dict[str, Any]]] = {
    name: {"properties": {"status": {"const": status}}} for status, name in NAMES.items()
} | {CONTINUE: {"properties": {"status": {"not": {"enum": list(NAMES)}}}}}
_EVENTS[NAMES["failed"]]["required"] = ["error", "code", "failedStage", "retryable"]

#: The models of the other messages: what the service sends, and what clients send with its acks.
_NOTICES: Final[dict[str, tuple[type[BaseModel], ...]]] = {
    "authenticated": (Welcome, Refused),
    QUEUE_POSITION: (QueuePosition,),
    GENERATION_REMOVED: (GenerationRemoved,),
    "authentication_required": (ConnectionEnd,),
    "authentication_expired": (ConnectionEnd,),
}
_REQUESTS: Final[dict[str, tuple[type[BaseModel], ...]]] = {
    "authenticate": (Authenticate,),
    "authenticate_ack": (Welcome, Refused),
    "subscribe_to_generation": (Subscribe,),
    "subscribe_to_generation_ack": (Subscribed, Refused),
}
_ON_STREAMS: Final = [*_EVENTS, "authentication_expired"]


@cache
def document(version: str, public_url: str) -> dict[str, Any]:
    """The description of this service."""
    others = _NOTICES | _REQUESTS
    inputs: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (model, "validation") for model in {SocketEvent}.union(*others.values())
    ]
    schemas = models_json_schema(inputs, ref_template=_SCHEMAS, schema_generator=_NeverNull)[1]["$defs"]
    messages = {
        name: {"summary": f"A generation's event: `{name}`.", "payload": {"allOf": [_schema(SocketEvent), rule]}}
        for name, rule in _EVENTS.items()
    } | {
        name: {"summary": models[0].__doc__, "payload": {"oneOf": [_schema(model) for model in models]}}
        for name, models in others.items()
    }
    public = urlsplit(public_url)
    host = {"host": public.netloc, "pathname": public.path or "/"}
    generation = _channel("http", "/generations/{generationId}/events", "A stream of one generation.", _ON_STREAMS)
    on_feed = [*_ON_STREAMS, "authenticated", QUEUE_POSITION, GENERATION_REMOVED]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Stagecast",
            "version": version,
            "description": "HTTP operations are in `/openapi.json`. Streams need `Accept: text/event-stream`.",
        },
        "servers": {
            "socketio": {**host, "protocol": "socket.io", "protocolVersion": "5"},
            "http": {**host, "protocol": public.scheme},
        },
        "defaultContentType": "application/json",
        "channels": {
            "socket": _channel("socketio", "/socket.io", "The default namespace of Socket.IO.", messages),
            "feed": _channel("http", "/events", "A stream of everything of the caller.", on_feed),
            "generation": {**generation, "parameters": {"generationId": {}}},
        },
        "operations": {
            "socketEvents": _operation("send", "socket", *_EVENTS, *_NOTICES),
            "feedEvents": _operation("send", "feed", *on_feed),
            "generationEvents": _operation("send", "generation", *_ON_STREAMS),
        }
        | {
            name: {**_operation("receive", "socket", name), "reply": _messages("socket", f"{name}_ack")}
            for name in ("authenticate", "subscribe_to_generation")
        },
        "components": {"messages": messages, "schemas": schemas},
    }


def _schema(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _SCHEMAS.format(model=model.__name__)}


def _channel(server: str, address: str, description: str, names: Iterable[str]) -> dict[str, Any]:
    return {
        "address": address,
        "description": description,
        "servers": [{"$ref": f"#/servers/{server}"}],
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
    }


def _operation(action: str, channel: str, *names: str) -> dict[str, Any]:
    return {"action": action, **_messages(channel, *names)}


def _messages(channel: str, *names: str) -> dict[str, Any]:
    where = f"#/channels/{channel}"
    return {"channel": {"$ref": where}, "messages": [{"$ref": f"{where}/messages/{name}"} for name in names]}
