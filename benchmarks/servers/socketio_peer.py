"""A bare python-socketio server on uvicorn with its defaults: a user's sockets are in a room.

python -m benchmarks.servers.socketio_peer USERS
"""

import asyncio
import socket
import sys
from typing import Any

import socketio
import uvicorn

from benchmarks.servers import control


async def main(users: int) -> None:
    """Serve until stdin ends."""
    server = socketio.AsyncServer(async_mode="asgi", cors_allowed_origins="*")

    @server.event  # type: ignore[untyped-decorator]
    async def connect(sid: str, environ: dict[str, Any], auth: dict[str, str]) -> None:
        await server.enter_room(sid, auth["userId"])

    async def emit(mode: str, user: int, message: str | None) -> None:
        await server.emit("continue", control.data(message), room=f"u{user}")

    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        config = uvicorn.Config(socketio.ASGIApp(server), log_level="warning")
        control.obey(users, emit)
        control.say(port=listener.getsockname()[1])
        await uvicorn.Server(config).serve([listener])


if __name__ == "__main__":
    # uvicorn's default loop where it is installed, which `uvicorn.run` would choose.
    from uvloop import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main(int(sys.argv[1])))
