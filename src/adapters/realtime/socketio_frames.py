"""The Socket.IO forms of an event (`domain.device.Encoder`), and of every other packet, as Engine.IO packets."""

from typing import Final

from engineio.packet import MESSAGE, Packet
from socketio import packet as wire

from domain.feed import Logged


class _Announcements:
    def announcement(self, name: str, data: bytes) -> Packet:
        return Packet(MESSAGE, data=f'2["{name}",{data.decode()}]')


class _CursorAsArgument(_Announcements):
    """The cursor is a last argument of the event: clients that recover remember it."""

    def event(self, entry: Logged, cursor: str) -> Packet:
        return Packet(MESSAGE, data=f'2["{entry.name}",{_json(entry)},"{cursor}"]')


class _CursorAsKey(_Announcements):
    """The cursor is a key of the event: for handlers that take exactly one argument."""

    def event(self, entry: Logged, cursor: str) -> Packet:
        return Packet(MESSAGE, data=f'2["{entry.name}",{_json(entry)[:-1]},"cursor":"{cursor}"}}]')


CURSOR_AS_ARGUMENT: Final = _CursorAsArgument()
CURSOR_AS_KEY: Final = _CursorAsKey()


def frame(packet: wire.Packet) -> Packet:
    """This packet as a frame."""
    return Packet(MESSAGE, data=packet.encode())


def parse(data: object) -> wire.Packet:
    """The packet that a client sent. Raises (mostly ValueError) if it is malformed."""
    if not isinstance(data, str) or not data:
        raise ValueError
    return wire.Packet(encoded_packet=data)


def _json(entry: Logged) -> str:
    assert entry.event is not None
    return entry.event.decode()
