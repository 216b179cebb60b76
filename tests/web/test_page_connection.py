"""The page in a browser when the network, the service or the token fails."""

import asyncio
import re
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Route, expect

from adapters.memory.log import MemoryLog
from adapters.serving.uvicorn_server import Server
from adapters.system import now
from api.app import create_service
from api.settings import Settings
from api.web.page import CDN, FOLDER
from support.browser import Tab, axe_violations, needs_axe, needs_chromium, tabs
from support.builders import SteppableClock, memory_storage
from support.doubles import Pause
from support.guarded import guarded, token
from support.harness import Running, running, wired
from support.node import needs_client
from support.page import NETWORK, PromptedEditor, QuickComposer, logged

pytestmark = [needs_chromium, needs_client, pytest.mark.asyncio(loop_scope="session")]

EDITOR = PromptedEditor()

#: A service that stops may refuse thumbnails.
STOPPING = f"{NETWORK}|status of 503|^WebSocket is already in CLOSING or CLOSED"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    overrides = {"editor": EDITOR, "composer": QuickComposer()}
    async with running(tmp_path_factory.mktemp("images"), overrides=overrides) as service:
        yield service


async def started(tab: Tab, prompt: str) -> Pause:
    """Start an edit, and wait until its editor works."""
    pause = EDITOR.pause(prompt)
    await tab.start(prompt)
    await pause.reached.wait()
    await expect(tab["#bar"]).to_have_attribute("aria-valuenow", "60")
    return pause


async def test_after_a_manual_disconnect_nothing_is_missed_and_late_events_are_reported(
    browser: Browser, service: Running
) -> None:
    async with tabs(browser, service.url, 2, user="ada") as [away, there]:
        pause = await started(away, "a far hat")
        await away.cut()
        await expect(away["#notice"]).to_contain_text("You have cut this tab’s live connection.")
        pause.released.set()
        await there.shows("completed", "a far hat")
        await away.shows("active", "a far hat")
        await expect(away["#bar"]).to_have_attribute("aria-valuenow", "60")
        await away.page.get_by_role("button", name="Restore it").click()
        await away.shows("completed", "a far hat")
        await expect(away["#notice"]).to_contain_text("Back: 2 events you missed.")
        await expect(away["#timeline .late"]).to_have_count(2)
        assert await away.timeline() == await there.timeline() == await logged(service, "ada")
        await away.page.get_by_role("button", name="Dismiss").click()
        await expect(away["#notice"]).to_be_empty()


async def test_after_a_network_loss_nothing_is_missed(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="ben", ignore=NETWORK) as [tab]:
        pause = await started(tab, "a lone hat")
        await tab.page.context.set_offline(True)
        await tab.is_connected("offline")
        await expect(tab["#notice"]).to_contain_text("Offline.")
        async with service.phone("ben") as phone:
            [generation] = (await service.get("/generations", "ben"))["generations"]
            pause.released.set()
            await phone.until_over(generation["generationId"])
        await tab.shows("active")
        await tab.page.context.set_offline(False)
        await tab.shows("completed", "a lone hat")
        await expect(tab["#notice"]).to_contain_text("Back: 2 events you missed.")
        assert await tab.timeline() == await logged(service, "ben")


async def test_a_reconnect_keeps_a_generation_that_a_fast_clock_has_dated(browser: Browser, tmp_path: Path) -> None:
    clock = SteppableClock(now())
    overrides = {"editor": EDITOR, "composer": QuickComposer(), "clock": clock}
    async with running(tmp_path, overrides=overrides) as service:
        clock.step(60)
        early = await service.start("hal", prompt="an early hat")
        await service.service.leases.drain()
        clock.step(-60)
        async with tabs(browser, service.url, user="hal") as [tab]:
            await tab.shows("completed", "an early hat")
            for _ in range(2):  # Twenty in all, of which the service lists the newest ones.
                for _ in range(10):
                    await service.start("hal", prompt="a late hat")
                await service.service.leases.drain()
            await expect(tab["#history .tile[data-state=completed]"]).to_have_count(20)
            await tab.cut()
            async with tab.page.expect_response(f"**/generations/{early}") as asked:
                await tab["#cut"].click()
            assert (await asked.value).ok
            await expect(tab["#notice"]).to_contain_text("Back. You missed nothing.")
            await tab.shows("completed", "an early hat")


