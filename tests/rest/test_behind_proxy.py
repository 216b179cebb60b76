"""Behind proxies: a path in the public URL, and the headers by which a trusted proxy tells who is calling and how."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from api.app import create_service
from api.rest.proxies import ForwardedHeaders
from api.settings import Settings, SettingsError
from api.web.page import FOLDER
from api.wiring import wire
from support.browser import needs_chromium, tabs
from support.harness import JSON, PHOTO, TIMEOUT, Running, running
from support.http_app import assert_problem
from support.node import ROOT, browsers, needs_client, needs_node
from support.proxy import Proxy, forward

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOST: Final = "pictures.example.com"


@asynccontextmanager
async def behind(images: Path, *, strip: bool, path: str = "/cast") -> AsyncIterator[tuple[Running, str]]:
    """A service behind a proxy that serves it below a path, and the public URL of that."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        public_url = f"http://127.0.0.1:{listener.getsockname()[1]}{path}"
        async with (
            running(images, public_url=public_url) as service,
            Proxy.open(service.port, listener=listener, rewrite=forward(path=path, strip=strip)),
        ):
            yield service, public_url


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=[True, False], ids=["stripped", "kept"])
async def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Running, str]]:
    async with behind(tmp_path_factory.mktemp("images"), strip=request.param) as place:
        yield place


async def test_every_route_is_served_with_and_without_the_path(place: tuple[Running, str]) -> None:
    service, public_url = place
    paths = (
        *("/", "/docs", "/openapi.json", "/asyncapi.json", "/stages", "/me", "/generations", "/events"),
        *("/health/live", "/health/ready"),
        *("/static/stagecast.js", "/static/samples/hat.webp", "/nowhere", "/static/nothing.js", "/%63ast/me"),
    )
    async with httpx2.AsyncClient(verify=False) as http:
        for path in paths:
            bare = await service.http.get(path)
            for base in (f"{service.url}/cast", public_url):
                answer = await http.get(base + path)
                if path != "/%63ast/me":
                    assert (answer.status_code, answer.headers["content-type"]) == (
                        bare.status_code,
                        bare.headers["content-type"],
                    )
                    assert path in ("/", "/events") or answer.content == bare.content, path
        for url in (f"{service.url}/cast", public_url):
            assert (await http.get(url)).text == (await http.get(f"{url}/")).text
            assert (await http.get(f"{url}?x=1")).status_code == 200
        assert (await service.http.get("/%63ast/me")).status_code == 200
        for path in ("/castle", "/cast/cast/me", "/cas", "/cast//me", "/Cast/me"):
            assert_problem(await service.http.get(path), 404, "not_found")
        assert_problem(await service.http.post("/cast"), 405, "method_not_allowed")
        document = (await http.get(f"{public_url}/openapi.json")).json()
        assert document["servers"] == [{"url": "/cast"}]
        assert "/cast/openapi.json" in (await http.get(f"{public_url}/docs")).text


async def test_locations_and_image_urls_begin_with_the_path(place: tuple[Running, str]) -> None:
    service, public_url = place
    fields: JSON = {"prompt": (None, "a red hat"), "images": ("tall.jpg", PHOTO)}
    headers = {"X-User-Id": "ada"}
    async with httpx2.AsyncClient(verify=False) as http:
        for base in (public_url, service.url):
            answer = await http.post(f"{base}/generations/edit", files=fields, headers=headers)
            assert answer.status_code == 202
            location = answer.headers["location"]
            assert location == f"/cast/generations/{answer.json()['generationId']}"
            await service.service.leases.drain()
            snapshot = (await http.get(httpx2.URL(base).join(location), headers=headers)).json()
            image = snapshot["editedImageUrl"]
            assert image.startswith(f"{public_url}/images/")
            pictures = [await http.get(url) for url in (image, image.replace(public_url, service.url))]
            assert [picture.status_code for picture in pictures] == [200, 200]
            assert pictures[0].content == pictures[1].content


