"""Fixtures for fetching and for webhooks."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from adapters.outbound.url_fetcher import UrlFetcher
from support.builders import SteppableClock, WholeLog
from support.event_log import LOGS
from support.provider_faults import closed_port
from support.provider_faults import listening as origin_listening
from support.sites import PNG, SITE, Canary, FakeResolver, Site, fetcher_with, listening, page
from support.webhooks import Receiver


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site(pages={"/a.png": page(PNG)})
    async with listening(site.serve, str(SITE)) as site.port:
        yield site


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    """Listens on the loopback addresses of both IP versions. Checks after the test that nothing connected."""
    canary = Canary(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        canary.visits.append(writer.get_extra_info("sockname"))

    async with contextlib.AsyncExitStack() as stack:
        canary.port = await stack.enter_async_context(listening(serve, "127.0.0.1"))
        if str(SITE) != "::1":
            with contextlib.suppress(OSError):
                await stack.enter_async_context(listening(serve, "::1", canary.port))
        yield canary
        await asyncio.sleep(0.01)
        assert canary.visits == []


@pytest.fixture
def names() -> FakeResolver:
    return FakeResolver({"pictures.test": [[SITE]], "other.test": [[SITE]]})


@pytest.fixture
def fetcher(names: FakeResolver) -> UrlFetcher:
    return fetcher_with(names)


@pytest.fixture(params=LOGS)
async def log(request: pytest.FixtureRequest) -> AsyncIterator[WholeLog]:
    async with LOGS[request.param](clock=SteppableClock(), outbox=True) as opened:
        yield opened


@pytest.fixture
async def memory() -> AsyncIterator[WholeLog]:
    async with LOGS["memory"](clock=SteppableClock(), outbox=True) as opened:
        yield opened


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with origin_listening(receiver.origin):
        yield receiver


@pytest.fixture
def port() -> Iterator[int]:
    """A port without a listener."""
    with closed_port() as port:
        yield port


@pytest.fixture(autouse=True)
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses of connection attempts. Only loopback is connected to."""
    connect = socket.socket.connect
    addresses: list[Any] = []

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX:
            return connect(self, address)
        addresses.append(address)
        assert ip_address(address[0]).is_loopback, f"{address} is outside"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    return addresses
