"""The description against the running service, by Schemathesis: whatever it allows, and much that it does not, is sent.

No answer is a fault, and every answer has a status, a content type, headers and a body as described.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import jsonschema_rs
import pytest
import pytest_asyncio
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from schemathesis.specs.openapi.schemas import OpenApiSchema

from domain.rehydrate import request_of
from support.builders import PROPERTY
from support.harness import JSON, PHOTO, Running, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHECKS: Final[list[Any]] = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
OPERATIONS: Final = (
    "POST /generations/edit",
    "POST /generations/generate",
    "GET /generations",
    "GET /generations/{generation_id}",
    "DELETE /generations/{generation_id}",
    "GET /generations/{generation_id}/events",
    "POST /generations/{generation_id}/cancel",
    "POST /generations/{generation_id}/transitions",
    "GET /events",
    "GET /me",
    "POST /users/{user_id}/credit",
    "DELETE /users/{user_id}",
    "GET /stages",
    "GET /images/{name}",
    "GET /version",
    "GET /metrics",
    "GET /health/live",
    "GET /health/ready",
    "GET /metrics",
    "GET /admin/overview",
    "GET /admin/generations",
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    images: Path = tmp_path_factory.mktemp("images")
    async with running(images, credits=1_000, max_per_user=500) as service:
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def description(service: Running) -> JSON:
    return await service.get("/openapi.json")


@pytest.fixture(scope="module")
def schema(description: JSON) -> OpenApiSchema:
    return schemathesis.openapi.from_dict(description)


async def test_every_operation_is_tested(schema: OpenApiSchema) -> None:
    assert {f"{method.upper()} {path}" for path in schema for method in schema[path]} == set(OPERATIONS)


async def test_the_version_is_that_of_the_package(service: Running, description: JSON) -> None:
    version = metadata.version("stagecast")
    assert await service.get("/version") == {"version": version}
    assert description["info"]["version"] == version


def make_it_count(case: schemathesis.Case[Any], known: dict[str, str]) -> None:
    """Let the request be about something that is there, and by its owner."""
    case.headers.pop("x-user-id", None)
    case.path_parameters |= {name: value for name, value in known.items() if name in case.path_parameters}
    if isinstance(case.body, dict) and "images" in case.body:
        photos: list[Any] = [PHOTO]
        case.body["images"] = photos


@pytest.mark.parametrize("examples", [30, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("label", OPERATIONS)
async def test_answers_are_as_described_whatever_is_sent(
    service: Running, schema: OpenApiSchema, label: str, examples: int
) -> None:
    operation = schema.find_operation_by_label(label)
    assert operation is not None
    described = {int(status) for status in operation.definition.raw["responses"] if status != "default"}
    await service.service.leases.drain()  # Else those before it may be as many as a user may have.
    generation_id = await service.start("demo")
    await service.service.leases.drain()
    url = (await service.events(generation_id, "demo"))[-1]["compositionUrl"]
    there = {"generation_id": generation_id, "name": url.rpartition("/")[2]}
    if label.endswith("/transitions"):
        answer = await service.http.post("/generations/edit?runner=external", files=[("prompt", (None, "x"))])
        there["generation_id"] = answer.json()["generationId"]
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in GenerationMode])

    answered = set[int]()

    @settings(PROPERTY, max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(case=cases, known=st.booleans(), next_stage=st.booleans())
    def campaign(case: schemathesis.Case[Any], known: bool, next_stage: bool) -> None:
        if known:
            make_it_count(case, there)
        if next_stage and label.endswith("/transitions"):
            case.body = {"status": "composition"}
        response = case.call(base_url=service.url, timeout=60)
        assert response.status_code < 500, response.text
        # An address that was changed may be none, or another operation's.
        assert response.status_code in described | {404, 405}, response.text
        case.validate_response(response, checks=CHECKS)
        answered.add(response.status_code)

    await asyncio.to_thread(campaign)
    assert min(answered) < 300, "nothing that was sent was right"


async def test_a_client_generated_from_the_description_is_understood(service: Running, description: JSON) -> None:
    """Writes the form as the description's encoding says; the generators that were tried do the same."""
    operation = description["paths"]["/generations/edit"]["post"]
    content = operation["requestBody"]["content"]["multipart/form-data"]
    urls = ["http://127.0.0.1:1/a.png", "http://127.0.0.1:1/b.png"]
    metadata = {"a": [1, "ü"]}
    values = {"prompt": "a hat", "imageUrls": urls, "images": [PHOTO, PHOTO], "metadata": metadata, "faceSwap": False}
    parts: list[tuple[str, Any]] = []
    for name, value in values.items():
        kind = content["schema"]["properties"][name]["type"]
        encoding = content["encoding"].get(name, {})
        if kind == "object":
            parts.append((name, ("blob", json.dumps(value), encoding["contentType"])))
        elif kind == "array" and isinstance(value, list) and isinstance(value[0], bytes):
            parts += [(name, (None, each, "application/octet-stream")) for each in value]
        elif kind == "array" and isinstance(value, list):
            assert (encoding["style"], encoding["explode"]) == ("form", True)
            parts += [(name, (None, each)) for each in value]
        else:
            parts.append((name, (None, str(value), "text/plain")))
    answer = await service.http.post("/generations/edit?runner=external", files=parts)
    assert answer.status_code == 202, answer.text
    assert answer.json()["metadata"] == metadata
    history = await service.service.log.generation(answer.json()["generationId"])
    assert history is not None
    order = request_of(history)
    assert (order.image_urls, len(order.images), order.face_swap) == (tuple(urls), 2, False)


async def test_the_description_has_names_and_types_for_generators(description: JSON) -> None:
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }
    names = [operation["operationId"] for operation in operations.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+([A-Z][a-z]+)+", name) for name in names), names
    assert {"startEdit", "startGenerate", "getGeneration", "cancelGeneration"} <= set(names)
    # A form has no null.
    for label in ("POST /generations/edit", "POST /generations/generate"):
        schema = operations[label]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert all("type" in field for field in schema["properties"].values())
    # Generators that do not know image types know this one.
    assert "application/octet-stream" in operations["GET /images/{name}"]["responses"]["200"]["content"]


def with_examples(node: Any) -> Iterator[JSON]:
    """Every schema in the description that has examples or a default."""
    if isinstance(node, dict):
        if {"examples", "default"} & node.keys() and ({"type", "anyOf", "$ref", "enum"} & node.keys()):
            yield node
        for inner in node.values():
            yield from with_examples(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from with_examples(inner)


async def test_the_description_is_valid_and_so_are_its_examples(description: JSON, schema: OpenApiSchema) -> None:
    schema.validate()
    examples = 0
    for each in with_examples(description):
        validator = jsonschema_rs.Draft202012Validator({**each, "components": description["components"]})
        values = [*each.get("examples", []), *([each["default"]] if "default" in each else [])]
        for value in values:
            assert validator.is_valid(value), each
        examples += len(each.get("examples", []))
    assert examples >= 4
