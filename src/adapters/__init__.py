"""Implementations of the domain's ports."""

from typing import Final

#: The ASGI scope extension with a connection's transport: `serving` offers it; sockets and event streams abort it.
TRANSPORT: Final = "stagecast.transport"
