"""``GET /asyncapi.json``: the events of Socket.IO and event streams as AsyncAPI 3, from the models of OpenAPI."""

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

#: The models of the other messages.
_NOTICES: Final[dict[str, tuple[type[BaseModel], ...]]] = {
    "authenticated": (Welcome, Refused),
    QUEUE_POSITION: (QueuePosition,),
    GENERATION_REMOVED: (GenerationRemoved,),
    "authentication_required": (ConnectionEnd,),
    "authentication_expired": (ConnectionEnd,),
}
_REQUESTS: Final[dict[str, tuple[type[BaseModel], type[BaseModel]]]] = {
    "authenticate": (Authenticate, Welcome),
    "subscribe_to_generation": (Subscribe, Subscribed),
}


def document(version: str, public_url: str) -> dict[str, Any]:
    """The description of this service."""
    models: set[type[BaseModel]] = {
        SocketEvent,
        Refused,
        *(each for group in (*_NOTICES.values(), *_REQUESTS.values()) for each in group),
    }
    inputs: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in models]
    schemas = models_json_schema(inputs, ref_template=_SCHEMAS, schema_generator=_NeverNull)[1]["$defs"]
    messages = {
        name: _message(name, {"allOf": [_schema(SocketEvent), rule]}, f"A generation's event: `{name}`.")
        for name, rule in _EVENTS.items()
    }
    messages |= {name: _message(name, _one_of(models), models[0].__doc__) for name, models in _NOTICES.items()}
    for name, (argument, ack) in _REQUESTS.items():
        messages[name] = _message(name, _schema(argument), "Sent by the client.")
        messages[f"{name}_ack"] = _message(f"{name}_ack", _one_of((ack, Refused)), ack.__doc__)
    public = urlsplit(public_url)
    host = {"host": public.netloc, "pathname": public.path or "/"}
    feed = [*_EVENTS, "authenticated", QUEUE_POSITION, GENERATION_REMOVED, "authentication_expired"]
    generation = [*_EVENTS, "authentication_expired"]
    channels = {
        "socket": ("/socket.io", "The default namespace of Socket.IO.", [*messages]),
        "feed": ("/events", "With `Accept: text/event-stream`: everything of the caller.", feed),
        "generation": ("/generations/{generationId}/events", "With the same header: one generation.", generation),
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Stagecast",
            "version": version,
            "description": "HTTP operations are in `/openapi.json`.",
        },
        "servers": {
            "socketio": {**host, "protocol": "socket.io", "protocolVersion": "5"},
            "http": {**host, "protocol": public.scheme},
        },
        "defaultContentType": "application/json",
        "channels": {
            key: {
                "address": address,
                "description": description,
                "servers": [{"$ref": f"#/servers/{'socketio' if key == 'socket' else 'http'}"}],
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
                **({"parameters": {"generationId": {}}} if "{" in address else {}),
            }
            for key, (address, description, names) in channels.items()
        },
        "operations": {
            "socketEvents": {"action": "send", **_messages("socket", [*_EVENTS, *_NOTICES])},
            "feedEvents": {"action": "send", **_messages("feed", feed)},
            "generationEvents": {"action": "send", **_messages("generation", generation)},
        }
        | {
            name: {
                "action": "receive",
                **_messages("socket", [name]),
                "reply": _messages("socket", [f"{name}_ack"]),
            }
            for name in _REQUESTS
        },
        "components": {"messages": messages, "schemas": schemas},
    }


def _schema(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _SCHEMAS.format(model=model.__name__)}


def _one_of(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    return {"oneOf": [_schema(each) for each in models]} if len(models) > 1 else _schema(models[0])


def _message(name: str, payload: dict[str, Any], summary: str | None) -> dict[str, Any]:
    return {"name": name, "summary": summary, "payload": payload}


def _messages(channel: str, names: list[str]) -> dict[str, Any]:
    where = f"#/channels/{channel}"
    return {"channel": {"$ref": where}, "messages": [{"$ref": f"{where}/messages/{name}"} for name in names]}
