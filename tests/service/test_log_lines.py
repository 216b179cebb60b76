"""What the service logs: a line for each thing an operator has to know, and nothing private at any level."""

import json
import logging
import re
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
import websockets

from api.cli.main import main
from api.settings import SettingsError, load_settings
from support.guarded import EXPIRED, SECRET, SERVICE, token
from support.harness import JSON, PHOTO, RAW_OPTIONS, running
from support.log_lines import assert_nothing_private
from support.openai_server import KEY, error, openai_server
from support.raw_http import exchange
from support.serve_process import Process, patient, serving

PROMPT: Final = "Ein rotes Halsband für “Momo”, bitte"
HOOK: Final = "http://hook:hunter2@127.0.0.1:9/secret-hook?key=hook-key"

ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


def parts(prompt: str = PROMPT) -> list[tuple[str, Any]]:
    return [("images", ("holiday.jpg", PHOTO, "image/jpeg")), ("prompt", (None, prompt))]


async def run_generations(service: Process, http: httpx2.AsyncClient, bearer: str) -> list[str]:
    """Start some, and wait for their ends."""
    ids = []
    for kind in ("edit", "generate"):
        answer = await http.post(f"{service.url}/generations/{kind}", files=parts())
        assert answer.status_code == 202, answer.text
        ids.append(answer.json()["generationId"])
        await http.get(f"{service.url}/generations/{ids[-1]}/events?access_token={bearer}")
        async with http.stream("GET", f"{service.url}/generations/{ids[-1]}/events?access_token={bearer}", headers={
            "Accept": "text/event-stream"
        }) as stream:  # fmt: skip
            await stream.aread()
    return ids


