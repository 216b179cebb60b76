"""Where this service depends on internals of libraries: what an upgrade has to be checked against.

The first two tests find by themselves what our classes override and use of the classes they extend, so a new dependency
fails here until it is declared. Signatures and fingerprints tell which of them an upgrade has changed. To accept a
change, read the library's new code beside ours, then update the table.
"""

import ast
import hashlib
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import socketio
from engineio.async_socket import AsyncSocket
from engineio.base_server import BaseServer as EngineBase
from openai import AsyncOpenAI
from socketio.base_server import BaseServer as SocketBase
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.server import ServerProtocol

import adapters
import api

SRC = Path(__file__).parent.parent.parent / "src"
LIBRARIES = {"engineio", "socketio", "uvicorn", "starlette", "openai"}

#: What our classes override, with the library's signature or value.
OVERRIDDEN = {
    "adapters.realtime.engineio_server.EngineServer": {
        "generate_id": "(self)",
    },
    "adapters.realtime.socketio_server.SocketServer": {
        "_engineio_server_class": "(self)",
        "emit": "(self, event, data=None, to=None, room=None, skip_sid=None, namespace=None, callback=None, "
        "ignore_queue=False)",
        "enter_room": "(self, sid, room, namespace=None)",
    },
    "adapters.serving.http_protocol.HttpProtocol": {
        "_should_upgrade": "(self) -> 'bool'",
        "_start_asgi_task": "(self, cycle: 'RequestResponseCycle', app: 'ASGI3Application') -> 'None'",
        "connection_lost": "(self, exc: 'Exception | None') -> 'None'",
        "connection_made": "(self, transport: 'asyncio.Transport') -> 'None'",
        "data_received": "(self, data: 'bytes') -> 'None'",
        "on_body": "(self, body: 'bytes') -> 'None'",
        "on_headers_complete": "(self) -> 'None'",
        "on_message_begin": "(self) -> 'None'",
        "on_message_complete": "(self) -> 'None'",
        "on_response_complete": "(self) -> 'None'",
        "send_400_response": "(self, msg: 'str') -> 'None'",
    },
    "adapters.serving.uvicorn_server.Server": {
        "handle_exit": "(self, sig: 'int', frame: 'FrameType | None') -> 'None'",
        "on_tick": "(self, counter: 'int') -> 'bool'",
        "shutdown": "(self, sockets: 'list[socket.socket] | None' = None) -> 'None'",
        "startup": "(self, sockets: 'list[socket.socket] | None' = None) -> 'None'",
    },
    "adapters.serving.websocket_protocol.WebSocketProtocol": {
        "connection_lost": "(self, exc: 'Exception | None') -> 'None'",
        "data_received": "(self, data: 'bytes') -> 'None'",
        "handle_connect": "(self, event: 'Request') -> 'None'",
        "send": "(self, message: 'ASGISendEvent') -> 'None'",
        "send_receive_event_to_app": "(self) -> 'None'",
    },
}

#: What our classes use of the classes they extend, besides what they override.
USED = {
    "adapters.realtime.engineio_server.EngineServer": {
        "compression_threshold",
        "handlers",
        "max_http_buffer_size",
        "ping_interval",
        "ping_timeout",
        "sockets",
    },
    "adapters.realtime.socketio_server.SocketServer": {"eio"},
    "adapters.serving.http_protocol.HttpProtocol": {
        "_unset_keepalive_if_required",
        "client",
        "cycle",
        "flow",
        "handle_websocket_upgrade",
        "headers",
        "loop",
        "parser",
        "pipeline",
        "scope",
        "transport",
        "url",
    },
    "adapters.serving.uvicorn_server.Server": {"server_state", "should_exit", "started"},
    "adapters.serving.websocket_protocol.WebSocketProtocol": {
        "close_sent",
        "conn",
        "curr_msg_data_type",
        "frames",
        "handshake_complete",
        "handshake_initiated",
        "scope",
        "transport",
        "writable",
    },
    "api.rest.routes.Route": {"endpoint"},
    "api.rest.schemas.Json": {"body", "raw_headers", "status_code"},
}

#: Private names of libraries that are imported, or used on an object other than ``self``.
PRIVATE = {"_custom_headers", "_srcfile"}

#: Undocumented attributes of library objects that we hold, as their classes declare them.
ATTRIBUTES: dict[type, set[str]] = {
    EngineBase: {"handlers", "sockets"},
    RequestResponseCycle: {
        "chunked_encoding",
        "expected_content_length",
        "keep_alive",
        "more_body",
        "response_complete",
        "scope",
        "transport",
        "waiting_for_100_continue",
    },
    ServerProtocol: {"handshake_exc"},
    ServerState: {"connections", "tasks"},
    SocketBase: {"eio"},
}

