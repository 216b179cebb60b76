"""Which addresses a user's URL may connect to."""

import asyncio
import socket
import threading
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.outbound.url_fetcher import IPAddress, IPNetwork, UrlFetcher, is_public, system_resolver
from support.builders import PROPERTY
from support.sites import (
    BROKEN,
    FORBIDDEN,
    INTAKE,
    LOOPBACK,
    PUBLIC,
    SITE,
    UNUSED_ADDRESS,
    Canary,
    FakeResolver,
    Site,
    canary_names,
    fetcher_with,
    redirect,
    refused,
)

# --- which addresses are public --------------------------------------------------------------------------

#: IANA's registries of special-purpose addresses as of 2025, except globally reachable ones; also addresses
#: of cloud services in public ranges, and IPv6 ranges with embedded IPv4 addresses.
SPECIAL: Final[Sequence[IPNetwork]] = [
    ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
        "::/3",  # unspecified, loopback, mapped, compatible, 64:ff9b::/96, 64:ff9b:1::/48, 100::/64, …
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
        *("4000::/2", "8000::/1"),  # 5f00::/16, fc00::/7, fe80::/10, fec0::/10, ff00::/8, …
    )
]


def edges(network: IPNetwork) -> list[IPAddress]:
    """The first and last address of a network, and their neighbours outside."""
    kind, first, last = type(network[0]), int(network[0]), int(network[-1])
    inside = range(2**network.max_prefixlen)
    return [kind(at) for at in (first - 1, first, last, last + 1) if at in inside]


_addresses: Final = st.one_of(
    st.ip_addresses(),
    st.ip_addresses(network="2000::/3"),
    *[st.ip_addresses(network=str(network)) for network in SPECIAL],
)


@settings(PROPERTY, max_examples=300)
@given(_addresses)
def test_addresses_outside_the_special_registries_are_public(address: IPAddress) -> None:
    assert is_public(address) == (not any(address in network for network in SPECIAL))


@pytest.mark.parametrize("network", SPECIAL, ids=str)
def test_bounds_of_special_networks_match_the_registries(network: IPNetwork) -> None:
    for address in edges(network):
        assert is_public(address) == (not any(address in each for each in SPECIAL)), address


@PROPERTY
@given(st.ip_addresses(v=4), st.integers(0, 2**80 - 1))
def test_ipv6_addresses_with_an_embedded_ipv4_address_are_not_public(inner: IPv4Address, rest: int) -> None:
    carriers = (
        f"::ffff:{inner}",
        f"::{inner}",
        f"::ffff:0:{inner}",
        f"64:ff9b::{inner}",
        f"64:ff9b:1::{inner}",
        str(IPv6Address(0x2002 << 112 | int(inner) << 80 | rest)),
        str(IPv6Address(0x20010000 << 96 | rest >> 48 << 32 | int(inner) ^ 0xFFFFFFFF)),
    )
    assert not any(is_public(ip_address(carrier)) for carrier in carriers)


@pytest.mark.parametrize("text", ["1.1.1.1", "93.184.216.34", "100.128.0.1", "2606:4700::1111", "2a00:1450:4001::8a"])
def test_ordinary_addresses_are_public(text: str) -> None:
    assert is_public(ip_address(text))


METADATA: Final = """
169.254.169.254 169.254.170.2 192.0.0.192 100.100.100.200 168.63.129.16 fd00:ec2::254 fd20:ce::254 fe80::a9fe:a9fe
"""

INTERNAL: Final = """
0.0.0.0 10.0.0.1 172.31.255.255 192.168.0.1 100.64.0.1 198.18.0.1 203.0.113.1 224.0.0.1 239.255.255.250
255.255.255.255 192.88.99.1 :: fc00::1 fec0::1 ff02::1 64:ff9b::7f00:1 64:ff9b:1::a9fe:a9fe 2002:7f00:1::
2001:0:7f00:1:: ::ffff:10.0.0.1 ::ffff:8.8.8.8 2001:db8::1 2606:4700::1111%1
"""


@pytest.mark.parametrize("text", (METADATA + INTERNAL).split())
def test_metadata_and_internal_addresses_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("host", ["", "a b", *LOOPBACK.split()])
async def test_every_spelling_of_loopback_is_refused(canary: Canary, dialled: list[Any], host: str) -> None:
    fetcher = fetcher_with(canary_names(), allow=())
    failure = await refused(fetcher, f"http://{host}:{canary.port}/a.png")
    assert dialled == []
    assert not failure.retryable


@pytest.mark.parametrize("host", ["2130706434", "127.2", "0x7f000002", "0x7f.2", "0177.2", "127.0.0x2", "0x"])
async def test_numeric_hosts_are_refused_even_if_a_resolver_accepts_them(dialled: list[Any], host: str) -> None:
    names = FakeResolver({host: [[SITE]]})
    assert (await refused(fetcher_with(names), f"http://{host}/")).sentence.endswith(FORBIDDEN)
    assert (names.asked, dialled) == ([], [])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "[::1]", "0"])
async def test_numeric_hosts_are_refused_with_the_system_resolver(
    canary: Canary, dialled: list[Any], host: str
) -> None:
    failure = await refused(UrlFetcher(INTAKE, connect_timeout=30), f"http://{host}:{canary.port}/a.png")
    assert dialled == []
    assert failure.sentence.endswith(FORBIDDEN)


