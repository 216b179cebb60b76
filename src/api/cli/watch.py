"""``stagecast watch``: one generation with its stages, or the bars of all of a user's, over Server-Sent Events."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import inf
from typing import Any, Final

import httpx2

from api.cli import client
from api.cli.client import Refused
from api.cli.display import Display, create_display

#: Seconds without a byte after which a stream counts as broken; the service sends a comment every 15.
_SILENCE: Final = 40.0
#: Seconds between two attempts to connect, and how long they are made without success.
_RETRY: Final = 1.0
_GIVE_UP = 60.0
#: What a proxy answers while the service restarts.
_RESTARTING: Final = (502, 503, 504)
_TERMINAL: Final = ("completed", "failed")

_JSON = Mapping[str, Any]


def run(url: str, token: str | None, *, user: str | None, path: str | None) -> None:
    """Show events until the generation with this path has ended. Without a path: all, until interrupted.

    Raises:
        Unavailable: no Stagecast service answers at this URL.
        Refused: the service refuses, or the generation failed.
    """
    stages = client.request("GET", url, "/stages", token, user=user)
    with client.connect(token, user, timeout=httpx2.Timeout(30, read=_SILENCE)) as http:
        try:
            with create_display(stages, detailed=path is not None) as display:
                end = _show_all(display, http, url.rstrip("/"), path or "")
        except (KeyError, TypeError, ValueError):
            raise client.not_stagecast(url) from None
    if end.get("status") == "failed":
        raise Refused(str(end["error"]))


def _show_all(display: Display, http: httpx2.Client, url: str, path: str) -> _JSON:
    """Show the events, and return the terminal one of the generation with this path, unless it was removed."""
    positions: dict[str, int] = {}
    unfinished: set[str] = set()
    for name, data in _events(http, url, path):
        if name == "authenticated":
            listed = {each["generationId"]: each for each in data["generations"]}
            positions = {key: each["queuePosition"] for key, each in listed.items() if "queuePosition" in each}
            if not data["recovered"]:  # All events of unfinished generations follow. The others are only listed.
                for generation_id in unfinished:
                    snapshot = listed.get(generation_id)
                    if snapshot is None:
                        display.remove(generation_id)
                    elif snapshot["status"] in _TERMINAL:
                        display.show(snapshot)
                unfinished.clear()
            for generation_id in unfinished & positions.keys():
                display.show_position(generation_id, positions[generation_id])
        elif name == "queue_position":
            positions[data["generationId"]] = data["queuePosition"]
            display.show_position(data["generationId"], data["queuePosition"])
        elif name == "generation_removed":
            display.remove(data["generationId"])
        elif "progress" in data:
            unfinished.add(data["generationId"])
            position = positions.get(data["generationId"]) if data["status"] == "started" else None
            display.show(data if position is None else {**data, "queuePosition": position})
            if data["status"] in _TERMINAL:
                unfinished.remove(data["generationId"])
                if path:
                    return data
    return {}


def _events(http: httpx2.Client, url: str, path: str) -> Iterator[tuple[str, _JSON]]:
    """The name and data of each event. A broken stream is opened again after the last one.

    Raises:
        Unavailable, Refused: as `client.request`.
    """
    position: dict[str, str] = {}
    give_up_at = inf
    while time.monotonic() < give_up_at:
        with suppress(httpx2.HTTPError), http.sse(f"{url}{path}/events", headers=position) as source:
            if source.response.status_code == 204:
                return
            if source.response.status_code not in (200, *_RESTARTING):
                source.response.read()
                client.content_of(source.response, url)
            for event in source:
                give_up_at = inf
                if event.id:
                    position = {"Last-Event-ID": event.id}
                if event.data:
                    yield event.event, json.loads(event.data)
        give_up_at = min(give_up_at, time.monotonic() + _GIVE_UP)
        time.sleep(_RETRY)
    raise client.not_stagecast(url)