#: Methods of libraries that our code replaces with a body of its own, which has to go on doing what they do.
REPLACED: dict[Any, str] = {
    AsyncOpenAI.__init__: "caf17de14fbf",
    AsyncSocket.close: "faa2e9390254",
    AsyncSocket.poll: "826f58a9f360",
    AsyncSocket.receive: "a91ae36ec2fb",
    EngineBase.__init__: "a06b17502fbd",
    socketio.AsyncServer._handle_connect: "c97c480cf777",
    socketio.AsyncServer._handle_eio_connect: "76704886d944",
    socketio.AsyncServer._handle_eio_disconnect: "9344593148b6",
    socketio.AsyncServer._handle_eio_message: "bef50fc0e163",
    socketio.AsyncServer._handle_event_internal: "472e8b723a12",
    SocketBase.__init__: "6b998e091b34",
    HttpToolsProtocol._should_upgrade: "8fcad1ab8e09",
    HttpToolsProtocol.data_received: "010a7ae59a5d",
    HttpToolsProtocol.send_400_response: "ae5a4a3782b6",
    ServerProtocol.reject: "9d2df62f1952",
    WebSocketsSansIOProtocol.handle_connect: "fc648c2161ff",
    WebSocketsSansIOProtocol.send: "d4919ed760ce",
    WebSocketsSansIOProtocol.send_receive_event_to_app: "a2b10de91477",
}


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


@cache
def _subclasses() -> dict[str, type]:
    """Our classes that extend a class of these libraries."""
    return {
        f"{module.__name__}.{name}": each
        for package in (adapters, api)
        for module in _modules(package)
        for name, each in vars(module).items()
        if isinstance(each, type) and each.__module__ == module.__name__ and _foreign_bases(each)
    }


def _foreign_bases(ours: type) -> list[type]:
    return [base for base in ours.__mro__[1:] if base.__module__.partition(".")[0] in LIBRARIES]


def _self_attributes(each: type, context: type[ast.expr_context] | None = None) -> set[str]:
    """The names used as ``self.name`` in the source of a class; with `context`, only those stored there."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and (context is None or isinstance(node.ctx, context))
    }


@cache
def _members(each: type) -> set[str]:
    """The attributes, annotated fields and methods of a library's class."""
    return _self_attributes(each, ast.Store) | set(inspect.get_annotations(each)) | set(vars(each))


def _overridden(ours: type) -> Iterator[tuple[str, str]]:
    for name in vars(ours):
        theirs = [vars(base)[name] for base in _foreign_bases(ours) if name in vars(base)]
        if theirs and not name.startswith("__"):
            yield name, str(inspect.signature(theirs[0])) if callable(theirs[0]) else repr(theirs[0])


def test_every_override_of_a_library_is_declared_with_its_signature() -> None:
    found = {(name, *override) for name, each in _subclasses().items() for override in _overridden(each)}
    assert found ^ {(name, *override) for name in OVERRIDDEN for override in OVERRIDDEN[name].items()} == set()


def test_everything_used_of_an_extended_class_is_declared() -> None:
    found = {
        (name, used)
        for name, each in _subclasses().items()
        for used in _self_attributes(each) & set().union(*map(_members, _foreign_bases(each))) - set(vars(each))
    }
    assert found ^ {(name, used) for name in USED for used in USED[name]} == set()


def test_every_private_name_of_a_library_is_declared() -> None:
    defined, used = set[str](), set[str]()
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    defined.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    defined.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    defined.add(name)
                case ast.Attribute(value=ast.Name(id="os")):
                    pass  # `os._exit` is documented.
                case ast.Attribute(attr=name) if name.startswith("_") and not name.startswith("__"):
                    used.add(name)
                case ast.ImportFrom(module=str(name)) if "._" in name:
                    used.add(name)
    documented = {"_asdict", "_fields", "_make", "_replace"}  # Of named tuples.
    private = used - defined - documented
    assert private - set().union(*USED.values()) == PRIVATE


@pytest.mark.parametrize("each", ATTRIBUTES, ids=lambda each: each.__name__)
def test_every_undocumented_attribute_that_is_used_is_still_there(each: type) -> None:
    assert ATTRIBUTES[each] - set().union(*map(_members, each.__mro__[:-1])) == set()


@pytest.mark.parametrize("replaced", REPLACED, ids=lambda replaced: replaced.__qualname__)
def test_every_replaced_method_has_the_recorded_fingerprint(replaced: Any) -> None:
    """If this fails, compare the library's method with what replaces it here, then store the new fingerprint."""
    assert hashlib.sha256(inspect.getsource(replaced).encode()).hexdigest()[:12] == REPLACED[replaced]