async def test_pictures_that_could_not_be_loaded_are_loaded_after_a_reconnect(
    browser: Browser, service: Running
) -> None:
    async with tabs(browser, service.url, user="ida", ignore=NETWORK) as [tab]:
        await tab.page.route("**/images/**", lambda route: route.abort())
        await tab.start("a hidden hat")
        await tab.shows("completed", "a hidden hat")
        pictures = [tab["#after"], tab["#history .tile img"]]
        for picture in pictures:
            await expect(picture).to_be_hidden()
        await tab.page.unroute("**/images/**")
        await tab.cut()
        await tab["#cut"].click()
        for picture in pictures:
            await expect(picture).to_have_js_property("naturalWidth", 200)
            await expect(picture).to_be_visible()


async def test_without_the_socket_io_client_the_page_polls_and_shows_a_notice(
    browser: Browser, service: Running
) -> None:
    async with tabs(browser, service.url, user="cem", ignore=NETWORK, open_page=False) as [tab]:
        await tab.page.route("**/vendor/socket.io.min.js", lambda route: route.abort("failed"))
        await tab.goto()
        await tab.is_connected("polling")
        await expect(tab["#notice"]).to_contain_text("The Socket.IO client could not be loaded")
        pause = await started(tab, "a polled hat")
        pause.released.set()
        await tab.shows("completed", "a polled hat")
        assert await tab.timeline() == await logged(service, "cem")


