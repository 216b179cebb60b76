"""Implementations of the domain's ports."""

from typing import Final

#: The ASGI scope extension with a connection's transport: `serving` offers it; sockets and event streams abort it.
TRANSPORT: Final = "stagecast.transport"
#: The ASGI scope extension with a function that writes one finished frame to a WebSocket; False: it has to wait.
WRITE_FRAME: Final = "stagecast.write_frame"
#: The ASGI scope extension with a context manager, in which the request may open another connection: it is counted.
DESCRIPTOR: Final = "stagecast.descriptor"
