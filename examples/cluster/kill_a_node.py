#!/usr/bin/env python3
"""Kill a node of the cluster that `run.py` has started while two devices watch, and show what they got.

    python examples/cluster/kill_a_node.py

Six edits are started. In the middle of them one node is killed as by `kill -9`. Its sockets reconnect to other nodes
and go on after the last event they saw. Its edits are continued by another node, ten seconds later. In the end the
events of both devices are compared with the log.
"""

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import socketio

USER = "ada"
ENDS = ("completed", "failed")
#: The pictures of the page.
SAMPLES = Path(__file__).resolve().parents[2] / "src" / "api" / "web" / "static" / "samples"


class Device:
    """A client of the user's feed that remembers its place."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cursor: str | None = None
        self.events: list[dict[str, Any]] = []
        self.connects = 0
        self._changed = asyncio.Condition()
        self.client = socketio.AsyncClient(reconnection_delay=0.5, reconnection_delay_max=1)
        self.client.on("authenticated", self._authenticated)
        for event in ("generation_started", "continue", "generation_completed", "generation_failed"):
            self.client.on(event, self._take)

    async def connect(self, url: str) -> None:
        """Connect, and come back whenever the connection ends: after the last event that has come."""
        await self.client.connect(url, auth=self._credentials, wait_timeout=30)

    def _credentials(self) -> dict[str, Any]:
        cursor = {} if self.cursor is None else {"cursor": self.cursor}
        return {"userId": USER, "recovery": False, **cursor}

    async def _authenticated(self, welcome: dict[str, Any]) -> None:
        self.connects += 1
        self.cursor = self.cursor or welcome["cursor"]

    async def _take(self, event: dict[str, Any]) -> None:
        self.cursor = event.pop("cursor")
        async with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait until its events are as expected."""
        async with self._changed:
            await self._changed.wait_for(happened)

    async def until_ended(self, generation_ids: list[str]) -> None:
        """Wait until it knows how these have ended."""
        await self.until(lambda: all(map(self.ended, generation_ids)))

    def of(self, generation_id: str) -> list[dict[str, Any]]:
        """What it was sent of one generation."""
        return [event for event in self.events if event["generationId"] == generation_id]

    def ended(self, generation_id: str) -> bool:
        """Whether it knows how this generation has ended."""
        return any(event["status"] in ENDS for event in self.of(generation_id))


async def main(folder: Path, count: int) -> bool:
    """Whether both devices got everything once, in order."""
    about = json.loads((folder / "cluster.json").read_text())
    url, pids = about["url"], about["pids"]
    devices = [Device("phone"), Device("laptop")]
    async with httpx2.AsyncClient(base_url=url, headers={"X-User-Id": USER}, timeout=60) as http:
        for device in devices:
            await device.connect(url)
        photo = (SAMPLES / "portrait.webp").read_bytes()
        ids = []
        for number in range(count):
            image = {"images": ("portrait.webp", photo)}
            answer = await http.post("/generations/edit", data={"prompt": f"hat {number}"}, files=image)
            answer.raise_for_status()
            ids.append(answer.json()["generationId"])
        await devices[0].until(lambda: any(event["progress"] >= 60 for event in devices[0].events))
        number, pid = next(iter(pids.items()))
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        print(f"Node {number} is killed.", flush=True)
        async with asyncio.timeout(120):
            for device in devices:
                await device.until_ended(ids)
        print(f"All {count} edits had ended {time.monotonic() - killed:.0f} seconds later.")
        right = True
        for device in devices:
            same = True
            for each in ids:
                history = (await http.get(f"/generations/{each}/events")).json()["events"]
                same &= device.of(each) == [item["data"] for item in history]
            right &= same
            outcome = "each event once, in order" if same else "NOT what the log has"
            print(f"{device.name}: {len(device.events)} events, connected {device.connects} times: {outcome}")
            await device.client.disconnect()
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("var/cluster"), help="of run.py")
    parser.add_argument("--count", type=int, default=6, help="edits to start")
    given = parser.parse_args()
    raise SystemExit(0 if asyncio.run(main(given.folder, given.count)) else 1)
