"""Bare FastAPI routes that parse and answer what three routes of Stagecast do, and do nothing.

python -m benchmarks.servers.fastapi_peer
"""

import os
import socket
import sys
import threading
from typing import Annotated, Any, Final

import uvicorn
from fastapi import FastAPI, File, Form, UploadFile
from pydantic import BaseModel

from benchmarks.servers import control


class Event(BaseModel):
    """An event as Stagecast answers it."""

    generationId: str  # noqa: N815
    kind: str
    sequence: int
    status: str
    message: str
    progress: int
    occurredAt: str  # noqa: N815


class Item(BaseModel):
    """An event with its name."""

    event: str
    data: Event


class History(BaseModel):
    """The events of one generation."""

    generationId: str  # noqa: N815
    status: str
    events: list[Item]


class Transition(BaseModel):
    """What a pipeline reports."""

    status: str
    sequence: int | None = None
    message: str | None = None


EVENT: Final[dict[str, Any]] = {
    "generationId": "edit_1763829000123_k3v9x2ab4c6d8e0f",
    "kind": "edit",
    "sequence": 4,
    "status": "openai_editing",
    "message": "OpenAI image editing started...",
    "progress": 60,
    "occurredAt": "2026-11-22T17:30:00.123Z",
}
HISTORY: Final = {
    "generationId": EVENT["generationId"],
    "status": "openai_editing",
    "events": [{"event": "continue", "data": EVENT}] * 8,
}

app: Final = FastAPI()


@app.get("/events", response_model=History)
async def events() -> Any:
    """A history of eight events."""
    return HISTORY


@app.post("/transitions", response_model=Event)
async def transitions(transition: Transition) -> Any:
    """Read a transition."""
    return EVENT


@app.post("/start", status_code=202, response_model=Event)
async def start(prompt: Annotated[str, Form()], images: Annotated[list[UploadFile] | None, File()] = None) -> Any:
    """Parse a form."""
    for image in images or []:
        await image.read()
    return EVENT


def end() -> None:
    """End the process with its stdin."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=end, daemon=True).start()
        control.say(port=listener.getsockname()[1])
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listener])
