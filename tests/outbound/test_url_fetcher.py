"""What is fetched from a user's URL, and what is refused.

Every site of these tests listens on `SITE`, which is allowed where a test says so. Every other loopback address is
forbidden ground, and a canary sits there.
"""

import asyncio
import gzip
import socket
import zlib
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapters.outbound.url_fetcher import MAX_BYTES, UrlFetcher
from support.builders import PROPERTY
from support.doubles import TrustingIntake
from support.pictures import opened, raw_png
from support.sites import (
    BROKEN,
    LOOPBACK,
    OK,
    PNG,
    SITE,
    Canary,
    FakeResolver,
    Site,
    canary_names,
    fetcher_with,
    listening,
    page,
    redirect,
    refused,
)

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
        "http://" + "ü" * 2_000 + "/",
        "http://" + "a." * 1_000,
        "http://[" + ":" * 2_000,
    ],
)
async def test_other_schemes_credentials_and_ports_are_refused(
    fetcher: UrlFetcher, dialled: list[Any], names: FakeResolver, url: str
) -> None:
    assert not (await refused(fetcher, url)).retryable
    assert (names.asked, dialled) == ([], [])


_hosts: Final = st.one_of(st.text(max_size=30), st.from_regex(r"[0-9a-fx.:\[\]%@\\/]{1,20}", fullmatch=True))


@PROPERTY
@given(st.one_of(st.text(), _hosts.map("http://{}".format), _hosts.map("https://{}:80/x".format)))
@example("http://\N{ROMAN NUMERAL ONE}.test")
def test_any_invalid_url_is_refused_with_a_sentence(url: str) -> None:
    asyncio.run(_refused_by_all(url))


async def _refused_by_all(url: str) -> None:
    fetcher = fetcher_with(FakeResolver())
    await refused(fetcher, url)


async def test_international_host_name_is_sent_in_ascii_form(site: Site) -> None:
    names = FakeResolver({"xn--bcher-kva.test": [[SITE]]})
    fetcher = fetcher_with(names)
    await fetcher.fetch(site.url(host="BÜCHER.test"))
    await fetcher.fetch(site.url(host="xn--bcher-kva.test"))
    assert names.asked == ["xn--bcher-kva.test"] * 2
    assert all(f"\r\nHost: xn--bcher-kva.test:{site.port}\r\n" in request for request in site.requests)


async def test_host_name_may_end_with_a_dot(site: Site, fetcher: UrlFetcher, names: FakeResolver) -> None:
    await fetcher.fetch(site.url(host="pictures.test."))
    assert names.asked == ["pictures.test"]


async def test_allowed_ip_address_may_be_the_host(site: Site, fetcher: UrlFetcher, names: FakeResolver) -> None:
    await fetcher.fetch(site.url(host=f"[{SITE}]" if SITE.version == 6 else str(SITE)))
    assert names.asked == []


# --- what is sent ----------------------------------------------------------------------------------------


async def test_picture_is_fetched_and_admitted(site: Site, fetcher: UrlFetcher) -> None:
    assert opened(await fetcher.fetch(site.url())).size == (60, 40)


