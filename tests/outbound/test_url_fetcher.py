"""What is fetched from a user's URL, and what never is.

Every site of these tests listens on `SITE`, which is allowed where a test says so. Every other loopback address is
forbidden ground, and a canary sits there.
"""

import asyncio
import contextlib
import gzip
import re
import socket
import ssl
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapters.images.intake import PillowIntake
from adapters.outbound.url_fetcher import (
    MAX_BYTES,
    IPAddress,
    IPNetwork,
    Resolver,
    UrlFetcher,
    is_public,
    system_resolver,
)
from domain.errors import Failure
from domain.ports import ImageFetcher, ImageIntake
from support.builders import PROPERTY
from support.doubles import TrustingIntake
from support.pictures import THREADS, opened, raw_png
from support.sites import NOBODY, OK, PNG, PUBLIC, SITE, Site, listening, page, redirect


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site(pages={"/a.png": page(PNG)})
    async with listening(site.serve, str(SITE)) as site.port:
        yield site


@dataclass
class Canary:
    """Listens where nobody may come."""

    port: int
    visits: list[object] = field(default_factory=list)


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    """On both loopback addresses, as far as there are both. Nobody has come when the test is over."""
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


@pytest.fixture(autouse=True)
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that sockets were connected to: none but loopback ever is."""
    connect = socket.socket.connect
    addresses: list[Any] = []

    def guarded(self: socket.socket, address: Any) -> None:
        addresses.append(address)
        assert ip_address(address[0]).is_loopback, f"{address} is outside"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    return addresses


class Names:
    """A resolver: each name has its answers, one per question, the last one for ever."""

    def __init__(self, answers: dict[str, list[list[IPAddress]]] | None = None) -> None:
        self.answers = answers or {}
        self.asked: list[str] = []

    async def __call__(self, host: str) -> Sequence[IPAddress]:
        self.asked.append(host)
        answers = self.answers.get(host)
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
def names() -> Names:
    return Names({"pictures.test": [[SITE]], "other.test": [[SITE]]})


INTAKE: Final = PillowIntake(THREADS)
#: Trusts nobody, and is quickly made.
WARY: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def fetcher_with(
    resolve: Resolver,
    *,
    intake: ImageIntake = INTAKE,
    allow: Sequence[IPNetwork] = (ip_network(SITE),),
    trust: ssl.SSLContext = WARY,
    deadline: float = 60,
    connect_timeout: float = 30,
) -> UrlFetcher:
    return UrlFetcher(
        intake, allow=allow, resolve=resolve, trust=trust, deadline=deadline, connect_timeout=connect_timeout
    )


@pytest.fixture
def fetcher(names: Names) -> UrlFetcher:
    return fetcher_with(names)


async def refused(fetcher: ImageFetcher, url: str) -> Failure:
    """The failure, which is fit to show: one sentence about what was fetched, and nothing of us in it."""
    with pytest.raises(Failure) as caught:
        await fetcher.fetch(url)
    failure = caught.value
    assert failure.code == "image_fetch_failed"
    prefix, _, reason = failure.sentence.partition(": ")
    assert prefix == "One of the image URLs could not be fetched"
    assert re.fullmatch(r"[a-z][A-Za-z ,]+( \(?[0-9]{3}\)?| 10 MB)?\.( [A-Z][A-Za-z0-9 ,:]+\.)?", reason), reason
    assert failure.__cause__ is None
    assert failure.__suppress_context__ or failure.__context__ is None
    return failure


FORBIDDEN: Final = "its address does not exist or is not allowed."
BROKEN: Final = "its site could not be reached, or broke off."


# --- which addresses are public --------------------------------------------------------------------------

#: The IANA registries of special-purpose addresses, as of 2025, without what is globally reachable; and beyond
#: them what clouds serve from public space, and the ways in which IPv6 carries IPv4.
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
    """The first and the last of a network, and what lies on either side."""
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
def test_public_is_what_no_registry_calls_special(address: IPAddress) -> None:
    assert is_public(address) == (not any(address in network for network in SPECIAL))


@pytest.mark.parametrize("network", SPECIAL, ids=str)
def test_a_special_network_begins_and_ends_where_its_registry_says(network: IPNetwork) -> None:
    for address in edges(network):
        assert is_public(address) == (not any(address in each for each in SPECIAL)), address


@PROPERTY
@given(st.ip_addresses(v=4), st.integers(0, 2**80 - 1))
def test_no_ipv6_address_that_carries_an_ipv4_address_is_public(inner: IPv4Address, rest: int) -> None:
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


# --- which hosts are connected to ------------------------------------------------------------------------

#: Spellings of loopback, and hosts that are none.
LOOPBACK: Final = f"""
127.0.0.1 127.1 127.0.1 127.000.000.001 127.0.0.1. 127.0.0.1.. 2130706433 017700000001 0x7f000001 0x7f.1
0x7f.0.0.0x1 0X7F.1 0177.0.0.1 00000177.1 0 0.0.0.0 0x １２７.０.０.１ 127。0。0。1 ①②⑦.⓪.⓪.① 127．0．0．1
%31%32%37.0.0.1 127.0.0.1%00.pictures.test 127.0.0.1%2f.pictures.test
[::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1] [64:ff9b::127.0.0.1] [2002:7f00:1::]
[::1%25lo] [::1%lo] [fe80::1%251] [::1 ::1 [127.0.0.1] [v1.a]
localhost LOCALHOST localhost. LocalHost.LocalDomain ⓛⓞⓒⓐⓛⓗⓞⓢⓣ loopback.pictures.test
a@127.0.0.1 pictures.test@127.0.0.1 pictures.test:80@127.0.0.1 127.0.0.1\\@pictures.test pictures.test\\@127.0.0.1
. .. - a..b xn--a.test {"a" * 64}.test {"a." * 127}test
"""


def canary_names() -> Names:
    """A name server that believes in every spelling of loopback that a C library would."""
    loopback = [ip_address("127.0.0.1")]
    names = Names({name: [loopback] for name in ("localhost", "localhost.localdomain", "loopback.pictures.test")})
    for text in LOOPBACK.split():
        with contextlib.suppress(OSError, UnicodeError):
            names.answers[text.lower()] = [[ip_address(socket.inet_ntoa(socket.inet_aton(text)))]]
    return names


@pytest.mark.parametrize("host", ["", "a b", *LOOPBACK.split()])
async def test_no_spelling_of_loopback_is_connected_to(canary: Canary, dialled: list[Any], host: str) -> None:
    fetcher = fetcher_with(canary_names(), allow=())
    failure = await refused(fetcher, f"http://{host}:{canary.port}/a.png")
    assert dialled == []
    assert not failure.retryable


@pytest.mark.parametrize("host", ["2130706434", "127.2", "0x7f000002", "0x7f.2", "0177.2", "127.0.0x2", "0x"])
async def test_a_number_is_no_name_whatever_a_resolver_makes_of_it(dialled: list[Any], host: str) -> None:
    names = Names({host: [[SITE]]})
    assert (await refused(fetcher_with(names), f"http://{host}/")).sentence.endswith(FORBIDDEN)
    assert (names.asked, dialled) == ([], [])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "[::1]", "0"])
async def test_nor_is_it_with_the_systems_resolver(canary: Canary, dialled: list[Any], host: str) -> None:
    failure = await refused(UrlFetcher(INTAKE, connect_timeout=30), f"http://{host}:{canary.port}/a.png")
    assert dialled == []
    assert failure.sentence.endswith(FORBIDDEN)


@pytest.mark.parametrize("text", (METADATA + INTERNAL).split())
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_no_internal_address_is_connected_to(dialled: list[Any], text: str, scheme: str) -> None:
    address = ip_address(text)
    literal = f"[{text}]" if address.version == 6 else text
    fetcher = fetcher_with(Names({"inside.test": [[address]], "mixed.test": [[PUBLIC, address]]}))
    for host in (literal, "inside.test", "mixed.test"):
        failure = await refused(fetcher, f"{scheme}://{host}/latest/meta-data/")
        assert failure.sentence.endswith(FORBIDDEN)
        assert not failure.retryable
    assert dialled == []


@pytest.mark.parametrize("order", [1, -1])
async def test_one_forbidden_address_among_good_ones_forbids_the_name(
    site: Site, canary: Canary, dialled: list[Any], order: int
) -> None:
    answer = [SITE, PUBLIC, SITE, ip_address("127.0.0.1")][::order]
    fetcher = fetcher_with(Names({"pictures.test": [answer]}))
    assert (await refused(fetcher, site.url())).sentence.endswith(FORBIDDEN)
    assert dialled == []


async def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    site: Site, canary: Canary, dialled: list[Any]
) -> None:
    names = Names({"pictures.test": [[SITE], [ip_address("127.0.0.1")]]})
    fetcher = fetcher_with(names)
    await fetcher.fetch(site.url())
    assert names.asked == ["pictures.test"]
    assert [ip_address(address[0]) for address in dialled] == [SITE]

    assert (await refused(fetcher, site.url())).sentence.endswith(FORBIDDEN)
    assert names.asked == ["pictures.test"] * 2
    assert len(dialled) == 1


async def test_a_name_that_changes_its_address_in_a_redirect_is_checked_again(
    site: Site, canary: Canary, dialled: list[Any]
) -> None:
    names = Names({"pictures.test": [[SITE], [ip_address("127.0.0.1")]]})
    fetcher = fetcher_with(names)
    site.pages["/away"] = redirect(f"//pictures.test:{canary.port}/a.png")
    assert (await refused(fetcher, site.url("/away"))).sentence.endswith(FORBIDDEN)
    assert len(dialled) == 1


async def test_without_permission_nothing_on_this_machine_is_fetched(site: Site, names: Names) -> None:
    fetcher = fetcher_with(names, allow=())
    assert (await refused(fetcher, site.url())).sentence.endswith(FORBIDDEN)
    assert site.connections == 0


async def test_an_allowed_network_of_one_version_says_nothing_about_the_other(dialled: list[Any]) -> None:
    fetcher = fetcher_with(Names(), allow=[ip_network("127.0.0.0/8"), ip_network("10.0.0.0/8")])
    for host in ("[::1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::a00:1]"):
        assert (await refused(fetcher, f"http://{host}/")).sentence.endswith(FORBIDDEN)
    assert dialled == []


async def test_an_address_with_a_scope_is_refused_even_from_an_allowed_network(dialled: list[Any]) -> None:
    fetcher = fetcher_with(Names(), allow=[ip_network("fe80::/10"), ip_network("::/0")])
    assert (await refused(fetcher, "http://[fe80::1%1]/")).sentence.endswith(FORBIDDEN)
    assert dialled == []


@pytest.mark.skipif(NOBODY == SITE, reason="there are only two loopback addresses here")
async def test_the_next_address_is_tried_where_one_does_not_answer(site: Site) -> None:
    names = Names({"pictures.test": [[NOBODY, SITE]]})
    fetcher = fetcher_with(names, allow=[ip_network(SITE), ip_network(NOBODY)])
    await fetcher.fetch(site.url())
    assert site.connections == 1


async def test_the_systems_resolver_knows_this_machine() -> None:
    found = await system_resolver("localhost")
    assert found
    assert all(address.is_loopback for address in found)


async def test_a_name_that_the_system_does_not_know_is_refused_like_a_forbidden_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    failure = await refused(UrlFetcher(INTAKE), "http://redis.internal/")
    assert (failure.sentence.endswith(FORBIDDEN), failure.retryable) == (True, False)


async def test_a_name_server_that_does_not_answer_now_may_later() -> None:
    async def resolve(host: str) -> Sequence[IPAddress]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    failure = await refused(fetcher_with(resolve), "http://pictures.test/")
    assert (failure.sentence.endswith(BROKEN), failure.retryable) == (True, True)


async def test_a_name_without_an_address_is_refused() -> None:
    fetcher = fetcher_with(Names({"empty.test": [[]]}))
    assert (await refused(fetcher, "http://empty.test/")).sentence.endswith(FORBIDDEN)


async def test_a_name_server_that_stalls_holds_up_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- which URLs are fetched at all -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.png",
        "//pictures.test/a.png",
        "http:",
        "http:///a.png",
        "http:pictures.test",
        "https://",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "gopher://pictures.test:70/_x",
        "ftp://pictures.test/a.png",
        "ws://pictures.test/",
        "unix:///var/run/docker.sock",
        "http+unix://%2Fvar%2Frun%2Fdocker.sock/info",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "jar:http://pictures.test!/",
        "http://ada:secret@pictures.test/",
        "http://ada@pictures.test/",
        "http://:@pictures.test/",
        "http://pictures.test\r\nX-Evil: 1/",
        "http://pictures.test/\r\nX-Evil: 1",
        "http://pictures.test/\x00",
        "http://pictures.test/\t",
        "http://pictures.test/\ud800",
        "http://\ud800.test/",
        "http://pictures.test:x/",
        "http://pictures.test:80:80/",
        "http://pictures.test:-1/",
        "http://pictures.test:0/",
        "http://pictures.test:22/",
        "http://pictures.test:25/",
        "http://pictures.test:65536/",
        "http://pictures.test:99999999999999999999/",
        "http://pictures.test/" + "a" * 2_048,
        "http://" + "ü" * 2_000 + "/",
        "http://" + "a." * 1_000,
        "http://[" + ":" * 2_000,
    ],
)
async def test_what_is_no_plain_web_address_is_not_fetched(
    fetcher: UrlFetcher, dialled: list[Any], names: Names, url: str
) -> None:
    assert not (await refused(fetcher, url)).retryable
    assert (names.asked, dialled) == ([], [])


_hosts: Final = st.one_of(st.text(max_size=30), st.from_regex(r"[0-9a-fx.:\[\]%@\\/]{1,20}", fullmatch=True))


@PROPERTY
@given(st.one_of(st.text(), _hosts.map("http://{}".format), _hosts.map("https://{}:80/x".format)))
@example("http://\N{ROMAN NUMERAL ONE}.test")
def test_whatever_the_url_is_it_is_refused_with_a_sentence(url: str) -> None:
    asyncio.run(_refused_by_all(url))


async def _refused_by_all(url: str) -> None:
    fetcher = fetcher_with(Names())
    await refused(fetcher, url)


async def test_an_international_name_is_asked_for_and_sent_in_its_ascii_form(site: Site) -> None:
    names = Names({"xn--bcher-kva.test": [[SITE]]})
    fetcher = fetcher_with(names)
    await fetcher.fetch(site.url(host="BÜCHER.test"))
    await fetcher.fetch(site.url(host="xn--bcher-kva.test"))
    assert names.asked == ["xn--bcher-kva.test"] * 2
    assert all(f"\r\nHost: xn--bcher-kva.test:{site.port}\r\n" in request for request in site.requests)


async def test_a_name_may_end_with_its_dot(site: Site, fetcher: UrlFetcher, names: Names) -> None:
    await fetcher.fetch(site.url(host="pictures.test."))
    assert names.asked == ["pictures.test"]


async def test_an_allowed_address_may_be_given_as_it_is(site: Site, fetcher: UrlFetcher, names: Names) -> None:
    await fetcher.fetch(site.url(host=f"[{SITE}]" if SITE.version == 6 else str(SITE)))
    assert names.asked == []


# --- what is sent ----------------------------------------------------------------------------------------


async def test_a_picture_is_fetched_and_admitted(site: Site, fetcher: UrlFetcher) -> None:
    assert opened(await fetcher.fetch(site.url())).size == (60, 40)


async def test_the_request_says_what_is_needed_and_nothing_else(
    site: Site, canary: Canary, fetcher: UrlFetcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No proxy and no credentials from the environment, no fragment, and nothing about who asks."""
    for variable in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{canary.port}")
    (tmp_path / ".netrc").write_text("machine pictures.test login ada password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    site.pages["/a%20b?size=1&x=%C3%BC"] = page(PNG)
    await fetcher.fetch(site.url("/x/../a b?size=1&x=ü#part"))
    assert site.requests == [
        "GET /a%20b?size=1&x=%C3%BC HTTP/1.1\r\n"
        f"Host: pictures.test:{site.port}\r\n"
        "User-Agent: stagecast-image-fetcher\r\n"
        "Accept: image/png, image/jpeg, image/webp\r\n"
        "Accept-Encoding: identity\r\n"
        "Connection: close\r\n\r\n"
    ]


# --- redirects -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize(
    "to", ["/a.png", "a.png", "../a.png", "//other.test:{port}/a.png", "http://other.test:{port}/a.png"]
)
async def test_a_redirect_is_followed(site: Site, fetcher: UrlFetcher, status: str, to: str) -> None:
    site.pages["/old"] = redirect(to.format(port=site.port), status)
    assert opened(await fetcher.fetch(site.url("/old"))).size == (60, 40)
    assert "other.test" not in to or f"Host: other.test:{site.port}" in site.requests[1]
    assert not any("cookie" in request.lower() or "referer" in request.lower() for request in site.requests)


async def test_each_hop_asks_for_the_address_again(site: Site, fetcher: UrlFetcher, names: Names) -> None:
    site.pages |= {"/1": redirect("/2"), "/2": redirect("/3"), "/3": redirect("/a.png")}
    await fetcher.fetch(site.url("/1"))
    assert names.asked == ["pictures.test"] * 4
    assert site.connections == 4


@pytest.mark.parametrize("length", [4, 17])
async def test_after_three_redirects_that_is_enough(site: Site, fetcher: UrlFetcher, length: int) -> None:
    site.pages |= {f"/{n}": redirect(f"/{n - 1}") for n in range(1, length + 1)} | {"/0": page(PNG)}
    failure = await refused(fetcher, site.url(f"/{length}"))
    assert failure.sentence.endswith("it redirects too often.")
    assert not failure.retryable
    assert site.connections == 4


async def test_a_loop_of_redirects_ends(site: Site, fetcher: UrlFetcher) -> None:
    site.pages |= {"/me": redirect("/me")}
    assert (await refused(fetcher, site.url("/me"))).sentence.endswith("it redirects too often.")
    assert site.connections == 4


@pytest.mark.parametrize("host", ["", "a b", *LOOPBACK.split()])
async def test_no_redirect_leads_to_loopback(site: Site, canary: Canary, dialled: list[Any], host: str) -> None:
    names = canary_names()
    names.answers["pictures.test"] = [[SITE]]
    fetcher = fetcher_with(names)
    site.pages["/away"] = redirect(f"http://{host}:{canary.port}/a.png")
    await refused(fetcher, site.url("/away"))
    assert len(dialled) == 1


@pytest.mark.parametrize(
    "to",
    [
        "http://169.254.169.254/latest/meta-data/iam/",
        "//169.254.169.254/",
        "http://[fd00:ec2::254]/",
        "http://metadata.google.internal/",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "dict://127.0.0.1:11211/stat",
        "ftp://pictures.test/a.png",
        "data:image/png;base64,AAAA",
        "http://ada:secret@pictures.test/a.png",
        "http://pictures.test:25/",
        "http://pictures.test:99999/",
        "http://[::1",
        "http://\xff\xfe/",
        "http://" + "ü" * 5_000,
        "http://" + "a." * 5_000,
        "///",
        "",
    ],
)
async def test_a_redirect_is_checked_as_the_url_was(
    site: Site, dialled: list[Any], fetcher: UrlFetcher, to: str
) -> None:
    site.pages["/away"] = redirect(to)
    await refused(fetcher, site.url("/away"))
    assert all(ip_address(address[0]) == SITE for address in dialled)


async def test_a_redirect_to_nowhere_is_an_answer_without_a_picture(site: Site, fetcher: UrlFetcher) -> None:
    site.pages["/away"] = page(PNG, status="302 Found")
    assert (await refused(fetcher, site.url("/away"))).sentence.endswith("its site answered with status 302.")


# --- answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason", "retryable"),
    [
        (404, "there is nothing there (404).", False),
        (410, "there is nothing there (410).", False),
        *[(status, f"its site answered with status {status}.", False) for status in (201, 206, 300, 304, 401, 403)],
        *[(status, f"its site answered with status {status}.", True) for status in (408, 425, 429, 500, 502, 503)],
    ],
)
async def test_another_status_than_200_is_told(
    site: Site, fetcher: UrlFetcher, status: int, reason: str, retryable: bool
) -> None:
    site.pages["/a"] = page(b"" if status == 304 else PNG, status=f"{status} So")
    failure = await refused(fetcher, site.url("/a"))
    assert failure.sentence.endswith(reason)
    assert failure.retryable == retryable


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<!doctype html><h1>It works!</h1>", "image/png"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
        (b"GIF89a", "image/gif"),
        (b"", "image/png"),
        (PNG[:-30], "image/png"),
        (raw_png((13_000, 13_000), 1, 0, b""), "image/png"),
    ],
)
async def test_what_is_no_picture_of_ours_is_told(
    site: Site, fetcher: UrlFetcher, body: bytes, content_type: str
) -> None:
    site.pages["/a"] = page(body, f"Content-Type: {content_type}")
    failure = await refused(fetcher, site.url("/a"))
    assert "it leads to no image that can be used. " in failure.sentence
    assert not failure.retryable


