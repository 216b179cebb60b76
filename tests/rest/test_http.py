"""HTTP: what every request of the contract answers in open mode."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from api.rest.forms import MAX_BODY, MAX_FILE, MAX_METADATA
from domain.errors import LogUnavailable
from domain.identity import InvalidUserId, user_id
from domain.ports.images import Content, Picture
from domain.stages import FLOWS
from support.http_app import BROKEN, HUGE, PNG, Api, FakeIntake, assert_problem, serve_api

pytestmark = pytest.mark.asyncio(loop_scope="module")

MISSING = "edit_1763829000123_k3v9x2ab4c6d8e0f"


# --- starting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["edit", "generate"])
async def test_a_start_is_accepted_with_its_location_and_the_generation(api_app: Api, kind: str) -> None:
    fields = {"metadata": '{"album": 7, "none": null}', "quality": "low", "aspectRatio": "1:1", "inputFidelity": "high"}
    answer = await api_app.start(kind, files=5, fields=fields)
    assert answer.status_code == 202
    generation = answer.json()
    assert answer.headers["location"] == f"/generations/{generation['generationId']}"
    assert (generation["kind"], generation["status"], generation["userId"]) == (kind, "started", "demo")
    assert generation["metadata"] == {"album": 7, "none": None}
    assert "expiresAt" not in generation
    assert (await api_app.client.get(answer.headers["location"])).content == answer.content


async def test_a_start_survives_the_disconnect_of_its_caller(api_app: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, gate = asyncio.Event(), asyncio.Event()

    class SlowIntake(FakeIntake):
        async def admit(self, content: Content) -> Picture:
            reading.set()
            await gate.wait()
            return await super().admit(content)

    monkeypatch.setattr(api_app.workflow, "intake", SlowIntake())
    form = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--B\r\n'
    form += b'Content-Disposition: form-data; name="images"\r\n\r\n' + PNG + b"\r\n--B--\r\n"
    head = b"POST /generations/edit HTTP/1.1\r\nHost: localhost\r\nX-User-Id: gone\r\nContent-Length: %d\r\n" % len(
        form
    )
    _, writer = await asyncio.open_connection("127.0.0.1", api_app.port)
    writer.write(head + b"Content-Type: multipart/form-data; boundary=B\r\n\r\n" + form)
    async with asyncio.timeout(20):
        await reading.wait()
        writer.transport.abort()
        await asyncio.sleep(0.05)  # The server sees the disconnect meanwhile.
        gate.set()
        while not await api_app.log.generations("gone", limit=1):
            await asyncio.sleep(0.005)
        await api_app.workflow.started("gone")
    [started] = await api_app.log.generations("gone", limit=1)
    assert (await api_app.client.get(f"/generations/{started.generation_id}", headers={"X-User-Id": "gone"})).is_success


@pytest.mark.parametrize(
    ("field", "kind", "rest"),
    [
        ("prompt", "edit", {"fields": {"prompt": ""}}),
        ("prompt", "edit", {"fields": {"prompt": "x" * 4001}}),
        ("prompt", "edit", {"fields": {"prompt": ["a", "b"]}}),
        ("images", "edit", {"files": 0}),
        ("images", "edit", {"files": 6}),
        ("images.1", "edit", {"fields": {"images": "not a file"}}),
        ("surprise", "edit", {"fields": {"surprise": "1"}}),
        ("faceSwap", "generate", {"fields": {"faceSwap": "false"}}),
        ("faceSwap", "edit", {"fields": {"faceSwap": "true"}}),
        ("faceSwap", "edit", {"fields": {"faceSwap": "yes"}}),
        ("quality", "edit", {"fields": {"quality": "best"}}),
        ("background", "edit", {"fields": {"background": "red"}}),
        ("aspectRatio", "edit", {"fields": {"aspectRatio": "16:9"}}),
        ("inputFidelity", "edit", {"fields": {"inputFidelity": "auto"}}),
        ("metadata", "edit", {"fields": {"metadata": "{"}}),
        ("metadata", "edit", {"fields": {"metadata": "[1]"}}),
        ("metadata", "edit", {"fields": {"metadata": "null"}}),
        ("metadata", "edit", {"fields": {"metadata": '{"a": 1e999}'}}),
        ("metadata", "edit", {"fields": {"metadata": '{"a": "\\ud800"}'}}),
        ("metadata", "edit", {"fields": {"metadata": '{"a": ' + "[" * 40 + "]" * 40 + "}"}}),
        ("imageUrls.0", "edit", {"fields": {"imageUrls": ["ftp://example.com/a.png"]}}),
        ("imageUrls.0", "edit", {"fields": {"imageUrls": '["http://example.com/' + "x" * 2048 + '"]'}}),
        ("imageUrls.0", "edit", {"fields": {"imageUrls": "[7]"}}),
        ("imageUrls", "edit", {"fields": {"imageUrls": "[broken"}}),
        ("images", "edit", {"fields": {"imageUrls": ["http://example.com/a.png"] * 5}}),
        ("Idempotency-Key", "edit", {"headers": {"Idempotency-Key": ""}}),
        ("Idempotency-Key", "edit", {"headers": {"Idempotency-Key": "x" * 201}}),
        ("Idempotency-Key", "edit", {"headers": {"Idempotency-Key": "a\tb"}}),
    ],
)
async def test_an_invalid_field_is_rejected_by_name(
    shared_api: Api, field: str, kind: str, rest: dict[str, Any]
) -> None:
    problem = assert_problem(await shared_api.start(kind, **rest), 422, "invalid_request")
    assert [error["field"] for error in problem["errors"]] == [field]
    assert problem["detail"].startswith(f"{field}: ")
    assert (await shared_api.client.get("/me")).json()["credit"] == 100


async def test_an_empty_prompt_is_reported_as_a_text_field(shared_api: Api) -> None:
    problem = (await shared_api.start(fields={"prompt": ""})).json()
    assert problem["detail"] == "prompt: String should have at least 1 character"


async def test_invalid_input_is_not_echoed(shared_api: Api) -> None:
    answer = await shared_api.start(fields={"quality": "hunter2", "metadata": "hunter2", "imageUrls": "hunter2"})
    assert_problem(answer, 422, "invalid_request")
    assert "hunter2" not in answer.text


async def test_metadata_is_measured_as_compact_json_in_utf_8(api_app: Api) -> None:
    most = {"é": "é" * ((MAX_METADATA - len('{"é":""}'.encode())) // 2)}
    assert len(json.dumps(most, ensure_ascii=False, separators=(",", ":")).encode()) in (MAX_METADATA - 1, MAX_METADATA)
    assert (await api_app.start(fields={"metadata": json.dumps(most, indent=8)})).status_code == 202
    more = {"é": most["é"] + "é"}
    assert_problem(await api_app.start(fields={"metadata": json.dumps(more)}), 422, "invalid_request")


async def test_image_urls_ask_for_a_face_swap_unless_told_otherwise(api_app: Api) -> None:
    for urls, face_swap, wanted in (
        (["https://example.com/a.png"], None, True),
        ('["https://example.com/a.png"]', "false", False),
        ('["https://example.com/a.png"]', "true", True),
    ):
        fields = {"imageUrls": urls} | ({} if face_swap is None else {"faceSwap": face_swap})
        history = await api_app.log.generation(await api_app.started(files=0, fields=fields))
        assert history is not None
        request = json.loads(history.request)
        assert request["image_urls"] == ["https://example.com/a.png"]
        assert request["face_swap"] is wanted


@pytest.mark.parametrize(
    ("picture", "status", "code"),
    [(b"GIF89a", 415, "unsupported_image_type"), (BROKEN, 422, "invalid_image"), (HUGE, 422, "image_too_large")],
)
async def test_a_rejected_image_is_named_and_nothing_is_stored(
    shared_api: Api, picture: bytes, status: int, code: str
) -> None:
    problem = assert_problem(await shared_api.start(pictures=[PNG, picture]), status, code)
    assert problem["errors"][0]["field"] == "images.1"
    assert shared_api.images.kept == {}


async def test_a_file_may_have_10_mb(api_app: Api) -> None:
    most = PNG.ljust(MAX_FILE, b"x")
    assert (await api_app.start(pictures=[most])).status_code == 202
    assert_problem(await api_app.start(pictures=[most + b"x"]), 413, "content_too_large")


async def test_a_body_that_declares_too_much_is_refused_before_it_is_sent(shared_api: Api) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", shared_api.port)
    head = "POST /generations/edit HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=B\r\n"
    writer.write(f"{head}Content-Length: {MAX_BODY + 1}\r\n\r\n".encode())
    assert b" 413 " in await asyncio.wait_for(reader.readline(), 30)
    assert b"application/problem+json" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    writer.close()
    await writer.wait_closed()


async def test_a_body_that_declares_nothing_is_refused_once_it_is_too_large(shared_api: Api) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        for _ in range(MAX_BODY // 65536 + 2):
            yield bytes(65536)

    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    answer = await shared_api.client.post("/generations/edit", content=endless(), headers=headers)
    assert_problem(answer, 413, "content_too_large")


@pytest.mark.parametrize(
    "content_type", ["application/json", "text/plain", "multipart/form-data; boundary=B; charset=unicode_escape", ""]
)
async def test_only_a_multipart_form_in_utf_8_is_read(shared_api: Api, content_type: str) -> None:
    answer = await shared_api.client.post("/generations/edit", content=b"{}", headers={"Content-Type": content_type})
    assert_problem(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=B"])
async def test_a_malformed_form_is_refused(shared_api: Api, content_type: str) -> None:
    answer = await shared_api.client.post(
        "/generations/edit", content=b"nonsense", headers={"Content-Type": content_type}
    )
    assert_problem(answer, 400, "bad_request")


async def test_a_file_input_in_which_nothing_was_chosen_counts_as_absent(api_app: Api) -> None:
    disposition = b"--B\r\nContent-Disposition: form-data; name="
    body = b"".join(
        (
            disposition + b'"prompt"\r\n\r\nhi\r\n',
            disposition + b'"images"; filename="a.png"\r\n\r\n' + PNG + b"\r\n",
            disposition + b'"images"; filename=""\r\n\r\n\r\n--B--\r\n',
        )
    )
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    assert (await api_app.client.post("/generations/edit", content=body, headers=headers)).status_code == 202


# --- limits ------------------------------------------------------------------------------------------------


async def test_of_two_starts_with_credit_for_one_exactly_one_is_accepted() -> None:
    async with serve_api(credits=1) as api:
        answers = await asyncio.gather(api.start(), api.start())
        accepted, refused = sorted(answers, key=lambda answer: answer.status_code)
        assert accepted.status_code == 202
        assert_problem(refused, 402, "insufficient_credit")
        assert (await api.client.get("/me")).json() == {"userId": "demo", "credit": 0}
        assert len(api.images.kept) == 1


async def test_without_balances_there_is_no_credit_and_no_402() -> None:
    async with serve_api(credits=None) as api:
        assert (await api.start()).status_code == 202
        assert (await api.client.get("/me")).json() == {"userId": "demo"}


async def test_too_many_unfinished_generations_are_refused_per_user() -> None:
    async with serve_api(max_per_user=1) as api:
        await api.started()
        assert_problem(await api.start(), 429, "too_many_generations")
        await api.started(headers={"X-User-Id": "bob"})


async def test_a_full_queue_refuses() -> None:
    async with serve_api(max_waiting=1) as api:
        await api.started()
        assert_problem(await api.start(), 503, "queue_full")


async def test_a_draining_service_refuses_starts_and_is_not_ready(api_app: Api) -> None:
    assert (await api_app.client.get("/health/ready")).json() == {"status": "ready", "parts": {"log": "ok"}}
    api_app.workflow.draining = True
    assert_problem(await api_app.start(), 503, "draining")
    assert_problem(await api_app.client.get("/health/ready"), 503, "draining")
    assert (await api_app.client.get("/health/live")).status_code == 200
    assert (await api_app.client.get("/me")).status_code == 200


async def test_an_unavailable_log_is_answered_with_503(api_app: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silence(*_: object, **__: object) -> None:
        raise LogUnavailable

    for name in ("append", "summary", "generations"):
        monkeypatch.setattr(api_app.log, name, silence)
    assert_problem(await api_app.start(), 503, "log_unavailable")
    assert_problem(await api_app.client.get("/generations"), 503, "log_unavailable")
    assert_problem(await api_app.client.get(f"/generations/{MISSING}"), 503, "log_unavailable")


async def test_a_full_disk_is_answered_with_503(api_app: Api) -> None:
    api_app.images.full = True
    assert_problem(await api_app.start(), 503, "storage_failed")


# --- idempotency -------------------------------------------------------------------------------------------


async def test_the_same_request_with_the_same_key_is_the_same_generation(api_app: Api) -> None:
    key = {"Idempotency-Key": "one"}
    first = await api_app.start(headers=key)
    await api_app.fail(first.json()["generationId"])
    second = await api_app.start(headers=key)
    assert second.status_code == 202
    assert second.headers["location"] == first.headers["location"]
    assert second.json()["status"] == "failed"


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        ("generate", {}),
        ("edit", {"fields": {"prompt": "another"}}),
        ("edit", {"fields": {"quality": "high"}}),
        ("edit", {"pictures": [PNG + b"another"]}),
    ],
)
async def test_another_request_with_the_same_key_is_refused(api_app: Api, kind: str, rest: dict[str, Any]) -> None:
    key = {"Idempotency-Key": "one"}
    await api_app.started(headers=key)
    assert_problem(await api_app.start(kind, headers=key, **rest), 422, "idempotency_mismatch")
    await api_app.started(kind=kind, headers={**key, "X-User-Id": "bob"}, **rest)


async def test_twenty_starts_at_once_with_one_key_are_one_generation_and_one_credit(api_app: Api) -> None:
    answers = await asyncio.gather(*(api_app.start(headers={"Idempotency-Key": "k"}) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert (await api_app.client.get("/me")).json()["credit"] == 99
    assert len((await api_app.client.get("/generations")).json()["generations"]) == 1
    assert len(api_app.images.kept) == 1


# --- looking -----------------------------------------------------------------------------------------------


async def test_another_users_generation_is_answered_byte_for_byte_like_a_missing_one(api_app: Api) -> None:
    foreign = await api_app.started(headers={"X-User-Id": "bob"})
    for method, tail in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):
        answers = [
            await api_app.client.request(method, f"/generations/{generation_id}{tail}")
            for generation_id in (foreign, MISSING, "nonsense", "%00", "%ff", "edit_1_%C3%A9")
        ]
        for answer in answers:
            assert_problem(answer, 404, "not_found")
            assert answer.content == answers[0].content
            changing = {"date": "", "x-request-id": ""}
            assert {**answer.headers, **changing} == {**answers[0].headers, **changing}
    assert (await api_app.client.get(f"/generations/{foreign}", headers={"X-User-Id": "bob"})).status_code == 200


async def test_events_are_the_bytes_of_the_log_in_order(api_app: Api) -> None:
    generation_id = await api_app.started()
    await api_app.fail(generation_id)
    answer = await api_app.client.get(f"/generations/{generation_id}/events")
    history = await api_app.log.generation(generation_id)
    assert history is not None
    assert all(entry.event is not None and entry.event in answer.content for entry in history.events)
    page = answer.json()
    assert (page["generationId"], page["status"]) == (generation_id, "failed")
    assert [event["event"] for event in page["events"]] == ["generation_started", "generation_failed"]
    assert page["events"][1]["data"]["credit"] == 100
    after = (await api_app.client.get(f"/generations/{generation_id}/events", params={"after": 1})).json()
    assert after["events"] == page["events"][1:]
    none = (await api_app.client.get(f"/generations/{generation_id}/events", params={"after": 2})).json()
    assert (none["status"], none["events"]) == ("failed", [])


async def test_pages_follow_one_another_newest_first(api_app: Api) -> None:
    ids = [await api_app.started() for _ in range(5)]
    await api_app.fail(ids[0])
    seen: list[str] = []
    params = {"limit": "2"}
    while True:
        page = (await api_app.client.get("/generations", params=params)).json()
        seen += [generation["generationId"] for generation in page["generations"]]
        if "next" not in page:
            break
        assert isinstance(page["next"], str)
        params["before"] = page["next"]
    assert seen == ids[::-1]
    for status, wanted in (("active", ids[:0:-1]), ("finished", ids[:1])):
        found = (await api_app.client.get("/generations", params={"status": status})).json()["generations"]
        assert [generation["generationId"] for generation in found] == wanted
    assert (await api_app.client.get("/generations", headers={"X-User-Id": "new"})).json() == {"generations": []}


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "before=0", "before=%00", "status=all", "before=1e9"]
)
async def test_an_invalid_query_parameter_is_rejected_by_name(shared_api: Api, query: str) -> None:
    problem = assert_problem(await shared_api.client.get(f"/generations?{query}"), 422, "invalid_request")
    assert problem["errors"][0]["field"] == query.partition("=")[0]


# --- ending ------------------------------------------------------------------------------------------------


async def test_a_cancel_ends_a_generation_once_and_refunds_the_credit(api_app: Api) -> None:
    generation_id = await api_app.started()
    for outcome in ("cancelled", "already_finished"):
        answer = await api_app.client.post(f"/generations/{generation_id}/cancel")
        assert (answer.status_code, answer.json()) == (200, {"outcome": outcome})
    generation = (await api_app.client.get(f"/generations/{generation_id}")).json()
    assert (generation["code"], generation["failedStage"]) == ("cancelled", "started")
    assert generation["expiresAt"] > generation["updatedAt"]
    assert (await api_app.client.get("/me")).json()["credit"] == 100


async def test_a_running_generation_cannot_be_deleted_and_an_ended_one_leaves_nothing(api_app: Api) -> None:
    generation_id = await api_app.started()
    (name,) = api_app.images.kept
    assert_problem(await api_app.client.delete(f"/generations/{generation_id}"), 409, "not_finished")
    await api_app.fail(generation_id)
    deleted = await api_app.client.delete(f"/generations/{generation_id}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    for path in (f"/generations/{generation_id}", f"/generations/{generation_id}/events", f"/images/{name}"):
        assert_problem(await api_app.client.get(path), 404, "not_found")


# --- the rest ----------------------------------------------------------------------------------------------


async def test_an_image_is_served_with_its_own_type_only(api_app: Api) -> None:
    await api_app.started()
    (name,) = api_app.images.kept
    answer = await api_app.client.get(f"/images/{name}")
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, PNG, "image/png")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"].startswith("private")
    assert answer.headers["content-disposition"] == "inline"
    for other in ("nothing.png", "..%2f..%2fetc%2fpasswd", "%00", "%ff", ".", f"{MISSING}-00.png"):
        assert_problem(await api_app.client.get(f"/images/{other}"), 404, "not_found")


async def test_the_stages_are_those_of_the_table(shared_api: Api) -> None:
    stages = (await shared_api.client.get("/stages")).json()
    assert {kind: [stage["status"] for stage in flow] for kind, flow in stages.items()} == {
        kind: list(flow) for kind, flow in FLOWS.items()
    }
    swap = next(stage for stage in stages["edit"] if stage["status"] == "face_swap")
    assert swap["next"] == ["face_swap_completed", "completed", "failed"]
    assert swap["repeats"] is True
    assert swap["conditions"]["completed"] == "the face swap failed, the edit is kept"
    assert swap["messages"] == {"completed": "Image editing completed, but the face swap failed."}
    failed = stages["generate"][-1]
    assert "progress" not in failed
    assert (failed["event"], failed["next"], failed["terminal"]) == ("generation_failed", [], True)


async def test_an_unknown_address_and_a_wrong_method_are_problems(shared_api: Api) -> None:
    assert_problem(await shared_api.client.get("/nowhere"), 404, "not_found")
    for path, allowed in (
        (f"/generations/{MISSING}", {"GET", "HEAD", "DELETE"}),
        ("/me", {"GET", "HEAD"}),
        ("/generations/edit", {"POST"}),
    ):
        answer = await shared_api.client.put(path)
        assert_problem(answer, 405, "method_not_allowed")
        assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("value", ["ada", "x" * 128, "Zoë 😀", "0"])
async def test_a_user_id_is_kept_as_text(value: str) -> None:
    assert user_id(value) == value


async def test_an_integer_and_its_text_are_one_user() -> None:
    assert user_id(123) == user_id("123")


@pytest.mark.parametrize("value", ["", "x" * 129, "a\nb", "\x00", "\x85", "\ud800", True, 1.0, None, [], 10**200])
async def test_an_invalid_user_id_is_rejected(value: object) -> None:
    with pytest.raises(InvalidUserId):
        user_id(value)


async def test_an_integer_of_too_many_digits_is_not_a_user_id() -> None:
    with pytest.raises(InvalidUserId):
        user_id(1 << 99_999)


async def test_the_header_names_the_user_in_utf_8(shared_api: Api) -> None:
    for sent, known in (("Zoë".encode(), "Zoë"), (b"Zo\xeb", "Zoë"), (b"123", "123")):
        answer = await shared_api.client.get("/me", headers=[(b"X-User-Id", sent)])
        assert answer.json()["userId"] == known
    for wrong in (b"", b"x" * 129):
        answer = await shared_api.client.get("/me", headers=[(b"X-User-Id", wrong)])
        assert_problem(answer, 422, "invalid_user_id")


# --- the description ---------------------------------------------------------------------------------------


async def test_the_openapi_description_is_complete(shared_api: Api) -> None:
    document = (await shared_api.client.get("/openapi.json")).json()
    assert (await shared_api.client.get("/docs")).status_code == 200
    operations = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert operations == {
        ("/generations/edit", "post"),
        ("/generations/generate", "post"),
        ("/generations", "get"),
        ("/generations/{generation_id}", "get"),
        ("/generations/{generation_id}", "delete"),
        ("/generations/{generation_id}/events", "get"),
        ("/generations/{generation_id}/cancel", "post"),
        ("/me", "get"),
        ("/users/{user_id}/credit", "post"),
        ("/users/{user_id}", "delete"),
        ("/stages", "get"),
        ("/images/{name}", "get"),
        ("/version", "get"),
        ("/health/live", "get"),
        ("/health/ready", "get"),
    }
    for reference in references(document):
        target: Any = document
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]
    assert "HTTPValidationError" not in json.dumps(document)


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


async def test_answers_are_as_the_description_says(api_app: Api) -> None:
    document = (await api_app.client.get("/openapi.json")).json()
    generation_id = await api_app.started()
    one = "/generations/{generation_id}"
    for method, template, rest in (
        ("post", "/generations/edit", {"content": b""}),
        ("get", "/generations", {}),
        ("get", "/generations", {"params": {"limit": 0}}),
        ("get", one, {}),
        ("get", f"{one}/events", {}),
        ("delete", one, {}),
        ("post", f"{one}/cancel", {}),
        ("get", "/me", {}),
        ("get", "/me", {"headers": {"X-User-Id": ""}}),
        ("get", "/stages", {}),
        ("get", "/health/ready", {}),
        ("put", "/me", {}),
    ):
        path = template.replace("{generation_id}", generation_id)
        answer = await api_app.client.request(method.upper(), path, **rest)
        responses = document["paths"][template].get(method, document["paths"][template].get("get"))["responses"]
        described = responses.get(str(answer.status_code), responses.get("default"))
        schema = described["content"][answer.headers["content-type"]]["schema"]
        model = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        content = answer.json()
        assert set(model.get("required", ())) <= set(content), path
        if "properties" in model:
            assert set(content) <= set(model["properties"]), path