@pytest.mark.parametrize("reachable", [True, False])
async def test_without_an_own_client_the_page_uses_the_cdn_or_polls(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    async def client(route: Route) -> None:
        if reachable:
            path = FOLDER / "vendor" / "socket.io.min.js"
            await route.fulfill(path=path, headers={"Access-Control-Allow-Origin": "*"}, content_type="text/javascript")
        else:
            await route.abort("failed")

    shutil.copytree(FOLDER, tmp_path / "static", ignore=shutil.ignore_patterns("vendor"))
    monkeypatch.setattr("api.web.page.FOLDER", tmp_path / "static")
    async with (
        running(tmp_path / "images") as service,
        tabs(browser, service.url, ignore=f"{NETWORK}|^{re.escape(CDN)}$", open_page=False) as [tab],
    ):
        await tab.page.route(CDN, client)
        await tab.goto()
        await tab.is_connected("live" if reachable else "polling")


async def test_a_rejected_user_id_is_reported(browser: Browser, service: Running) -> None:
    async with tabs(browser, service.url, user="a\u0085b", open_page=False) as [tab]:
        await tab.goto()
        await tab.is_connected("refused")
        await expect(tab["#notice"]).to_contain_text("The service does not accept this user.")


# ---- Tokens --------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def keyed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    overrides = {"editor": EDITOR, "composer": QuickComposer()}
    async with guarded(tmp_path_factory.mktemp("images"), overrides=overrides) as service:
        yield service


async def test_the_language_can_be_changed_before_signing_in(browser: Browser, keyed: Running) -> None:
    async with tabs(browser, keyed.url, open_page=False) as [tab]:
        await tab.goto()
        await tab["#token"].fill("no token at all")
        await tab["#token"].press("Enter")
        await expect(tab["#token-problem"]).to_have_text("This is not a token.")
        await tab["#language"].click()
        await expect(tab["html"]).to_have_attribute("lang", "tr")
        await expect(tab["#language"]).to_have_text("English")
        await expect(tab["#token-problem"]).to_have_attribute("lang", "en")


@needs_axe
async def test_with_a_key_configured_each_tab_signs_in_by_token(browser: Browser, keyed: Running) -> None:
    async with tabs(browser, keyed.url, 2, open_page=False) as [other, tab]:
        await tab.goto()
        await expect(tab["#work"]).to_be_hidden()
        assert await axe_violations(tab.page) == []
        for wrong, why in (
            ("no token at all", "This is not a token."),
            (token(secret="another secret, which is long enough"), "The service does not accept this token."),
            (token(exp=1), "This token has expired."),
        ):
            await tab["#token"].fill(wrong)
            await tab["#token"].press("Enter")
            await expect(tab["#token-problem"]).to_have_text(why)
        await tab["#token"].fill(f"  Bearer {token('ada')}\n")
        await tab["#token"].press("Enter")
        await tab.is_connected()
        await expect(tab["#user-button"]).to_have_text("ada")
        await tab.start("a secret hat")
        await tab.shows("completed", "a secret hat")
        await tab.page.reload()
        await tab.shows("completed", "a secret hat")
        assert await tab.page.evaluate("localStorage.length") == 0
        await other.page.bring_to_front()
        await other.goto()
        await expect(other["#sign-in"]).to_be_visible()
        await other["#token"].fill(token("bob"))
        await other["#token"].press("Enter")
        await other.shows("empty")
        await tab.page.bring_to_front()
        await tab.upgraded()
        await tab["#user-button"].click()
        await tab["#sign-out"].click()
        await expect(tab["#sign-in"]).to_be_visible()
        await tab.page.reload()
        await expect(tab["#sign-in"]).to_be_visible()
        await expect(tab["#stage-title"]).to_be_empty()


async def test_after_its_token_expired_a_user_signs_in_again_and_continues(browser: Browser, tmp_path: Path) -> None:
    # The socket is closed after one real second. The service's clock stands still until `step`, so that the token is
    # accepted again until then.
    clock = SteppableClock(now())
    overrides = {"editor": EDITOR, "composer": QuickComposer(), "clock": clock}
    async with (
        guarded(tmp_path, overrides=overrides) as keyed,
        tabs(browser, keyed.url, open_page=False, ignore=f"{NETWORK}|status of 401") as [tab],
    ):
        await tab.goto()
        await tab["#token"].fill(token("eva", exp=clock().timestamp() + 1))
        await tab["#token"].press("Enter")
        await tab.is_connected()
        await tab["#prompt"].fill("a fresh hat")
        clock.step(2)
        await expect(tab["#token-problem"]).to_have_text("This token has expired.")
        await tab["#token"].fill(token("eva"))
        await tab["#token"].press("Enter")
        await tab.is_connected()
        await expect(tab["#prompt"]).to_have_value("a fresh hat")
        await tab.start("a fresh hat")
        await tab.shows("completed", "a fresh hat")


async def test_after_its_token_expired_nothing_of_a_user_is_shown_to_the_next_one(
    browser: Browser, tmp_path: Path
) -> None:
    clock = SteppableClock(now())
    overrides = {"editor": EDITOR, "composer": QuickComposer(), "clock": clock}
    options: dict[str, Any] = {"viewport": {"width": 390, "height": 500}, "ignore": f"{NETWORK}|status of 401"}
    async with (
        guarded(tmp_path, overrides=overrides) as keyed,
        tabs(browser, keyed.url, open_page=False, **options) as [tab],
    ):
        await tab.goto()
        await tab["#token"].fill(token("fay", exp=clock().timestamp() + 1))
        await tab["#token"].press("Enter")
        await tab.is_connected()
        pause = await started(tab, "a private hat")
        await expect(tab.page).to_have_title("60% · Editing · a private hat · Stagecast")
        await tab["#composer"].evaluate("(composer) => (composer.open = true)")
        await tab["#prompt"].fill("a next hat")
        await expect(tab["#tray li"]).to_have_count(1)
        await tab.page.evaluate("location.hash = document.querySelector('#generation-id').textContent")
        await tab["footer"].scroll_into_view_if_needed()
        await expect(tab["#strip"]).to_be_visible()
        clock.step(2)
        await expect(tab["#token-problem"]).to_have_text("This token has expired.")
        await expect(tab["#strip"]).to_be_hidden()
        await expect(tab.page).to_have_title("Stagecast")
        await expect(tab["link[rel=icon]"]).to_have_attribute("href", re.compile(r"icon\.svg$"))
        await tab["#token"].fill("ey.no.token")
        await tab["#token"].press("Enter")
        await expect(tab["#token-problem"]).to_have_text("The service does not accept this token.")
        await tab["#token"].fill(token("gus"))
        await tab["#token"].press("Enter")
        await tab.shows("empty")
        await expect(tab["#prompt"]).to_have_value("")
        await expect(tab["#tray li"]).to_have_count(0)
        await expect(tab.page).to_have_url(f"{keyed.url}/")
        pause.released.set()
        await keyed.service.leases.drain()


# ---- The service restarts -------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> Iterator[int]:
    """A port that stays reserved while no service listens on it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@asynccontextmanager
async def serving(images: Path, port: int, **overrides: Any) -> AsyncIterator[None]:
    """A service on this port, which shuts down at once at the end."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        settings = Settings(_env_file=None, port=port, images=images)
        service, app = create_service(await wired(settings, editor=EDITOR, composer=QuickComposer(), **overrides))
        ready = asyncio.Event()
        server = Server(app, service.shutdown, ready.set)
        task = asyncio.create_task(server.serve([listener]))
        await ready.wait()
        try:
            yield
        finally:
            server.begin_shutdown(now=True)
            await task


async def try_now(tab: Tab) -> None:
    """Press "Try now", unless the page has reconnected by itself."""
    await tab.page.evaluate(
        "() => [...document.querySelectorAll('#notice button')].find((it) => it.textContent === 'Try now')?.click()"
    )


async def test_after_a_restart_without_history_the_page_shows_the_current_state(
    browser: Browser, tmp_path: Path, port: int
) -> None:
    async with AsyncExitStack() as first:
        await first.enter_async_context(serving(tmp_path / "first", port))
        async with tabs(browser, f"http://127.0.0.1:{port}", user="fay", ignore=STOPPING) as [tab]:
            await started(tab, "a lost hat")
            await tab.upgraded()
            await first.aclose()
            await tab.shows("failed", "a lost hat")
            await expect(tab["#outcome"]).to_contain_text("The service stopped while working on this.")
            await tab.is_connected("offline")
            async with serving(tmp_path / "second", port):
                await try_now(tab)
                await expect(tab["#notice"]).to_contain_text("The service no longer has the history")
                await tab.shows("empty")
                await tab.start("a new hat")
                await tab.shows("completed", "a new hat")


async def test_after_a_restart_with_its_log_nothing_is_missing(browser: Browser, tmp_path: Path, port: int) -> None:
    log = MemoryLog(epoch="e", credits=100, clock=now)
    async with AsyncExitStack() as first:
        await first.enter_async_context(serving(tmp_path, port, storage=memory_storage(log)))
        async with tabs(browser, f"http://127.0.0.1:{port}", user="gus", ignore=STOPPING) as [tab]:
            await tab.start("a kept hat")
            await tab.shows("completed")
            await tab.upgraded()
            await first.aclose()
            await tab.is_connected("offline")
            async with serving(tmp_path, port, storage=memory_storage(log)):
                await try_now(tab)
                await expect(tab["#notice"]).to_contain_text("Back. You missed nothing.")
                await tab.shows("completed", "a kept hat")
                await tab.start("a second hat")
                await tab.shows("completed", "a second hat")
                await expect(tab["#history .tile"]).to_have_count(2)