@pytest.mark.parametrize("content_type", ["text/html", "application/octet-stream", ""])
async def test_a_picture_is_a_picture_whatever_its_site_calls_it(
    site: Site, fetcher: UrlFetcher, content_type: str
) -> None:
    site.pages["/a"] = page(PNG, f"Content-Type: {content_type}")
    assert opened(await fetcher.fetch(site.url("/a"))).size == (60, 40)


async def flood(writer: asyncio.StreamWriter, blob: bytes, head: bytes = b"") -> None:
    """Write for as long as the other side takes it."""
    writer.write(head)
    while True:
        writer.write(blob)
        await writer.drain()


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


CHUNKED: Final = OK + b"Transfer-Encoding: chunked\r\n\r\n"


async def test_a_picture_may_come_in_chunks(site: Site, fetcher: UrlFetcher) -> None:
    site.pages["/a"] = CHUNKED + chunked(PNG[:10], PNG[10:], b"")
    assert opened(await fetcher.fetch(site.url("/a"))).size == (60, 40)


async def test_a_picture_may_end_with_the_connection(site: Site, fetcher: UrlFetcher) -> None:
    site.pages["/a"] = OK + b"\r\n" + PNG
    assert opened(await fetcher.fetch(site.url("/a"))).size == (60, 40)


