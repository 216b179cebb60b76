"""Passes the requests for a session on to the node that the session's id names.

A request is passed on as a new one with a body and one header: what is asked, signed with a secret that only nodes
know. So nothing that a client sent becomes part of a request's head, and it goes to an address in the list of nodes.
What another node has passed on is never passed on again.
"""

import asyncio
import contextlib
import hmac
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

import aiohttp
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from domain.ports.nodes import Nodes

logger = logging.getLogger(__name__)

#: The header of a request that another node has passed on.
FORWARDED: Final = "x-stagecast-forwarded"
#: The method of a WebSocket in it; the others are GET and POST.
WEBSOCKET: Final = "WEBSOCKET"
#: Seconds for which its signature is valid.
_VALID: Final = 30
#: Seconds in which a connection to another node must be made, and in which a client must complete an upgrade. A killed
#: process refuses connections at once; a busy one may take a while.
_CONNECT_TIMEOUT: Final = 5.0
_UPGRADE_TIMEOUT: Final = 6.0
#: Seconds between two checks whether a node that has not answered still lives.
_CHECK_INTERVAL: Final = 2.0
#: Seconds in which a node that lives must answer: to a poll it does when the next ping is due, after 25.
_ANSWER_TIMEOUT: Final = 60.0
#: Bytes of an answer or a message of another node, and of what the kernel keeps for a client that reads slowly.
_MAX_ANSWER: Final = 16 * 1024 * 1024
_MAX_UNREAD: Final = 128 * 1024
#: A session's id: that of its node, and the rest.
_SID: Final = re.compile(r"([0-9a-f]{6})-[A-Za-z0-9_-]{20}")

_NOT_IN_TAGS: Final = re.compile(r"[^A-Za-z0-9._-]")

#: What goes wrong between two nodes.
_FAILURES: Final = (aiohttp.ClientError, aiohttp.WSMessageTypeError, OSError, TimeoutError)


class Unreachable(Exception):
    """The node of a session has ended, or does not answer."""


