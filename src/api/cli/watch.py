"""``stagecast watch``: one generation with its stages, or the bars of all of a user's, over Server-Sent Events."""

import json
import time
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any, Final

import httpx2

from api.cli.client import Refused, content_of
from api.cli.display import Display, create_display

#: Seconds between two attempts to connect, and how long they are made without success.
_RETRY: Final = 1.0
_GIVE_UP = 60.0
#: What a proxy answers while the service restarts.
_RESTARTING: Final = (502, 503, 504)
_TERMINAL: Final = ("completed", "failed")

_JSON = Mapping[str, Any]


def run(http: httpx2.Client, path: str) -> None:
    """Show events until the generation with this path has ended. Without a path: all, until interrupted.

    Raises:
        Refused: the service refuses, or the generation failed.
        httpx2.HTTPError: the service does not answer any more.
    """
    content_of(http.get("/version"))  # Before a stream is retried.
    with create_display(detailed=bool(path)) as display:
        end = _show_all(display, http, path)
    if end.get("status") == "failed":
        raise Refused(str(end["error"]))


def _show_all(display: Display, http: httpx2.Client, path: str) -> _JSON:
    """Show the events, and return the terminal one of the generation with this path, unless it was removed."""
    positions: dict[str, int] = {}
    unfinished: set[str] = set()
    for name, data in _events(http, path):
        if name == "authenticated":
            listed = {each["generationId"]: each for each in data["generations"]}
            before = positions
            positions = {key: each["queuePosition"] for key, each in listed.items() if "queuePosition" in each}
            if not data["recovered"]:  # All events of unfinished generations follow. The others are only listed.
                for generation_id in unfinished:
                    snapshot = listed.get(generation_id)
                    if snapshot is None:
                        display.remove(generation_id)
                    elif snapshot["status"] in _TERMINAL:
                        display.show(snapshot)
                unfinished.clear()
            for generation_id, position in positions.items() - before.items():
                if generation_id in unfinished:
                    display.show_position(generation_id, position)
        elif name == "queue_position":
            generation_id, position = data["generationId"], data["queuePosition"]
            if positions.get(generation_id) != position:
                positions[generation_id] = position
                display.show_position(generation_id, position)
        elif name == "generation_removed":
            display.remove(data["generationId"])
        elif "progress" in data:
            unfinished.add(data["generationId"])
            place = positions.get(data["generationId"]) if data["status"] == "started" else None
            display.show(data if place is None else {**data, "queuePosition": place})
            if data["status"] in _TERMINAL:
                unfinished.remove(data["generationId"])
                if path:
                    return data
    return {}


def _events(http: httpx2.Client, path: str) -> Iterator[tuple[str, _JSON]]:
    """The name and data of each event. A broken stream is opened again after the last one. Raises as `run`."""
    position: dict[str, str] = {}
    give_up_at = inf
    while True:
        try:
            with http.sse(f"{path}/events", headers=position) as source:
                if source.response.status_code == 204:
                    return
                if source.response.status_code in _RESTARTING:
                    source.response.raise_for_status()
                if source.response.status_code != 200:
                    source.response.read()
                    content_of(source.response)
                for event in source:
                    give_up_at = inf
                    if event.id:
                        position = {"Last-Event-ID": event.id}
                    if event.data:
                        yield event.event, json.loads(event.data)
        except httpx2.HTTPError:
            if time.monotonic() > give_up_at:
                raise
        give_up_at = min(give_up_at, time.monotonic() + _GIVE_UP)
        time.sleep(_RETRY)
