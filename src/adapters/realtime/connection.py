"""One client's connection to the default namespace."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from socketio import packet as wire

from adapters.realtime.engineio_socket import EngineSocket
from adapters.realtime.frames import CURSOR_AS_ARGUMENT, CURSOR_AS_KEY, message
from domain.device import Device, Encoder
from domain.identity import Identity


@dataclass(eq=False, slots=True)
class Connection:
    """What is known of the client, and how to reach it."""

    sid: str
    socket: EngineSocket
    device: Device[bytes] | None = None
    #: The authenticated identity.
    identity: Identity | None = None
    #: Whether the client can recover; it then gets each event's cursor as a last argument.
    recovery: bool = True
    #: The session that the client may resume, if any.
    pid: str | None = None
    #: The client's cursor in a session that cannot be resumed.
    offset: object = None

    def encoder(self, *, recovery: bool) -> Encoder[bytes]:
        """The form of its events: with the cursor as an argument (`recovery`) or as a key."""
        return CURSOR_AS_ARGUMENT if recovery else CURSOR_AS_KEY

    def emit(self, name: str, data: Mapping[str, Any]) -> None:
        """Send one event to this client alone."""
        self.socket.buffer.put(message(wire.Packet(wire.EVENT, data=[name, dict(data)])))


#: The ack, and what is done once it is queued.
Answer = tuple[Mapping[str, Any], Callable[[], None]]
#: Called with a connection and the event's one argument, or the handshake's ``auth``. A `Refusal` refuses.
Handler = Callable[[Connection, Any], Awaitable[Answer]]


class Handlers(Protocol):
    """What is called for what clients send."""

    @property
    def events(self) -> Mapping[str, Handler]:
        """The handlers by event."""

    async def on_connect(self, connection: Connection, auth: Any) -> Answer:
        """The handler of the handshake."""

    async def on_disconnect(self, connection: Connection, permanent: bool) -> None:
        """Called once a connection with a pid has ended; `permanent` if its client sent DISCONNECT."""