class Peers:
    """The other nodes."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        #: Nodes that live and could not be reached: each is logged once.
        self._unreachable: set[str] = set()

    def forwarded(self, scope: Scope) -> tuple[str, str, str] | None:
        """What another node asks by this request: the method, the session's id, and the tag of a poll.

        The tag distinguishes it from the poll before it, if the client says so. ``None``: the signature is missing,
        wrong or too old.
        """
        text, _, signature = Headers(scope=scope).get(FORWARDED, "").rpartition(" ")
        if not hmac.compare_digest(self._signature(text).encode(), signature.encode("latin-1")):
            return None
        expires, method, sid, tag = text.split(" ")
        valid = float(expires) > self.nodes.time and (method == WEBSOCKET) is (scope["type"] == "websocket")
        return (method, sid, tag) if valid else None

    async def ask(self, method: str, sid: str, tag: str, body: bytes) -> tuple[int, bytes]:
        """The status and body with which its node answers a polling request for this session. Raises `Unreachable`."""
        async with self._node_of(method, sid, tag) as (node, url, headers):
            exchange = asyncio.create_task(_exchange(url, headers, body))
            try:
                await self._wait(node, exchange)
                return exchange.result()
            finally:
                exchange.cancel()

    async def relay(self, sid: str, accept: Callable[[], Awaitable[None]], receive: Receive, send: Send) -> str | None:
        """Pass the messages of a WebSocket for this session on, both ways, until either end closes it.

        `accept` is called once the session's node has accepted its end.

        Returns: the packets that wait to be handled, if that node leaves the session to this one when the client
            upgrades; ``None``: the WebSocket has ended.

        Raises:
            Unreachable: the WebSocket has not been accepted.
        """
        async with contextlib.AsyncExitStack() as stack:
            async with self._node_of(WEBSOCKET, sid) as (node, url, headers):
                session = await stack.enter_async_context(aiohttp.ClientSession())
                async with asyncio.timeout(_CONNECT_TIMEOUT):
                    owner = await session.ws_connect(url, headers=headers, max_msg_size=_MAX_ANSWER, timeout=_CLOSE)
                stack.push_async_callback(owner.close)
                owner.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _MAX_UNREAD)
            await accept()
            with contextlib.suppress(Unreachable, asyncio.CancelledError, *_FAILURES):
                async with asyncio.timeout(_UPGRADE_TIMEOUT):
                    await _pass_up(receive, owner)  # The probe.
                    await _pass_down(owner, send)
                    await _pass_up(receive, owner)  # The upgrade: its answer is for this node.
                    answer = await owner.receive()
                if answer.type is aiohttp.WSMsgType.BINARY:
                    return str(answer.data.decode())
                ways = [asyncio.create_task(_repeat(_pass_up, receive, owner))]
                ways.append(asyncio.create_task(_repeat(_pass_down, owner, send)))
                try:
                    await self._wait(node, *ways)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
        return None

    @contextlib.asynccontextmanager
    async def _node_of(self, method: str, sid: str, tag: str = "") -> AsyncIterator[tuple[str, str, Mapping[str, str]]]:
        """The node of a session, its URL, and the headers of a request; failures are raised as `Unreachable`."""
        found = _SID.fullmatch(sid)
        node = found[1] if found else self.nodes.id
        address = None if node == self.nodes.id else await self.nodes.address(node)
        if address is None:
            raise Unreachable
        text = f"{self.nodes.time + _VALID} {method} {sid} {_NOT_IN_TAGS.sub('', tag)[:64]}"
        try:
            yield node, f"http://{address}/", {FORWARDED: f"{text} {self._signature(text)}"}
        except _FAILURES as error:
            if node not in self._unreachable:
                self._unreachable.add(node)
                logger.warning("the node at %s cannot be reached: %s", address, type(error).__name__)
            raise Unreachable from error
        self._unreachable.discard(node)

    def _signature(self, text: str) -> str:
        return hmac.new(self.nodes.secret.encode(), text.encode("latin-1"), "sha256").hexdigest()

    async def _wait(self, node: str, *tasks: asyncio.Task[Any]) -> None:
        """Wait until one of these is done. Raises `Unreachable` if their node dies first."""
        while not (await asyncio.wait(tasks, timeout=_CHECK_INTERVAL, return_when=asyncio.FIRST_COMPLETED))[0]:
            if node not in self.nodes.others:
                raise Unreachable


_TIMEOUT: Final = aiohttp.ClientTimeout(total=_ANSWER_TIMEOUT, connect=_CONNECT_TIMEOUT)
_CLOSE: Final = aiohttp.ClientWSTimeout(ws_close=1.0)


async def _exchange(url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
    # Always POST: aiohttp repeats a GET that fails, but the answer that was lost may have had events. Each exchange has
    # a connection of its own.
    request = aiohttp.request("POST", url, headers=headers, data=body, timeout=_TIMEOUT, allow_redirects=False)
    async with request as answer:
        if (answer.content_length or 0) > _MAX_ANSWER:
            raise aiohttp.ClientPayloadError
        return answer.status, await answer.content.readexactly(answer.content_length or 0)


async def _pass_up(receive: Receive, owner: aiohttp.ClientWebSocketResponse) -> None:
    message = await receive()
    if message["type"] != "websocket.receive":
        raise ConnectionError
    if message.get("text") is not None:
        await owner.send_str(message["text"])
    else:
        await owner.send_bytes(message["bytes"])


async def _pass_down(owner: aiohttp.ClientWebSocketResponse, send: Send) -> None:
    await send({"type": "websocket.send", "text": await owner.receive_str()})


async def _repeat(way: Callable[..., Awaitable[None]], *ends: Any) -> None:
    while True:
        await way(*ends)
