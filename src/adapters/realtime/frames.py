"""Frames: what a client is sent, as the bytes of a finished WebSocket frame, made once for all its receivers.

Such a frame is the same for every WebSocket because compression is never negotiated. A polling answer takes the
Engine.IO packet out of it.
"""

from typing import Final

from engineio import packet as engine
from socketio import packet as wire

from domain.feed import Logged


def frame(packet: bytes) -> bytes:
    """The frame with this Engine.IO packet (RFC 6455, section 5.2: final, text, not masked)."""
    size = len(packet)
    if size < 126:
        return b"\x81%c%b" % (size, packet)
    if size < 1 << 16:
        return b"\x81\x7e%b%b" % (size.to_bytes(2), packet)
    return b"\x81\x7f%b%b" % (size.to_bytes(8), packet)


def packet_in(frame: bytes) -> bytes:
    """The Engine.IO packet in a frame."""
    return frame[{126: 4, 127: 10}.get(frame[1], 2) :]


def _control(kind: int) -> bytes:
    return frame(engine.Packet(kind).encode().encode())


PING: Final = _control(engine.PING)
NOOP: Final = _control(engine.NOOP)


class _Encoder:
    """`domain.device.Encoder`."""

    def __init__(self, template: bytes, end: int | None) -> None:
        """`template`: of the packet, with name, event up to `end`, and cursor."""
        self._template, self._end = template, end

    def event(self, entry: Logged, cursor: str) -> bytes:
        event = entry.event
        assert event is not None
        if not event.isascii():
            event.decode()  # Browsers close a connection on which text is not UTF-8.
        return frame(self._template % (entry.name.encode(), event[: self._end], cursor.encode()))

    def announcement(self, name: str, data: bytes) -> bytes:
        return frame(b'42["%b",%b]' % (name.encode(), data))


#: The cursor is a last argument of the event: clients that recover remember it.
CURSOR_AS_ARGUMENT: Final = _Encoder(b'42["%b",%b,"%b"]', None)
#: The cursor is a key of the event: for handlers that take exactly one argument.
CURSOR_AS_KEY: Final = _Encoder(b'42["%b",%b,"cursor":"%b"}]', -1)


def message(packet: wire.Packet) -> bytes:
    """The frame with this Socket.IO packet."""
    return frame(engine.Packet(engine.MESSAGE, packet.encode()).encode().encode())


def parse(data: object) -> wire.Packet:
    """The Socket.IO packet that a client sent. Raises (mostly ValueError) if it is malformed."""
    if not isinstance(data, str) or not data:
        raise ValueError
    return wire.Packet(encoded_packet=data)