@pytest.mark.parametrize("text", (METADATA + INTERNAL).split())
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_internal_addresses_are_refused(dialled: list[Any], text: str, scheme: str) -> None:
    address = ip_address(text)
    literal = f"[{text}]" if address.version == 6 else text
    fetcher = fetcher_with(FakeResolver({"inside.test": [[address]], "mixed.test": [[PUBLIC, address]]}))
    for host in (literal, "inside.test", "mixed.test"):
        failure = await refused(fetcher, f"{scheme}://{host}/latest/meta-data/")
        assert failure.sentence.endswith(FORBIDDEN)
        assert not failure.retryable
    assert dialled == []


@pytest.mark.parametrize("order", [1, -1])
async def test_name_with_any_forbidden_address_is_refused(
    site: Site, canary: Canary, dialled: list[Any], order: int
) -> None:
    answer = [SITE, PUBLIC, SITE, ip_address("127.0.0.1")][::order]
    fetcher = fetcher_with(FakeResolver({"pictures.test": [answer]}))
    assert (await refused(fetcher, site.url())).sentence.endswith(FORBIDDEN)
    assert dialled == []


async def test_connection_goes_to_the_checked_address(site: Site, canary: Canary, dialled: list[Any]) -> None:
    names = FakeResolver({"pictures.test": [[SITE], [ip_address("127.0.0.1")]]})
    fetcher = fetcher_with(names)
    await fetcher.fetch(site.url())
    assert names.asked == ["pictures.test"]
    assert [ip_address(address[0]) for address in dialled] == [SITE]

    assert (await refused(fetcher, site.url())).sentence.endswith(FORBIDDEN)
    assert names.asked == ["pictures.test"] * 2
    assert len(dialled) == 1


async def test_redirect_resolves_and_checks_the_name_again(site: Site, canary: Canary, dialled: list[Any]) -> None:
    names = FakeResolver({"pictures.test": [[SITE], [ip_address("127.0.0.1")]]})
    fetcher = fetcher_with(names)
    site.pages["/away"] = redirect(f"//pictures.test:{canary.port}/a.png")
    assert (await refused(fetcher, site.url("/away"))).sentence.endswith(FORBIDDEN)
    assert len(dialled) == 1


async def test_local_addresses_are_refused_by_default(site: Site, names: FakeResolver) -> None:
    fetcher = fetcher_with(names, allow=())
    assert (await refused(fetcher, site.url())).sentence.endswith(FORBIDDEN)
    assert site.connections == 0


async def test_allowed_ipv4_network_does_not_allow_ipv6(dialled: list[Any]) -> None:
    fetcher = fetcher_with(FakeResolver(), allow=[ip_network("127.0.0.0/8"), ip_network("10.0.0.0/8")])
    for host in ("[::1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::a00:1]"):
        assert (await refused(fetcher, f"http://{host}/")).sentence.endswith(FORBIDDEN)
    assert dialled == []


async def test_scoped_address_is_refused_even_in_an_allowed_network(dialled: list[Any]) -> None:
    fetcher = fetcher_with(FakeResolver(), allow=[ip_network("fe80::/10"), ip_network("::/0")])
    assert (await refused(fetcher, "http://[fe80::1%1]/")).sentence.endswith(FORBIDDEN)
    assert dialled == []


@pytest.mark.skipif(UNUSED_ADDRESS == SITE, reason="there are only two loopback addresses here")
async def test_next_address_is_tried_if_one_refuses(site: Site) -> None:
    names = FakeResolver({"pictures.test": [[UNUSED_ADDRESS, SITE]]})
    fetcher = fetcher_with(names, allow=[ip_network(SITE), ip_network(UNUSED_ADDRESS)])
    await fetcher.fetch(site.url())
    assert site.connections == 1


async def test_system_resolver_resolves_localhost() -> None:
    found = await system_resolver("localhost")
    assert found
    assert all(address.is_loopback for address in found)


async def test_unknown_name_has_the_same_message_as_a_forbidden_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    failure = await refused(UrlFetcher(INTAKE), "http://redis.internal/")
    assert (failure.sentence.endswith(FORBIDDEN), failure.retryable) == (True, False)


async def test_temporary_dns_failure_is_retryable() -> None:
    async def resolve(host: str) -> Sequence[IPAddress]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    failure = await refused(fetcher_with(resolve), "http://pictures.test/")
    assert (failure.sentence.endswith(BROKEN), failure.retryable) == (True, True)


async def test_name_without_an_address_is_refused() -> None:
    fetcher = fetcher_with(FakeResolver({"empty.test": [[]]}))
    assert (await refused(fetcher, "http://empty.test/")).sentence.endswith(FORBIDDEN)


async def test_stalled_name_server_is_limited_by_the_connect_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def stall(*args: object, **options: object) -> list[object]:
        release.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", stall)
    try:
        async with asyncio.timeout(30):
            failure = await refused(fetcher_with(system_resolver, connect_timeout=0.05), "http://pictures.test/")
    finally:
        release.set()
    assert (failure.sentence.endswith("it took too long."), failure.retryable) == (True, True)