async def test_ten_megabytes_are_taken(site: Site, names: Names) -> None:
    fetcher = fetcher_with(names, intake=TrustingIntake())
    site.pages["/a"] = page(b"x" * MAX_BYTES)
    assert len((await fetcher.fetch(site.url("/a"))).data) == MAX_BYTES


TOO_LARGE: Final = "it is larger than 10 MB."


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 10**18])
async def test_what_says_that_it_is_larger_is_not_read(site: Site, fetcher: UrlFetcher, length: int) -> None:
    async def head_only(writer: asyncio.StreamWriter) -> None:
        writer.write(page(b"", length=length))
        await site.left.wait()

    site.pages["/a"] = head_only
    failure = await refused(fetcher, site.url("/a"))
    assert failure.sentence.endswith(TOO_LARGE)
    assert not failure.retryable


@pytest.mark.parametrize(
    ("head", "blob"), [(OK + b"\r\n", b"x" * 65_536), (CHUNKED, chunked(b"x" * 65_536))], ids=["plain", "chunked"]
)
async def test_an_endless_body_is_read_no_further_than_ten_megabytes(
    site: Site, fetcher: UrlFetcher, head: bytes, blob: bytes
) -> None:
    site.pages["/a"] = lambda writer: flood(writer, blob, head)
    assert (await refused(fetcher, site.url("/a"))).sentence.endswith(TOO_LARGE)
    await asyncio.wait_for(site.left.wait(), 30)