async def test_every_line_at_debug_is_json_with_the_facts_and_nothing_private(tmp_path: Path) -> None:
    ada = token()
    async with openai_server() as openai:
        refused = error(400, "invalid_request_error", "moderation_blocked", f"Refused: {PROMPT!r} {KEY}")
        openai.answer(refused, openai.draw)
        variables = {
            "STAGECAST_JWT_SECRET": SECRET,
            "STAGECAST_WEBHOOK_URL": HOOK,
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": openai.base_url,
        }
        flags = ("--log-level", "debug", "--log-format", "json")
        async with serving(tmp_path, *flags, **variables) as service, patient() as http:
            http.headers["Authorization"] = f"Bearer {ada}"
            failed, completed = await run_generations(service, http, ada)
            history = (await http.get(f"{service.url}/generations/{completed}/events")).json()["events"]
            name = history[-1]["data"]["generatedImageUrl"].rpartition("/")[2]
            await http.get(f"{service.url}/images/{name}?width=7&signature=abc")
            await http.get(f"{service.url}/images/{name.replace('gen', 'edit')}?signature=abc")
            for _ in range(5):
                await http.get(f"{service.url}/me?access_token={ada}", headers={"Authorization": f"Bearer {EXPIRED}"})
            mine = {"X-Request-Id": "trace-1.2_3"}
            await http.get(f"{service.url}/generations/{failed}x", headers=mine)
            await http.post(f"{service.url}/generations/edit", files=parts(""), headers=mine)
            await http.post(f"{service.url}/users/bob/credit", json={"amount": 1}, headers=mine)
            await http.get(f"{service.url}/generations", headers={**mine, "X-User-Id": "bob"})
            await http.get(f"{service.url}/nowhere/{PROMPT}")
            service.process.terminate()
            code, errors = await service.ended()
    assert code == 0
    lines: list[JSON] = [json.loads(line) for line in errors.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    texts = [json.dumps(line, ensure_ascii=False) for line in lines]
    assert_nothing_private(texts, "rotes", "Halsband", KEY, "holiday", "hook-key", "hunter2", "signature", SECRET, name)

    def logged(message: str, **fields: object) -> list[JSON]:
        return [line for line in lines if line["message"] == message and fields.items() <= line.items()]

    for generation_id, kind in ((failed, "edit"), (completed, "generate")):
        [start] = logged("generation started", generationId=generation_id)
        assert (start["kind"], start["user"], start["level"]) == (kind, "ada", "info")
        assert ID.fullmatch(start["requestId"])
    assert logged("generation ended", generationId=failed, code="provider_rejected", user="ada")
    assert logged("generation ended", generationId=completed, code="completed", user="ada")
    requests = [
        {"method": "GET", "route": "/images/{name}", "status": 422, "code": "invalid_request"},
        {"method": "GET", "route": "/images/{name}", "status": 404, "code": "not_found"},
        {"method": "GET", "route": "/generations/{generation_id}", "status": 404, "code": "not_found", "user": "ada"},
        {"method": "POST", "route": "/generations/edit", "status": 422, "code": "invalid_request", "user": "ada"},
        {"method": "POST", "route": "/users/{user_id}/credit", "status": 403, "code": "forbidden", "user": "ada"},
        {"method": "GET", "route": "/generations", "status": 403, "code": "forbidden", "user": "ada"},
        {"method": "GET", "route": "unknown", "status": 404, "code": "not_found"},
    ]
    for each in requests:
        assert logged("request refused", **each), each
    first, repeats = logged("request refused", route="/me", status=401, code="token_expired")
    assert ("repeats" in first, repeats["repeats"]) == (False, 4)
    assert {line["requestId"] for line in logged("request refused", status=403)} == {"trace-1.2_3"}
    assert logged("request answered", route="/generations/{generation_id}/events", status=200, level="debug")
    assert any("OpenAI" in line["message"] and "quotes the prompt" in line["message"] for line in lines)
    assert any(line["message"].startswith("webhook ") for line in lines)
    assert [line["message"] for line in lines if line["message"].startswith("shutdown")] == [
        "shutdown: starts are refused, and running work is finished",
        "shutdown: 0 generations are left",
        "shutdown: sockets and streams are closed",
        "shutdown: the stores are closed",
    ]


async def test_text_lines_have_the_same_fields_and_the_default_is_info(tmp_path: Path) -> None:
    async with serving(tmp_path, "--log-level", "info") as service, patient() as http:
        user = {b"X-User-Id": "mal lory\u00e9=1".encode()}
        await http.get(f"{service.url}/generations/none", headers=user)
        await http.get(f"{service.url}/me", headers=user)
        service.process.terminate()
        _, errors = await service.ended()
    assert load_settings({}).log_level == "info"
    [line] = [line for line in errors.splitlines() if "/generations/" in line]
    beginning = "INFO api.rest.request_log: request refused method=GET route=/generations/{generation_id} status=404"
    assert beginning in line
    assert re.search(r' code=not_found user="mal lory\\u00e9=1" requestId=[0-9a-f]{16}$', line), line
    assert "/me" not in errors


async def test_every_response_has_a_request_id_which_is_in_no_body(tmp_path: Path) -> None:
    async with running(tmp_path, jwt_secret=SECRET) as service:
        service.http.headers["Authorization"] = f"Bearer {SERVICE}"
        paths = ["/me", "/", "/static/app.js", "/docs", "/nowhere", "/health/live", "/socket.io/?EIO=4", "/images/x"]
        seen = set()
        for path in paths:
            answer = await service.http.get(path)
            [own] = answer.headers.get_list("x-request-id")
            assert ID.fullmatch(own)
            assert own not in answer.text
            seen.add(own)
        assert len(seen) == len(paths)
        for given in ("a", "A-b_c.9", "x" * 64):
            answer = await service.http.get("/me", headers={"X-Request-Id": given})
            assert answer.headers["x-request-id"] == given
        for given in ("", "x" * 65, "a b", "a/b", "\xe9"):
            answer = await service.http.get("/me", headers={b"X-Request-Id": given.encode("latin-1")})
            assert answer.headers["x-request-id"] != given
        twice = [("X-Request-Id", "one"), ("X-Request-Id", "two")]
        assert (await service.http.get("/me", headers=twice)).headers["x-request-id"] not in ("one", "two", "one, two")
        preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
        assert "x-request-id" in (await service.http.options("/me", headers=preflight)).headers


async def test_responses_without_the_application_and_websockets_have_a_request_id(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        websocket = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
        path = b"/socket.io/?EIO=4&transport=websocket"
        for request in (
            b"nonsense\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
            b"GET /me HTTP/1.1\r\nHost: localhost\r\n" + websocket + b"bad\r\n\r\n",
            b"GET "
            + path
            + b"&sid=x HTTP/1.1\r\nHost: localhost\r\n"
            + websocket
            + b"dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        ):
            head = await exchange(service, request)
            assert len(re.findall(rb"\r\nx-request-id: [A-Za-z0-9._-]{1,64}\r\n", head, re.IGNORECASE)) == 1, head
        address = f"ws://127.0.0.1:{service.port}{path.decode()}"
        async with websockets.connect(address, additional_headers={"X-Request-Id": "mine"}, **RAW_OPTIONS) as opened:
            assert opened.response is not None
            assert opened.response.headers.get_all("x-request-id") == ["mine"]


async def test_a_refused_websocket_is_logged_and_counted_as_a_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "api.rest.request_log")
    async with running(tmp_path) as service:
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(
                f"ws://127.0.0.1:{service.port}/nowhere", additional_headers={"X-Request-Id": "mine"}, **RAW_OPTIONS
            )
        response = refused.value.response
        assert (response.status_code, response.headers.get_all("x-request-id")) == (404, ["mine"])
        assert json.loads(response.body)["code"] == "not_found"
        assert (await service.http.get("/socket.io/?EIO=3&transport=polling")).status_code == 400
        assert service.service.refused == {"not_found": 1, "bad_request": 1}
    assert [vars(record)["fields"] for record in caplog.records] == [
        {"method": "GET", "route": "unknown", "status": 404, "code": "not_found"},
        {"method": "GET", "route": "/socket.io", "status": 400, "code": "bad_request"},
    ]


async def test_readiness_that_answers_no_is_no_refused_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "api.rest.request_log")
    async with running(tmp_path) as service:
        service.service.workflow.drain()
        assert (await service.http.get("/health/ready")).json()["code"] == "draining"
        assert service.service.refused == {}
        assert (await service.http.post("/health/ready")).status_code == 405
        assert service.service.refused == {"method_not_allowed": 1}
    [line] = caplog.records
    assert vars(line)["fields"]["status"] == 405


@pytest.mark.parametrize(
    ("name", "value"),
    [("log_level", "loud"), ("log_format", "xml"), ("metrics_address", "9090"), ("metrics_address", "localhost:70000")],
)
def test_wrong_settings_of_logs_and_metrics_are_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"STAGECAST_{name.upper()} must be"):
        load_settings({name: value})


def test_the_metrics_need_a_port_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "3000", "--metrics-address", "0.0.0.0:3000"]) == 2
    assert capsys.readouterr().err == "stagecast: STAGECAST_METRICS_ADDRESS must have another port.\n"