async def test_request_has_only_the_necessary_headers(
    site: Site, canary: Canary, fetcher: UrlFetcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No proxy or credentials of the environment, no fragment, and nothing about the user."""
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
async def test_redirect_is_followed(site: Site, fetcher: UrlFetcher, status: str, to: str) -> None:
    site.pages["/old"] = redirect(to.format(port=site.port), status)
    assert opened(await fetcher.fetch(site.url("/old"))).size == (60, 40)
    assert "other.test" not in to or f"Host: other.test:{site.port}" in site.requests[1]
    assert not any("cookie" in request.lower() or "referer" in request.lower() for request in site.requests)


async def test_each_redirect_resolves_the_host_again(site: Site, fetcher: UrlFetcher, names: FakeResolver) -> None:
    site.pages |= {"/1": redirect("/2"), "/2": redirect("/3"), "/3": redirect("/a.png")}
    await fetcher.fetch(site.url("/1"))
    assert names.asked == ["pictures.test"] * 4
    assert site.connections == 4


@pytest.mark.parametrize("length", [4, 17])
async def test_fourth_redirect_is_refused(site: Site, fetcher: UrlFetcher, length: int) -> None:
    site.pages |= {f"/{n}": redirect(f"/{n - 1}") for n in range(1, length + 1)} | {"/0": page(PNG)}
    failure = await refused(fetcher, site.url(f"/{length}"))
    assert failure.sentence.endswith("it redirects too often.")
    assert not failure.retryable
    assert site.connections == 4


async def test_redirect_loop_ends(site: Site, fetcher: UrlFetcher) -> None:
    site.pages |= {"/me": redirect("/me")}
    assert (await refused(fetcher, site.url("/me"))).sentence.endswith("it redirects too often.")
    assert site.connections == 4


@pytest.mark.parametrize("host", ["", "a b", *LOOPBACK.split()])
async def test_redirect_to_loopback_is_refused(site: Site, canary: Canary, dialled: list[Any], host: str) -> None:
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
async def test_redirect_target_is_checked_like_the_url(
    site: Site, dialled: list[Any], fetcher: UrlFetcher, to: str
) -> None:
    site.pages["/away"] = redirect(to)
    await refused(fetcher, site.url("/away"))
    assert all(ip_address(address[0]) == SITE for address in dialled)


async def test_redirect_without_location_is_an_error_status(site: Site, fetcher: UrlFetcher) -> None:
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
async def test_error_status_is_in_the_sentence(
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
async def test_unsupported_content_is_explained(
    site: Site, fetcher: UrlFetcher, body: bytes, content_type: str
) -> None:
    site.pages["/a"] = page(body, f"Content-Type: {content_type}")
    failure = await refused(fetcher, site.url("/a"))
    assert "it leads to no image that can be used. " in failure.sentence
    assert not failure.retryable


@pytest.mark.parametrize("content_type", ["text/html", "application/octet-stream", ""])
async def test_content_type_header_is_ignored(site: Site, fetcher: UrlFetcher, content_type: str) -> None:
    site.pages["/a"] = page(PNG, f"Content-Type: {content_type}")
    assert opened(await fetcher.fetch(site.url("/a"))).size == (60, 40)


async def flood(writer: asyncio.StreamWriter, blob: bytes, head: bytes = b"") -> None:
    """Write until the connection closes."""
    writer.write(head)
    while True:
        writer.write(blob)
        await writer.drain()


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


CHUNKED: Final = OK + b"Transfer-Encoding: chunked\r\n\r\n"


async def test_chunked_response_is_read(site: Site, fetcher: UrlFetcher) -> None:
    site.pages["/a"] = CHUNKED + chunked(PNG[:10], PNG[10:], b"")
    assert opened(await fetcher.fetch(site.url("/a"))).size == (60, 40)


async def test_response_without_length_is_read_until_close(site: Site, fetcher: UrlFetcher) -> None:
    site.pages["/a"] = OK + b"\r\n" + PNG
    assert opened(await fetcher.fetch(site.url("/a"))).size == (60, 40)


async def test_ten_megabytes_are_accepted(site: Site, names: FakeResolver) -> None:
    fetcher = fetcher_with(names, intake=TrustingIntake())
    site.pages["/a"] = page(b"x" * MAX_BYTES)
    assert len((await fetcher.fetch(site.url("/a"))).data) == MAX_BYTES


TOO_LARGE: Final = "it is larger than 10 MB."


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 10**18])
async def test_larger_declared_length_is_not_read(site: Site, fetcher: UrlFetcher, length: int) -> None:
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
async def test_endless_body_is_read_up_to_ten_megabytes(
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
async def test_floods_of_headers_or_framing_are_cut_off(
    site: Site, names: FakeResolver, head: bytes, blob: bytes
) -> None:
    """Each ends after some kilobytes or chunks, long before the parser has read ten megabytes."""
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
async def test_compressed_response_is_refused(site: Site, fetcher: UrlFetcher, encodings: list[str]) -> None:
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
async def test_content_encoding_without_compression_is_ignored(
    site: Site, fetcher: UrlFetcher, encodings: list[str]
) -> None:
    site.pages["/a"] = page(PNG, *[f"Content-Encoding: {encoding}" for encoding in encodings])
    assert opened(await fetcher.fetch(site.url("/a"))).size == (60, 40)


async def test_transfer_compression_is_not_decoded(site: Site, fetcher: UrlFetcher) -> None:
    site.pages["/a"] = OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked(gzip.compress(PNG), b"")
    assert (await refused(fetcher, site.url("/a"))).sentence.endswith(BROKEN)


async def test_wrong_content_length_fails(site: Site, fetcher: UrlFetcher) -> None:
    site.pages["/more"] = page(PNG, length=len(PNG) + 1)
    failure = await refused(fetcher, site.url("/more"))
    assert failure.sentence.endswith(BROKEN)
    assert failure.retryable
    site.pages["/less"] = page(PNG, length=len(PNG) - 30)
    assert "no image that can be used" in (await refused(fetcher, site.url("/less"))).sentence
    site.pages["/two"] = page(PNG, "Content-Length: 1")
    assert (await refused(fetcher, site.url("/two"))).sentence.endswith(BROKEN)


@pytest.mark.parametrize("sent", [b"", b"HTT", OK, page(PNG)[:-20], CHUNKED + b"ff\r\nx"])
async def test_broken_connection_is_retryable(site: Site, fetcher: UrlFetcher, sent: bytes) -> None:
    async def reset(writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await asyncio.sleep(0.01)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    site.pages["/a"] = reset
    failure = await refused(fetcher, site.url("/a"))
    assert failure.sentence.endswith(BROKEN)
    assert failure.retryable


async def test_refused_connection_is_retryable(fetcher: UrlFetcher) -> None:
    # Keep the port, so that no other process listens there.
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
def test_any_response_bytes_give_a_sentence(answer: bytes) -> None:
    asyncio.run(_answered(answer))


async def _answered(answer: bytes) -> None:
    site = Site(pages={"/a": answer})
    fetcher = fetcher_with(FakeResolver({"pictures.test": [[SITE]]}), deadline=5)
    async with listening(site.serve, str(SITE)) as site.port:
        await refused(fetcher, site.url("/a"))
