"""How the page's files are sent: compressed, under names that change with their content, and few."""

import gzip
import re
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import httpx2
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Response, expect

from api.web.page import FOLDER, plain_texts
from support.browser import needs_chromium, tabs
from support.guarded import guarded
from support.harness import Running, running
from support.node import needs_client
from support.page import PromptedEditor, QuickComposer

pytestmark = pytest.mark.asyncio(loop_scope="session")

DECODE: Final[dict[str | None, Callable[[bytes], bytes]]] = {"gzip": gzip.decompress, None: bytes}
#: Bytes of text and scripts, compressed, that the page may take.
BUDGET: Final = 100_000


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    overrides = {"editor": PromptedEditor(), "composer": QuickComposer()}
    async with running(tmp_path_factory.mktemp("images"), overrides=overrides) as service:
        yield service


async def get(service: Running, path: str, **headers: str) -> tuple[httpx2.Response, bytes]:
    """The response with exactly these headers, and its body as it was sent."""
    named = {"Accept-Encoding": "identity", **{name.replace("_", "-"): value for name, value in headers.items()}}
    async with service.http.stream("GET", path, headers=named) as response:
        return response, b"".join([part async for part in response.aiter_raw()])


async def addresses(service: Running) -> list[str]:
    """What the page refers to on its own host."""
    response, _ = await get(service, "/")
    text = (await service.http.get("/")).text
    assert response.status_code == 200
    return [path for path in re.findall(r'(?:src|href)="(/[^"]+)"', text) if path != "/docs"]


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip, deflate, br, zstd", "gzip"),
        ("br, GZIP;q=0.5", "gzip"),
        ("br;q=1.0,gzip;q=1.0", "gzip"),
        ("gzip ; q=1, *;q=0", "gzip"),
        ("gzip;q=0", None),
        ("gzip ; q=0.00, br", None),
        ("xgzip, gzip-br", None),
        ("*", None),
        ("", None),
        (";;,q=,gzip;q=x", "gzip"),
    ],
)
async def test_text_is_compressed_as_the_client_accepts(service: Running, accepted: str, coding: str | None) -> None:
    for path in ("/", "/static/stagecast.js", "/static/app.css", "/static/icon.svg"):
        response, body = await get(service, path, Accept_Encoding=accepted)
        assert response.headers.get("content-encoding") == coding, path
        assert "Accept-Encoding" in response.headers["vary"]
        assert int(response.headers["content-length"]) == len(body)
        plain, whole = await get(service, path)
        assert DECODE[coding](body) == whole
        assert (response.headers["etag"] == plain.headers["etag"]) == (coding is None)
        head = await service.http.head(path, headers={"Accept-Encoding": accepted})
        assert head.content == b""
        for name in ("content-encoding", "content-length", "content-type", "etag", "vary", "cache-control"):
            assert head.headers.get(name) == response.headers.get(name), name