@needs_node
async def test_the_official_client_connects_with_and_without_the_path(place: tuple[Running, str]) -> None:
    service, public_url = place
    async with browsers() as node:
        origin = public_url.removesuffix("/cast")
        for url, path, transports in (
            (origin, "/cast/socket.io", ["polling", "websocket"]),
            (origin, "/cast/socket.io", ["websocket"]),
            (service.url, "/cast/socket.io", ["polling", "websocket"]),
            (service.url, "/socket.io", ["websocket"]),
        ):
            client = node.open(url, path=path, transports=transports, auth={"userId": "ada"})
            await client.connected()
            if transports[0] == "polling":
                await client.until(lambda client=client: bool(client.on("upgrade")))  # type: ignore[misc]
        await node.forget_all()


@needs_node
async def test_the_client_module_works_below_the_path(place: tuple[Running, str]) -> None:
    service, public_url = place
    generation_id = await service.start("ada")
    await service.service.leases.drain()
    script = f"""
        import {{ io }} from "socket.io-client";
        import {{ connect }} from "{FOLDER.as_uri()}/stagecast.js";
        const client = connect({{ io, url: "{public_url}/", userId: "ada" }});
        client.on("state", (state) => {{
            if (state !== "live") return;
            console.log(client.generations.map((each) => each.generationId).join());
            client.close();
        }});
    """
    node = await asyncio.create_subprocess_exec(
        "node", "--input-type=module", "--eval", script, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await asyncio.wait_for(node.communicate(), TIMEOUT)
    assert generation_id in printed.decode().strip().split(",")


@needs_chromium
@needs_client
async def test_the_page_works_below_the_path(place: tuple[Running, str], browser: Browser) -> None:
    service, public_url = place
    async with tabs(browser, public_url, user="eve", ignore="/cast$") as [tab]:
        await tab["#try-samples"].click()
        await expect(tab["#tray li"]).to_have_count(4)
        for picture in await tab["#tray img"].all():
            await expect(picture).not_to_have_js_property("naturalWidth", 0)
        await service.start("eve")
        await tab.shows("completed")
        await expect(tab["#after"]).to_have_js_property("naturalWidth", 1024)
        assert await tab["footer a"].evaluate("link => link.href") == f"{public_url}/docs"
        await tab.upgraded()
        await tab.page.goto(public_url, wait_until="domcontentloaded")  # Without a slash at its end.
        await tab.is_connected()
        await tab.shows("completed")


@pytest.mark.parametrize("path", ["/images", "/docs/x", "/static", "/socket.io", "/health", "/events/cast"])
async def test_a_public_url_path_that_collides_with_a_route_is_refused(tmp_path: Path, path: str) -> None:
    settings = Settings(_env_file=None, images=tmp_path, editor="local", public_url=f"https://example.com{path}")
    with pytest.raises(SettingsError, match="STAGECAST_PUBLIC_URL must not"):
        create_service(await wire(settings))


async def seen(
    forwarded: JSON, *trusted: str, client: tuple[str, int] | None = ("10.0.0.1", 4000), type: str = "http"
) -> tuple[Any, str, str]:
    """The client, the scheme and the host that layers behind `ForwardedHeaders` see."""
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    headers = [(b"host", b"stagecast:3000"), (b"x-other", b"1")]
    for name, values in forwarded.items():
        headers += [(f"x-forwarded-{name}".encode(), value.encode("latin-1")) for value in values]
    scheme = "ws" if type == "websocket" else "http"
    scope = {"type": type, "path": "/", "scheme": scheme, "headers": headers, "client": client}
    await ForwardedHeaders(app, [ip_network(network) for network in trusted])(scope, nothing, nothing)
    [scope] = scopes
    [host] = [value.decode() for name, value in scope["headers"] if name == b"host"]
    assert (b"x-other", b"1") in scope["headers"]
    return scope["client"] and scope["client"][0], scope["scheme"], host


EVERY: Final = {"for": ["203.0.113.9"], "proto": ["https"], "host": [HOST], "port": ["443"]}


@pytest.mark.parametrize("client", ["10.0.0.1", "::ffff:10.0.0.1"])
@pytest.mark.parametrize("trusted", ["10.0.0.0/8", "10.0.0.1/32", "0.0.0.0/0"])
async def test_headers_of_a_trusted_proxy_count(client: str, trusted: str) -> None:
    assert await seen(EVERY, trusted, client=(client, 1)) == ("203.0.113.9", "https", f"{HOST}:443")
    assert await seen(EVERY, trusted, client=(client, 1), type="websocket") == ("203.0.113.9", "wss", f"{HOST}:443")


@pytest.mark.parametrize("client", [("10.0.0.1", 1), ("::1", 1), ("testclient", 1), ("", 0), None])
async def test_headers_of_any_other_peer_do_not_count(client: tuple[str, int] | None) -> None:
    for networks in ((), ("192.168.0.0/16", "fd00::/8"), ("::/1",) if client and client[0] == "10.0.0.1" else ()):
        address, *rest = await seen(EVERY, *networks, client=client)
        assert (address, rest) == (client and client[0], ["http", "stagecast:3000"])


async def test_client_addresses_are_normalised() -> None:
    forms = {"::ffff:198.51.100.1": "198.51.100.1", "2001:DB8:0::1": "2001:db8::1", "fe80::1%eth0": "fe80::1"}
    for given, address in forms.items():
        assert (await seen({}, client=(given, 7)))[0] == address
        assert (await seen({"for": [given]}, "10.0.0.1/32"))[0] == address


@pytest.mark.parametrize(
    ("values", "address"),
    [
        (["203.0.113.9"], "203.0.113.9"),
        (["1.1.1.1, 203.0.113.9"], "203.0.113.9"),  # What the client wrote itself does not count.
        (["203.0.113.9, 10.2.2.2,10.3.3.3 "], "203.0.113.9"),
        (["203.0.113.9", "10.2.2.2"], "203.0.113.9"),
        (["1.1.1.1", "203.0.113.9, 10.2.2.2"], "203.0.113.9"),
        (["10.4.4.4, 10.2.2.2"], "10.4.4.4"),  # All trusted: the first.
        (["203.0.113.9:51234"], "203.0.113.9"),
        (["[2001:db8::7]"], "2001:db8::7"),
        (["[2001:db8::7]:443, 10.2.2.2:80"], "2001:db8::7"),
        (["2001:db8::7"], "2001:db8::7"),
        (["203.0.113.9, , "], "203.0.113.9"),
        (["fe80::7%eth0"], "fe80::7"),
        (["unknown"], "10.0.0.1"),
        (["203.0.113.9, unknown"], "10.0.0.1"),
        (["203.0.113.9, unknown, 10.2.2.2"], "10.2.2.2"),
        (["203.0.113.9, _hidden:1"], "10.0.0.1"),
        (["203.0.113.9, 10.2.2.256"], "10.0.0.1"),
        (["203.0.113.9, 2886729729"], "10.0.0.1"),
        (["203.0.113.9, [::1"], "10.0.0.1"),
        (["é\x80"], "10.0.0.1"),
        (["[]"], "10.0.0.1"),
        (["[]:1"], "10.0.0.1"),
        ([":80"], "10.0.0.1"),
        (["%"], "10.0.0.1"),
        ([""], "10.0.0.1"),
        ([",".join(["1.1.1.1"] + ["10.2.2.2"] * 1_000)], "1.1.1.1"),
    ],
)
async def test_the_client_is_the_rightmost_address_that_is_not_a_trusted_proxy(values: list[str], address: str) -> None:
    assert (await seen({"for": values}, "10.0.0.0/8"))[0] == address


@pytest.mark.parametrize(
    ("forwarded", "scheme", "host"),
    [
        ({"proto": ["HTTPS"]}, "https", "stagecast:3000"),
        ({"proto": ["wss"]}, "https", "stagecast:3000"),
        ({"proto": ["gopher"]}, "http", "stagecast:3000"),
        ({"proto": [""], "host": [""], "port": [""]}, "http", "stagecast:3000"),
        ({"proto": ["https, http"], "for": ["203.0.113.9, 10.2.2.2"]}, "https", "stagecast:3000"),
        (
            {"proto": ["http, https"], "for": ["203.0.113.9"]},
            "https",
            "stagecast:3000",
        ),  # The client's own does not count.
        ({"proto": ["https"], "for": ["203.0.113.9, 10.2.2.2"]}, "https", "stagecast:3000"),
        ({"host": ["Pictures.Example.com:8443"]}, "http", f"{HOST}:8443"),
        ({"host": [HOST], "port": ["8443"]}, "http", f"{HOST}:8443"),
        ({"host": [f"{HOST}:1"], "port": ["2"]}, "http", f"{HOST}:1"),
        ({"host": ["[::1]"], "port": ["2"]}, "http", "[::1]:2"),
        ({"host": ["evil.com", HOST]}, "http", HOST),
        ({"host": ["a b"]}, "http", "stagecast:3000"),
        ({"host": ["x; script-src *"], "port": ["80; x"]}, "http", "stagecast:3000"),
        ({"port": ["8443"]}, "http", "stagecast:3000"),
    ],
)
async def test_scheme_and_host_are_those_of_the_client(forwarded: JSON, scheme: str, host: str) -> None:
    assert (await seen(forwarded, "10.0.0.0/8"))[1:] == (scheme, host)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def trusting(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Running, str]]:
    """A service whose proxy tells by headers that it was called by https and by another name."""
    headers = {"Host": "upstream", "X-Forwarded-Host": HOST, "X-Forwarded-Proto": "https", "X-Forwarded-For": "::1"}
    settings: JSON = {"trusted_proxies": ("127.0.0.0/8",), "allowed_hosts": (HOST,)}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with (
            running(tmp_path_factory.mktemp("images"), **settings) as service,
            Proxy.open(service.port, listener=listener, rewrite=forward(headers=headers)),
        ):
            yield service, f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_the_same_origin_is_the_one_that_the_trusted_proxy_is_called_by(trusting: tuple[Running, str]) -> None:
    _, url = trusting
    async with httpx2.AsyncClient(base_url=url, verify=False) as http:
        for origin in (f"https://{HOST}", f"https://{HOST}:443"):
            answer = await http.get("/me", headers={"Origin": origin})
            assert answer.status_code == 200
            assert answer.headers.get_list("access-control-allow-origin") == [origin]
        for origin in (f"http://{HOST}", "https://upstream", f"https://{HOST}:8443"):
            assert_problem(await http.get("/me", headers={"Origin": origin}), 403, "origin_not_allowed")
        assert f"wss://{HOST}" in (await http.get("/")).headers["content-security-policy"]


async def test_forwarded_headers_change_nothing_without_trusted_proxies(tmp_path: Path) -> None:
    async with running(tmp_path, allowed_hosts=(HOST,)) as service:
        for sent in itertools.chain(
            ({"X-Forwarded-Proto": value} for value in ("https", "wss")),
            ({"X-Forwarded-Host": "evil.example"}, {"Forwarded": f"proto=https;host={HOST}"}, {"X-Real-IP": "1.1.1.1"}),
        ):
            answer = await service.http.get("/me", headers={"Host": HOST, "Origin": f"https://{HOST}", **sent})
            assert_problem(answer, 403, "origin_not_allowed")
            answer = await service.http.get("/me", headers={"Host": HOST, "Origin": f"http://{HOST}", **sent})
            assert answer.status_code == 200
        answer = await service.http.get("/me", headers={"Host": "evil.example", "X-Forwarded-Host": HOST})
        assert_problem(answer, 403, "host_not_allowed")