@pytest.mark.parametrize(
    ("head", "blob"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1_000),
        (OK, b"X-More: yes\r\n" * 1_000),
        (OK + b"X-Long: ", b"x" * 65_536),
        (b"", b"\r\n" * 1_000),
        (b"", b"x" * 65_536),
        (CHUNKED, chunked(b"x") * 1_000),
        (CHUNKED, b"1;" + b"x" * 1_000 + b"\r\nx\r\n"),
        (CHUNKED + b"0\r\n", b"X-More: yes\r\n" * 1_000),
    ],
    ids=["continue", "headers", "header", "blank", "garbage", "tiny-chunks", "chunk-extensions", "trailers"],
)
async def test_no_flood_of_anything_else_lasts(site: Site, names: Names, head: bytes, blob: bytes) -> None:
    """Each is over after some kilobytes or pieces, long before the parser has gone through ten megabytes of it."""
    fetcher = fetcher_with(names, intake=TrustingIntake(), deadline=60)
    site.pages["/a"] = lambda writer: flood(writer, blob, head)
    assert (await refused(fetcher, site.url("/a"))).sentence.endswith(BROKEN)
    await asyncio.wait_for(site.left.wait(), 30)


@pytest.mark.parametrize(
    "encodings",
    [
        *([name] for name in ("gzip", "deflate", "br", "zstd", "x-gzip", "compress", "x-compress", "dcb", "dcz")),
        *(
            [name]
            for name in ("GZIP", '"gzip"', "gzip;q=1", "gzip, identity", "identity,gzip", "utf-8, br", "gzip, br")
        ),
        ["gzip", "identity"],
        ["UTF-8", "zstd"],
    ],
    ids=" + ".join,
)
async def test_nothing_is_unpacked(site: Site, fetcher: UrlFetcher, encodings: list[str]) -> None:
    bomb = gzip.compress(bytes(5 * MAX_BYTES)) if encodings == ["gzip"] else zlib.compress(PNG)
    site.pages["/a"] = page(bomb, *[f"Content-Encoding: {encoding}" for encoding in encodings])
    failure = await refused(fetcher, site.url("/a"))
    assert failure.sentence.endswith("its site sends it compressed, which was not asked for.")
    assert not failure.retryable