async def test_pictures_and_live_answers_are_not_compressed(service: Running) -> None:
    for path in ("/static/samples/hat.webp", "/socket.io/?EIO=4&transport=polling"):
        response, _ = await get(service, path, Accept_Encoding="gzip, br")
        assert response.status_code == 200
        assert "content-encoding" not in response.headers
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "gzip, br", "X-User-Id": "ada"}
    async with service.http.stream("GET", "/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert "content-encoding" not in stream.headers


async def test_each_coding_is_revalidated_with_its_own_etag(service: Running) -> None:
    for path in ("/", "/static/app.js"):
        tags = set()
        for accepted in ("gzip", "identity"):
            response, _ = await get(service, path, Accept_Encoding=accepted)
            tags.add(tag := response.headers["etag"])
            for condition in (tag, f'"other", W/{tag}'):
                again, body = await get(service, path, Accept_Encoding=accepted, If_None_Match=condition)
                assert (again.status_code, body) == (304, b"")
                assert again.headers["etag"] == tag
                assert "Accept-Encoding" in again.headers["vary"]
        assert len(tags) == 2
        changed, _ = await get(service, path, Accept_Encoding="gzip", If_None_Match=min(tags)[:-2] + 'x"')
        assert changed.status_code == 200


async def test_the_page_names_its_files_by_their_content_and_preloads_all_its_modules(service: Running) -> None:
    paths = await addresses(service)
    [version] = {path.split("/")[2] for path in paths}
    assert re.fullmatch(r"v-[0-9a-f]{16}", version)
    modules = ["app.js"]
    for module in modules:
        imported = re.findall(r'from\s+"\./([^"]+)"', (FOLDER / module).read_text("utf-8"))
        modules += [name for name in imported if name not in modules]
    assert {"stagecast.js", "tray.js", "fitting.js"} <= set(modules)
    assert {f"/static/{version}/{name}" for name in modules} <= set(paths)
    for path in dict.fromkeys(paths):
        response, body = await get(service, path)
        assert response.status_code == 200, path
        assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
        plain, same = await get(service, path.replace(f"/{version}", ""))
        assert plain.headers["cache-control"] == "no-cache"
        assert body == same


async def test_a_changed_file_changes_the_names_and_another_nodes_names_are_not_kept(
    service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "static")
    (folder / "base.css").write_text((folder / "base.css").read_text("utf-8") + "\n", "utf-8")
    monkeypatch.setattr("api.web.page.FOLDER", folder)
    async with running(tmp_path / "images") as newer:
        old, new = set(await addresses(service)), set(await addresses(newer))
        assert not old & new
        [path] = [each for each in old if each.endswith("/base.css")]
        response, _ = await get(newer, path)
        assert response.status_code == 200
        assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    ["", "/", "/v-0123456789abcdef", "/v-0123456789abcdef/", "/nothing.js", "/../page.py", "/%2e%2e/page.py",
     "/v-0123456789abcdef/../../page.py", "/v-xyz/app.js", "/samples", "/vendor/", "//app.js", "/app.js/", "/App.js"],
)  # fmt: skip
async def test_there_is_nothing_else_below_static(service: Running, path: str) -> None:
    assert (await service.http.get(f"/static{path}")).status_code == 404


async def test_the_page_has_its_texts_before_any_script_and_in_the_language_of_the_browser(service: Running) -> None:
    texts = plain_texts()
    for wanted, language in (("tr-TR,tr;q=0.9,en;q=0.8", "tr"), ("de-DE, en-GB", "en"), ("", "en"), ("fr, tr", "tr")):
        response = await service.http.get("/", headers={"Accept-Language": wanted})
        assert "Accept-Language" in response.headers["vary"]
        assert f'<html lang="{language}"' in response.text
        for key in ("newPicture", "start", "prompt", "chooseHint"):
            assert f">{texts[language][key]}<" in response.text, key
        assert f'placeholder="{texts[language]["promptHint"]}"' in response.text
        assert re.search(r'data-text="\w+"[^>]*></', response.text) is None


async def test_the_form_or_the_sign_in_is_visible_before_the_scripts(service: Running, tmp_path: Path) -> None:
    assert '<main id="work">' in (await service.http.get("/")).text
    async with guarded(tmp_path) as protected, httpx2.AsyncClient(base_url=protected.url) as stranger:
        page = (await stranger.get("/")).text
        assert '<main id="work" hidden>' in page
        assert '<main id="sign-in">' in page


@needs_client
async def test_text_and_scripts_stay_in_their_budget(service: Running) -> None:
    total = 0
    for path in ["/", *dict.fromkeys(await addresses(service))]:
        response, body = await get(service, path, Accept_Encoding="gzip, br")
        total += len(body) if not response.headers["content-type"].startswith("image/webp") else 0
    assert 30_000 < total <= BUDGET


@needs_chromium
@needs_client
async def test_on_a_slow_network_the_form_comes_before_the_scripts(
    browser: Browser, service: Running, eve: str
) -> None:
    async with tabs(browser, service.url, user=eve, open_page=False) as [tab]:
        loaded: list[str] = []

        def note(response: Response) -> None:
            loaded.append(response.url)

        tab.page.on("response", note)
        cdp = await tab.page.context.new_cdp_session(tab.page)
        await cdp.send("Network.enable")
        slow = {"offline": False, "latency": 400, "downloadThroughput": 50_000, "uploadThroughput": 50_000}
        await cdp.send("Network.emulateNetworkConditions", slow)
        await tab.goto()
        await tab.is_connected()
        paint, scripts = await tab.page.evaluate(
            """() => [
              performance.getEntriesByName("first-contentful-paint")[0].startTime,
              Math.max(...performance.getEntriesByType("resource")
                .filter(({ name }) => name.endsWith(".js")).map(({ responseEnd }) => responseEnd)),
            ]"""
        )
        assert paint < scripts
        assert len(loaded) == len(set(loaded)), "Something was loaded twice."
        await expect(tab["#start"]).to_have_text("Start")
