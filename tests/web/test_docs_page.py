"""``/docs`` and ``/asyncapi.json``: nothing comes from elsewhere, and the events are described as they are sent."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any, Final

import jsonschema_rs
import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from support.asyncapi import check_message
from support.browser import needs_chromium
from support.harness import JSON, PHOTO, Running, running
from support.node import ROOT

pytestmark = pytest.mark.asyncio(loop_scope="session")

_VIEWER: Final = ROOT / "src/api/web/static/vendor/swagger-ui-bundle.js"
_SPECIFICATION: Final = ROOT / "node_modules/@asyncapi/specs/schemas/3.0.0.json"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("images")) as service:
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def document(service: Running) -> JSON:
    return await service.get("/asyncapi.json")


@pytest.mark.skipif(not _VIEWER.is_file(), reason="needs Swagger UI: install npm, then `make test`")
@needs_chromium
async def test_the_viewer_makes_no_foreign_request_and_keeps_to_its_policy(service: Running, browser: Browser) -> None:
    page = await browser.new_page()
    errors, urls = list[str](), list[str]()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    response = await page.goto(f"{service.url}/docs")
    assert response is not None
    assert "default-src 'none'" in (await response.all_headers())["content-security-policy"]
    await page.click(".opblock-summary-path >> text=/version")
    await page.click("text=Try it out")
    await page.click("text=Execute")
    await expect(page.locator(".live-responses-table td.response-col_status").last).to_have_text(re.compile("200"))
    edit = page.locator(".opblock-post").first
    await edit.locator(".opblock-summary-control").click()
    await edit.locator("text=Try it out").click()
    await edit.locator("input[type=file]").set_input_files({"name": "a.jpg", "mimeType": "image/jpeg", "buffer": PHOTO})
    await edit.locator("text=Execute").click()
    await expect(edit.locator(".live-responses-table td.response-col_status").last).to_have_text(re.compile("202"))
    await page.close()
    viewer = [url for url in urls if "/vendor/" in url]
    assert viewer
    for url in viewer:
        headers = (await service.get_response(url.removeprefix(service.url), "ada")).headers
        assert "immutable" in headers["cache-control"]
        assert "content-encoding" in headers
    assert errors == []
    assert [url for url in urls if not url.startswith((f"{service.url}/", "data:"))] == []


@needs_chromium
async def test_without_the_viewer_the_page_is_a_plain_list_of_all_operations(
    service: Running, browser: Browser
) -> None:
    paths = (await service.get("/openapi.json"))["paths"]
    page = await browser.new_page()
    await page.route("**/vendor/*", lambda route: route.abort("failed"))
    await page.goto(f"{service.url}/docs")
    operations = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    await expect(page.locator("li code")).to_have_text(operations)
    assert all(re.fullmatch(r"[A-Z]+ /\S* \S.*", text) for text in await page.locator("li").all_text_contents())
    await page.close()


@pytest.mark.skipif(not _SPECIFICATION.is_file(), reason="needs AsyncAPI's schema: install npm, then `make test`")
async def test_the_description_is_asyncapi_3(document: JSON) -> None:
    errors = jsonschema_rs.validator_for(json.loads(_SPECIFICATION.read_text())).iter_errors(document)
    assert [error.message for error in errors] == []


async def test_every_reference_in_the_description_resolves(document: JSON) -> None:
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        place = document
        for key in reference.split("/"):
            place = place[key]


def never_null(schema: Any) -> Any:
    """The schema without the alternative null, which OpenAPI has for every value that may be absent."""
    if isinstance(schema, list):
        return [never_null(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    alternatives = schema.get("anyOf", [])
    if {"type": "null"} in alternatives:
        [other] = [each for each in alternatives if each != {"type": "null"}]
        schema = {**other, **{key: value for key, value in schema.items() if key != "anyOf"}}
    return {key: never_null(value) for key, value in schema.items()}


async def test_the_models_are_those_of_openapi(service: Running, document: JSON) -> None:
    openapi = (await service.get("/openapi.json"))["components"]["schemas"]
    schemas = document["components"]["schemas"]
    for name in ("Snapshot", "Input", "FaceSwapError"):
        assert schemas[name] == never_null(openapi[name])
    event = schemas["SocketEvent"]
    assert set(event["properties"]) - set(openapi["Event"]["properties"]) == {"cursor"}
    for name, field in openapi["Event"]["properties"].items():
        assert event["properties"][name] == never_null(field)
    assert event["required"] == openapi["Event"]["required"]


async def test_a_message_with_another_status_or_another_key_is_not_as_described(service: Running) -> None:
    generation_id = await service.start()
    await service.service.leases.drain()
    first, *_, last = await service.events(generation_id)
    check_message("generation_started", first)
    check_message("generation_completed", last)
    for name, data in [
        ("continue", first),
        ("generation_started", last),
        ("generation_failed", {**last, "status": "failed"}),
        ("continue", {**first, "status": "composition", "percentage": 3}),
        ("generation_completed", {**last, "error": None}),
        ("queue_position", {"generationId": generation_id, "queuePosition": 0}),
    ]:
        with pytest.raises(AssertionError, match="not as described"):
            check_message(name, data)


async def test_every_event_of_the_stages_is_described(service: Running, document: JSON) -> None:
    events = {stage["event"] for stages in (await service.get("/stages")).values() for stage in stages}
    for channel in ("socket", "feed", "generation"):
        assert events <= set(document["channels"][channel]["messages"])