@pytest.mark.parametrize(
    "encodings",
    [
        *([name] for name in ("UTF-8", "utf8", "base64", "aws-chunked", "none", "identity", "binary", "8bit", "")),
        *(
            [name]
            for name in ("Identity", "image/png", "utf-8, base64", "aws-chunked,", " , ", "charset=utf-8", "\xfc")
        ),
        ["identity", "UTF-8"],
        ["", ""],
    ],
    ids=" + ".join,
)
async def test_an_encoding_that_is_no_compression_counts_as_none(
    site: Site, fetcher: UrlFetcher, encodings: list[str]
) -> None:
    site.pages["/a"] = page(PNG, *[f"Content-Encoding: {encoding}" for encoding in encodings])
    assert opened(await fetcher.fetch(site.url("/a"))).size == (60, 40)


async def test_nothing_is_unpacked_in_transfer_either(site: Site, fetcher: UrlFetcher) -> None:
    site.pages["/a"] = OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked(gzip.compress(PNG), b"")
    assert (await refused(fetcher, site.url("/a"))).sentence.endswith(BROKEN)


async def test_a_length_that_lies_makes_no_picture(site: Site, fetcher: UrlFetcher) -> None:
    site.pages["/more"] = page(PNG, length=len(PNG) + 1)
    failure = await refused(fetcher, site.url("/more"))
    assert failure.sentence.endswith(BROKEN)
    assert failure.retryable
    site.pages["/less"] = page(PNG, length=len(PNG) - 30)
    assert "no image that can be used" in (await refused(fetcher, site.url("/less"))).sentence
    site.pages["/two"] = page(PNG, "Content-Length: 1")
    assert (await refused(fetcher, site.url("/two"))).sentence.endswith(BROKEN)


