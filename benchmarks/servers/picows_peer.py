"""A WebSocket broadcast with picows and without Socket.IO: a floor for Python.

python -m benchmarks.servers.picows_peer USERS
"""

import asyncio
import json
import sys
from collections import defaultdict

import picows
import uvloop

from benchmarks.servers import control

rooms: defaultdict[int, set[picows.WSTransport]] = defaultdict(set)


class Listener(picows.WSListener):  # type: ignore[misc]
    """One connection."""

    def __init__(self, user: int) -> None:
        super().__init__()
        self.user = user

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        """Called by picows."""
        rooms[self.user].add(transport)

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        """Called by picows."""
        rooms[self.user].discard(transport)


async def emit(mode: str, user: int, message: str | None) -> None:
    """Send an event to all sockets of this user."""
    text = b'42["continue",%b]' % json.dumps(control.data(message), separators=(",", ":")).encode()
    for transport in rooms[user]:
        transport.send(picows.WSMsgType.TEXT, text)


async def main(users: int) -> None:
    """Serve until stdin ends."""
    server = await picows.ws_create_server(
        lambda request: Listener(int(request.path.rsplit(b"u=", 1)[1])), "127.0.0.1", 0, backlog=4096
    )
    control.obey(users, emit)
    control.say(port=server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(int(sys.argv[1])))
