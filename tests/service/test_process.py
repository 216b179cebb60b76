"""The command line as an operator meets it: a process, its one line, its signals and its exit codes."""

import asyncio
import contextlib
import signal
import socket
from pathlib import Path

import pytest

from support.command_line import SERVE, CommandResult, run_main
from support.harness import JSON
from support.serve_process import last_of, patient, serving, stagecast, talk, until, watching
from support.sites import PNG, SITE, Site, listening, page


async def test_the_ready_line_has_url_mode_and_providers_and_ctrl_c_exits(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, watching(service.url):
        assert service.line.startswith("Stagecast is ready on http://localhost:")
        assert "anybody on this machine may act for any user" in service.line
        assert "editor: local" in service.line
        assert "face swap: local" in service.line
        service.process.send_signal(signal.SIGINT)
        code, errors = await service.ended()
        assert (code, errors) == (0, "")


async def test_an_idle_service_exits_at_once_with_0(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, watching(service.url):
        service.process.send_signal(signal.SIGTERM)
        assert await service.ended() == (0, "")


async def test_sigterm_finishes_running_work_and_refuses_new_work(tmp_path: Path) -> None:
    done = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.write(page(PNG))

    # The work lasts until its picture comes.
    site = Site(pages={"/a.png": answer})
    async with (
        listening(site.serve, str(SITE)) as site.port,
        serving(tmp_path, "--local-seconds", "0", "--fetch-allow", str(SITE)) as service,
        patient() as http,
        watching(service.url) as events,
    ):
        url = site.url(host=f"[{SITE}]" if SITE.version == 6 else str(SITE))
        generation_id = (await service.start(http, imageUrls=url, faceSwap="false")).json()["generationId"]
        await until(lambda: any(event.get("status") == "composition" for event in events))
        service.process.send_signal(signal.SIGTERM)
        ready = await service.draining(http)
        assert (ready.status_code, ready.json()["code"]) == (503, "draining")
        refused = await service.start(http)
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        assert (await http.get(f"{service.url}/health/live")).status_code == 200
        done.set()
        assert await service.ended() == (0, "")
        last = await last_of(events)
        assert (last["generationId"], last["status"]) == (generation_id, "completed")


async def test_sigterm_waits_for_external_work(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, patient() as http, watching(service.url) as events:
        who, fields = {"X-User-Id": "ada"}, {"prompt": (None, b"a red hat")}
        begun = await http.post(f"{service.url}/generations/generate?runner=external", files=fields, headers=who)
        work = f"{service.url}{begun.headers['Location']}/transitions"
        service.process.send_signal(signal.SIGTERM)
        assert (await service.draining(http)).json()["code"] == "draining"
        for status in ("composition", "composition_completed", "ai_generation", "completed"):
            assert (await http.post(work, json={"status": status}, headers=who)).status_code == 200
        assert await service.ended() == (0, "")
        assert (await last_of(events))["status"] == "completed"


@pytest.mark.parametrize(
    ("flags", "signals"),
    [
        pytest.param(["--drain", "0.2"], [signal.SIGTERM], id="the drain is over"),
        pytest.param([], [signal.SIGTERM, signal.SIGTERM], id="a second signal", marks=pytest.mark.long),
        pytest.param([], [signal.SIGINT], id="SIGINT"),
    ],
)
async def test_work_left_after_the_drain_is_interrupted_and_its_user_notified(
    tmp_path: Path, flags: list[str], signals: list[signal.Signals]
) -> None:
    async with (
        serving(tmp_path, "--local-seconds", "60", *flags) as service,
        patient() as http,
        watching(service.url) as events,
    ):
        await service.start(http)
        await until(lambda: any(event.get("status") == "openai_editing" for event in events))
        first, *others = signals
        service.process.send_signal(first)
        for other in others:
            await service.draining(http)  # Two signals that nobody has looked at yet are one.
            service.process.send_signal(other)
        assert await service.ended() == (0, "")
        last = await last_of(events)
        assert (last["status"], last["code"], last["failedStage"]) == ("failed", "interrupted", "openai_editing")
        assert (last["retryable"], last["credit"]) == (True, 100)


async def test_open_connections_do_not_delay_the_exit(tmp_path: Path) -> None:
    """Case 5: an idle socket, a stalled reader, a long poll, a slow upload, a running generation."""
    async with (
        contextlib.AsyncExitStack() as talks,
        serving(tmp_path, "--local-seconds", "60", "--drain", "0.5") as service,
        patient() as http,
        watching(service.url) as events,
    ):
        await service.start(http)
        await until(lambda: any(event.get("status") == "openai_editing" for event in events))
        port = int(service.url.rsplit(":", 1)[1])
        uploading, stalled, polling = [await talk(port, talks) for _ in range(3)]
        uploading[1].write(
            b"POST /generations/edit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        stalled[1].write(
            b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert (await stalled[0].readline()).startswith(b"HTTP/1.1 101")
        opened = await http.get(f"{service.url}/socket.io/?EIO=4&transport=polling")
        sid = opened.text.split('"sid":"')[1].split('"')[0]
        polling[1].write(
            f"GET /socket.io/?EIO=4&transport=polling&sid={sid} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):  # A busy machine may take it. Whoever is waited for takes longer.
            await service.process.wait()
        assert await service.ended() == (0, "")
        assert (await last_of(events))["code"] == "interrupted"


async def test_a_port_in_use_exits_with_3_and_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = await stagecast("serve", "--port", str(port), "--images", str(tmp_path))
        _, errors = await process.communicate()
        assert process.returncode == 3
        assert errors.decode() == f"stagecast: port {port} is taken; choose another with --port or STAGECAST_PORT.\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST"])
async def test_a_node_on_loopback_that_would_announce_another_address_exits_with_2(tmp_path: Path, host: str) -> None:
    flags = ("--port", "0", "--images", f"{tmp_path}", "--host", host, "--node-address")
    for address in ("10.0.0.1:3000", "node.internal:3000"):
        process = await stagecast("serve", *flags, address)
        _, errors = await process.communicate()
        assert (process.returncode, errors.count(b"\n")) == (2, 1)
        assert errors.startswith(b"stagecast: STAGECAST_NODE_ADDRESS must be a loopback address")


async def test_an_unwritable_folder_exits_with_2_and_one_sentence() -> None:
    process = await stagecast("serve", "--images", "/dev/null/x")
    output, errors = await process.communicate()
    done = CommandResult(process.returncode or 0, output.decode(), errors.decode())
    assert "STAGECAST_IMAGES" in done.sentence(2)


@pytest.mark.parametrize(
    ("flags", "variables", "named"),
    [
        (["--port", "http"], {}, "STAGECAST_PORT"),
        ([], {"STAGECAST_CREDITS": "-1"}, "STAGECAST_CREDITS"),
        ([], {"STAGECAST_PROT": "3000"}, "STAGECAST_PROT"),
        (["--host", "0.0.0.0"], {}, "--allow-open"),
    ],
)
async def test_invalid_settings_exit_with_2_and_one_sentence(flags: list[str], variables: JSON, named: str) -> None:
    assert named in (await run_main(*SERVE, *flags, **variables)).sentence(2)


async def test_help_lists_every_setting() -> None:
    done = await run_main("serve", "--help")
    assert done.code == 0
    for flag in ("--port", "--drain", "--allow-open", "--local-seconds", "--max-per-user"):
        assert flag in done.output
