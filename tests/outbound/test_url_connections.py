"""Deadlines, cancellation and TLS of the URL fetcher."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from adapters.outbound.url_fetcher import MAX_BYTES, UrlFetcher
from support.doubles import TrustingIntake
from support.pictures import opened
from support.sites import (
    BROKEN,
    INTAKE,
    OK,
    PNG,
    SITE,
    FakeResolver,
    Site,
    fetcher_with,
    listening,
    page,
    redirect,
    refused,
)

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
async def test_slow_response_ends_at_the_deadline(
    site: Site, names: FakeResolver, slow: Callable[[asyncio.StreamWriter], Awaitable[None]]
) -> None:
    fetcher = fetcher_with(names, intake=TrustingIntake(), deadline=0.2)
    site.pages["/a"] = slow
    before = asyncio.get_running_loop().time()
    async with asyncio.timeout(30):
        failure = await refused(fetcher, site.url("/a"))
    assert asyncio.get_running_loop().time() - before >= 0.2
    assert failure.sentence.endswith("it took too long.")
    assert failure.retryable


async def test_deadline_covers_all_redirects(site: Site, names: FakeResolver) -> None:
    async def late(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.15)
        writer.write(redirect("/late"))

    fetcher = fetcher_with(names, intake=TrustingIntake(), deadline=0.35)
    site.pages["/late"] = late
    # Fewer hops than the redirect limit.
    assert (await refused(fetcher, site.url("/late"))).sentence.endswith("it took too long.")
    assert site.connections <= 3


@pytest.mark.parametrize("slow", [stall, drip])
async def test_cancelled_fetch_closes_its_connection(
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


async def test_fetches_run_concurrently(site: Site, fetcher: UrlFetcher) -> None:
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
    """A self-signed certificate for pictures.test, and a fetcher that trusts it."""
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
def trusting(certificate: Certificate, names: FakeResolver) -> UrlFetcher:
    return fetcher_with(names, trust=certificate.trusting)


async def test_tls_verifies_the_host_name_of_the_url(
    safe_site: Site, certificate: Certificate, trusting: UrlFetcher, dialled: list[Any]
) -> None:
    asked: list[str | None] = []
    certificate.server.sni_callback = lambda connection, name, context: asked.append(name)
    await trusting.fetch(safe_site.url(scheme="https"))
    assert asked == ["pictures.test"]
    assert f"\r\nHost: pictures.test:{safe_site.port}\r\n" in safe_site.requests[0]
    assert [ip_address(address[0]) for address in dialled] == [SITE]


@pytest.mark.parametrize("host", ["other.test", f"[{SITE}]" if SITE.version == 6 else str(SITE)])
async def test_certificate_for_another_name_is_refused(safe_site: Site, trusting: UrlFetcher, host: str) -> None:
    failure = await refused(trusting, safe_site.url(host=host, scheme="https"))
    assert failure.sentence.endswith("its site has no valid certificate.")
    assert not failure.retryable
    assert safe_site.requests == []


async def test_untrusted_certificate_is_refused(safe_site: Site, names: FakeResolver) -> None:
    fetcher = UrlFetcher(INTAKE, allow=[ip_network(SITE)], resolve=names, deadline=60, connect_timeout=30)
    failure = await refused(fetcher, safe_site.url(scheme="https"))
    assert failure.sentence.endswith("its site has no valid certificate.")
    assert safe_site.requests == []


async def test_https_to_a_plain_http_port_fails(fetcher: UrlFetcher) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(page(PNG))
        await reader.read()

    async with listening(plain, str(SITE)) as port:
        assert (await refused(fetcher, f"https://pictures.test:{port}/")).sentence.endswith(BROKEN)


async def test_redirect_may_lead_to_https_but_not_back_to_http(
    site: Site, safe_site: Site, trusting: UrlFetcher
) -> None:
    site.pages["/up"] = redirect(safe_site.url(scheme="https"))
    assert opened(await trusting.fetch(site.url("/up"))).size == (60, 40)
    safe_site.pages["/down"] = redirect(site.url())
    failure = await refused(trusting, safe_site.url("/down", scheme="https"))
    assert failure.sentence.endswith("it redirects from https to http.")
    assert site.connections == 1


async def test_stalled_tls_handshake_times_out_and_is_closed(names: FakeResolver) -> None:
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
            # On a slow machine the timeout may come before the connection.
            async with asyncio.timeout(30):
                while lines:
                    await asyncio.sleep(0.01)