@pytest.mark.parametrize("sent", [b"", b"HTT", OK, page(PNG)[:-20], CHUNKED + b"ff\r\nx"])
async def test_a_connection_that_breaks_off_may_be_tried_again(site: Site, fetcher: UrlFetcher, sent: bytes) -> None:
    async def reset(writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await asyncio.sleep(0.01)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    site.pages["/a"] = reset
    failure = await refused(fetcher, site.url("/a"))
    assert failure.sentence.endswith(BROKEN)
    assert failure.retryable


async def test_a_port_where_nobody_listens_may_be_tried_again(fetcher: UrlFetcher) -> None:
    # The port is kept, so that nobody comes to listen there.
    with socket.socket(socket.AF_INET6 if SITE.version == 6 else socket.AF_INET) as kept:
        kept.bind((str(SITE), 0))
        failure = await refused(fetcher, f"http://pictures.test:{kept.getsockname()[1]}/")
    assert failure.sentence.endswith(BROKEN)
    assert failure.retryable


@settings(PROPERTY, max_examples=200)
@given(
    st.one_of(
        st.binary(),
        st.binary().map(lambda rest: b"HTTP/1.1 " + rest),
        st.binary().map(lambda rest: OK + rest),
        st.binary().map(lambda rest: OK + b"Content-Length: " + rest + b"\r\n\r\n"),
        st.binary().map(lambda rest: b"HTTP/1.1 302 Found\r\nLocation: " + rest.replace(b"\n", b"") + b"\r\n\r\n"),
        st.binary().map(lambda rest: CHUNKED + rest),
    )
)
@example(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")
@example(b"HTTP/1.1 204 No Content\r\n\r\n")
@example(OK + b"Content-Length: 1_0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
@example(b"HTTP/0.9 200\r\n\r\n")
@example(b"HTTP/2 200 OK\r\n\r\n")
def test_whatever_the_site_answers_there_is_a_sentence(answer: bytes) -> None:
    asyncio.run(_answered(answer))


async def _answered(answer: bytes) -> None:
    site = Site(pages={"/a": answer})
    fetcher = fetcher_with(Names({"pictures.test": [[SITE]]}), deadline=5)
    async with listening(site.serve, str(SITE)) as site.port:
        await refused(fetcher, site.url("/a"))


# --- time ------------------------------------------------------------------------------------------------


async def stall(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def drip(writer: asyncio.StreamWriter) -> None:
    writer.write(page(b"", length=MAX_BYTES))
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.01)


async def drip_head(writer: asyncio.StreamWriter) -> None:
    writer.write(OK + b"X-Slow: ")
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("slow", [stall, drip, drip_head])
async def test_what_takes_too_long_is_given_up_however_it_drips(
    site: Site, names: Names, slow: Callable[[asyncio.StreamWriter], Awaitable[None]]
) -> None:
    fetcher = fetcher_with(names, intake=TrustingIntake(), deadline=0.2)
    site.pages["/a"] = slow
    before = asyncio.get_running_loop().time()
    async with asyncio.timeout(30):
        failure = await refused(fetcher, site.url("/a"))
    assert asyncio.get_running_loop().time() - before >= 0.2
    assert failure.sentence.endswith("it took too long.")
    assert failure.retryable


async def test_the_deadline_is_one_for_all_hops(site: Site, names: Names) -> None:
    async def late(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.15)
        writer.write(redirect("/late"))

    fetcher = fetcher_with(names, intake=TrustingIntake(), deadline=0.35)
    site.pages["/late"] = late
    # Else it would be that it redirects too often.
    assert (await refused(fetcher, site.url("/late"))).sentence.endswith("it took too long.")
    assert site.connections <= 3


@pytest.mark.parametrize("slow", [stall, drip])
async def test_a_cancelled_fetch_closes_its_connection(
    site: Site, fetcher: UrlFetcher, slow: Callable[[asyncio.StreamWriter], Awaitable[None]]
) -> None:
    reached = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        reached.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(slow(writer), 0.2)

    site.pages["/a"] = answer
    fetching = asyncio.create_task(fetcher.fetch(site.url("/a")))
    await reached.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    await asyncio.wait_for(site.left.wait(), 30)


async def test_fetches_do_not_wait_for_one_another(site: Site, fetcher: UrlFetcher) -> None:
    site.pages["/slow"] = stall
    slow = [asyncio.create_task(fetcher.fetch(site.url("/slow"))) for _ in range(30)]
    await fetcher.fetch(site.url())
    for fetching in slow:
        fetching.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


# --- TLS -------------------------------------------------------------------------------------------------


@dataclass
class Certificate:
    server: ssl.SSLContext
    trusting: ssl.SSLContext


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A certificate for pictures.test that signed itself, and a client that trusts it."""
    pytest.importorskip("cryptography", reason="makes the certificate")
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pictures.test")])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pictures.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = signed.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(private + public)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return Certificate(server, ssl.create_default_context(cadata=public.decode()))


@pytest.fixture
async def safe_site(certificate: Certificate) -> AsyncIterator[Site]:
    site = Site(pages={"/a.png": page(PNG)})
    async with listening(site.serve, str(SITE), tls=certificate.server) as site.port:
        yield site


@pytest.fixture
def trusting(certificate: Certificate, names: Names) -> UrlFetcher:
    return fetcher_with(names, trust=certificate.trusting)


async def test_over_tls_the_name_stays_the_name(
    safe_site: Site, certificate: Certificate, trusting: UrlFetcher, dialled: list[Any]
) -> None:
    asked: list[str | None] = []
    certificate.server.sni_callback = lambda connection, name, context: asked.append(name)
    await trusting.fetch(safe_site.url(scheme="https"))
    assert asked == ["pictures.test"]
    assert f"\r\nHost: pictures.test:{safe_site.port}\r\n" in safe_site.requests[0]
    assert [ip_address(address[0]) for address in dialled] == [SITE]


@pytest.mark.parametrize("host", ["other.test", f"[{SITE}]" if SITE.version == 6 else str(SITE)])
async def test_a_certificate_for_another_name_is_refused(safe_site: Site, trusting: UrlFetcher, host: str) -> None:
    failure = await refused(trusting, safe_site.url(host=host, scheme="https"))
    assert failure.sentence.endswith("its site has no valid certificate.")
    assert not failure.retryable
    assert safe_site.requests == []


async def test_a_certificate_that_nobody_vouches_for_is_refused(safe_site: Site, names: Names) -> None:
    fetcher = UrlFetcher(INTAKE, allow=[ip_network(SITE)], resolve=names, deadline=60, connect_timeout=30)
    failure = await refused(fetcher, safe_site.url(scheme="https"))
    assert failure.sentence.endswith("its site has no valid certificate.")
    assert safe_site.requests == []


async def test_where_there_is_no_tls_https_is_not_to_be_had(fetcher: UrlFetcher) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(page(PNG))
        await reader.read()

    async with listening(plain, str(SITE)) as port:
        assert (await refused(fetcher, f"https://pictures.test:{port}/")).sentence.endswith(BROKEN)


async def test_a_redirect_may_lead_to_https_and_not_back(site: Site, safe_site: Site, trusting: UrlFetcher) -> None:
    site.pages["/up"] = redirect(safe_site.url(scheme="https"))
    assert opened(await trusting.fetch(site.url("/up"))).size == (60, 40)
    safe_site.pages["/down"] = redirect(site.url())
    failure = await refused(trusting, safe_site.url("/down", scheme="https"))
    assert failure.sentence.endswith("it redirects from https to http.")
    assert site.connections == 1


async def test_a_handshake_that_never_ends_is_given_up_and_closed(names: Names) -> None:
    lines: set[asyncio.StreamWriter] = set()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.add(writer)
        with contextlib.suppress(OSError):
            await reader.read()
        lines.remove(writer)

    async with listening(mute, str(SITE)) as port:
        for deadline, connect_timeout in ((60, 0.1), (0.1, 60)):
            fetcher = fetcher_with(names, deadline=deadline, connect_timeout=connect_timeout)
            failure = await refused(fetcher, f"https://pictures.test:{port}/")
            assert failure.sentence.endswith("it took too long.")
            assert failure.retryable
            # On a slow machine it may have been given up before there was a connection.
            async with asyncio.timeout(30):
                while lines:
                    await asyncio.sleep(0.01)
