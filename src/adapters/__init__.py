"""Implementations of the domain's ports."""

from typing import Final

#: The ASGI scope extension with a WebSocket's transport: `serving` offers it, and `realtime` aborts the transport.
TRANSPORT: Final = "stagecast.transport"
