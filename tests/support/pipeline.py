"""A pipeline of the user's own, which reports the stages of a generation."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx2

from support.harness import JSON, Running
from support.http_app import assert_problem

FACE: Final = "https://example.com/face.jpg"

SHEET: Final = "https://cdn.example.com/sheet.png"

PREVIEW: Final = "https://cdn.example.com/preview.png?step=1"

EDITED: Final = "http://cdn.example.com:8080/edited.png"

SWAPPED: Final = "https://cdn.example.com/swapped.png#face"

MADE: Final = "https://cdn.example.com/made.png"

SWAP_ERROR: Final = {"code": "provider_rejected", "message": "There is no face in the picture."}


Row = tuple[str, JSON, int, str]


#: What is reported, and what becomes of it: status, fields, percentage, message. From the contract, word for word.
EDIT: Final[Sequence[Row]] = (
    ("composition", {}, 20, "Composing images..."),
    (
        "composition_completed",
        {"compositionUrl": SHEET},
        40,
        "Image composition completed, starting OpenAI editing...",
    ),
    ("openai_editing", {}, 60, "OpenAI image editing started..."),
    (
        "openai_editing_completed",
        {"editedImageUrl": EDITED},
        80,
        "OpenAI image editing completed successfully!",
    ),
)

DONE: Final[Row] = ("completed", {}, 100, "Image editing completed successfully!")

SWAP: Final[Row] = ("face_swap", {}, 85, "Applying face swap...")


user_numbers = itertools.count()


@dataclass
class Pipeline:
    """Who does the work of one generation."""

    service: Running
    user: str
    generation_id: str

    async def report(self, status: str, **fields: Any) -> httpx2.Response:
        return await self.post(json.dumps({"status": status, **fields}))

    async def post(self, body: str | bytes) -> httpx2.Response:
        path = f"/generations/{self.generation_id}/transitions"
        return await self.service.http.post(path, content=body, headers={"X-User-Id": self.user})

    async def report_accepted(self, status: str, **fields: Any) -> JSON:
        """Tell it; it has to be taken."""
        answer = await self.report(status, **fields)
        assert answer.status_code == 200, answer.text
        event = answer.json()
        assert isinstance(event, dict)
        return event

    async def report_up_to(self, last: str, rows: Sequence[Row] = (*EDIT, SWAP)) -> "Pipeline":
        """All stages up to this one."""
        for status, fields, _, _ in rows[: [row[0] for row in rows].index(last) + 1]:
            await self.report_accepted(status, **fields)
        return self

    async def events(self) -> list[JSON]:
        return await self.service.events(self.generation_id, self.user)

    async def assert_rejected(self, status: str, code: str, http: int = 409, /, **fields: Any) -> JSON:
        """Tell it; it has to be refused like this, and to change nothing."""
        before = await self.events()
        problem = assert_problem(await self.report(status, **fields), http, code)
        assert await self.events() == before
        return problem

    async def assert_field_rejected(self, status: str, field: str, /, **fields: Any) -> None:
        problem = await self.assert_rejected(status, "invalid_request", 422, **fields)
        assert field in [error["field"] for error in problem["errors"]]


async def begin(service: Running, kind: str = "edit", *, user: str | None = None, **fields: Any) -> Pipeline:
    user = user or f"user {next(user_numbers)}"
    images = fields.pop("images", 0)
    generation_id = await service.start(user, f"{kind}?runner=external", images=images, **fields)
    return Pipeline(service, user, generation_id)
