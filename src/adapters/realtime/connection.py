"""One client's connection to the default namespace."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from socketio import packet as wire

from adapters.realtime.engineio_socket import EngineSocket
from adapters.realtime.frames import CURSOR_AS_ARGUMENT, CURSOR_AS_KEY, message
from adapters.realtime.send_buffer import BoundedSendBuffer
from domain.device import Device, Encoder
from domain.identity import Identity


@dataclass(eq=False, slots=True)
class Connection:
    """See `api.realtime.sockets.Connection`."""

    sid: str
    socket: EngineSocket
    device: Device[bytes] | None = None
    identity: Identity | None = None
    recovery: bool = True
    pid: str | None = None
    offset: object = None

    @property
    def buffer(self) -> BoundedSendBuffer[bytes]:
        return self.socket.buffer

    @property
    def gone(self) -> bool:
        return self.socket.gone

    def encoder(self, *, recovery: bool) -> Encoder[bytes]:
        return CURSOR_AS_ARGUMENT if recovery else CURSOR_AS_KEY

    def emit(self, name: str, data: Mapping[str, Any]) -> None:
        """Send one event to this client alone."""
        self.buffer.put(message(wire.Packet(wire.EVENT, data=[name, dict(data)])))


#: The ack, and what is done once it is queued.
Answer = tuple[Mapping[str, Any], Callable[[], None]]
#: Called with a connection and the event's one argument, or the handshake's ``auth``. A `Refusal` refuses.
Handler = Callable[[Connection, Any], Awaitable[Answer]]
