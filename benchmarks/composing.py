"""Composing: its time beside sharp, and how late the events of other users are meanwhile."""

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageChops

from benchmarks import peers
from benchmarks.fanout import STAGECAST, clients
from benchmarks.measuring import SERVERS, BenchmarkError, Process, Row, Size, alternating, attempt, cores

SHARP: Final = "Node sharp"
#: Of the events of the other user.
PER_SECOND: Final = 200
WINDOWS: Final = 3
#: Where files are kept in memory; ``None``: in the folder for temporary files.
IN_MEMORY: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None
_BOUNDARY: Final = "boundary"


def photographs(folder: Path) -> list[Path]:
    """Three 12-megapixel JPEGs of about the size that a phone makes."""
    noise = Image.effect_noise((500, 375), 90).resize((4000, 3000), Image.Resampling.BICUBIC)
    grain = Image.effect_noise((4000, 3000), 18)
    paths = []
    for number in range(3):
        ramp = Image.linear_gradient("L").rotate(90 * number).resize((4000, 3000))
        channels = [ImageChops.add(noise, grain, 2), ImageChops.add(ramp, grain, 2), ImageChops.add(noise, ramp, 2)]
        paths.append(folder / f"{number}.jpg")
        Image.merge("RGB", channels).save(paths[-1], quality=90)
    return paths


def compose(name: str, pictures: list[Path]) -> float:
    """The seconds of CPU of one compose on one core. Raises `BenchmarkError`."""
    if name == STAGECAST:
        command: list[str | Path] = [sys.executable, "-m", "benchmarks.servers.compose"]
    else:
        command = ["node", SERVERS / "compose_peer.cjs", peers.node_modules()]
    with Process([*command, *pictures], [cores()[0]], env={"VIPS_CONCURRENCY": "1"}) as process:
        seconds: float = process.answer(60)["seconds"]
        return seconds


class Edits:
    """A user whose edits of these pictures are done one after the other, until `stop`.

    The pictures are uploaded once, before that: on one machine, the packets of an upload delay those of all others.
    """

    def __init__(self, port: int, pictures: list[Path]) -> None:
        self._http = HTTPConnection("127.0.0.1", port, timeout=60)
        uploads = [(f'images"; filename="{path.name}', path.read_bytes()) for path in pictures]
        self._stored: list[str] = self._edit(uploads)["input"]["images"]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.error = ""
        self._thread.start()

    def stop(self) -> None:
        """Begin no other edit, and wait for the last one. Raises `BenchmarkError` if one has failed."""
        self._stopped.set()
        self._thread.join(60)
        if self.error:
            raise BenchmarkError(f"An edit failed: {self.error}")

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._edit([("imageNames", url.encode()) for url in self._stored])
        except (OSError, HTTPException, BenchmarkError) as error:
            self.error = repr(error)

    def _edit(self, fields: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
        """Start one, wait for its end, and return it. Raises `BenchmarkError` if it was refused."""
        mark, head = f"--{_BOUNDARY}".encode(), 'Content-Disposition: form-data; name="'
        parts = [f'{head}{name}"\r\n\r\n'.encode() + value for name, value in [("prompt", b"x"), *fields]]
        form = b"".join(b"%b\r\n%b\r\n" % (mark, part) for part in parts) + mark + b"--\r\n"
        kind = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}", "X-User-Id": "editor"}
        self._http.request("POST", "/generations/edit", form, kind)
        answer = self._http.getresponse()
        started: dict[str, Any] = json.loads(answer.read())
        if answer.status != 202:
            raise BenchmarkError(f"it was answered with {started}")
        path, edit = f"/generations/{started['generationId']}", started
        while edit["status"] not in ("completed", "failed"):
            time.sleep(0.05)
            self._http.request("GET", path, headers={"X-User-Id": "editor"})
            edit = json.loads(self._http.getresponse().read())
        return edit


def lateness(size: Size, pictures: list[Path]) -> tuple[float, float]:
    """The p99 latency in ms of another user's events: alone, and while pictures are composed. Server on both cores.

    Both are medians over `WINDOWS` that take turns, as whatever else the machine does changes within seconds.
    """
    seconds = size.seconds(2)
    with ExitStack() as stack:
        # Not on a disk: while a virtual machine writes to one, its host may take a core from it.
        images = stack.enter_context(tempfile.TemporaryDirectory(dir=IN_MEMORY))
        env = {"STAGECAST_LOCAL_SECONDS": "0", "STAGECAST_IMAGES": images}
        product = [sys.executable, "-m", "benchmarks.servers.product", "1"]
        server = stack.enter_context(Process(product, cores(), env=env))
        port = server.answer(60)["port"]
        load = stack.enter_context(clients(STAGECAST, port, 1, 1))
        load.answer(60)

        def p99() -> float:
            load.ask("arm", 60)
            sent = server.ask(f"rate append {PER_SECOND} {seconds}", 10 * seconds + 30)["sent"]
            answer = load.ask(f"until {sent} 30", 40)
            if answer["count"] != sent:
                raise load.failed(f"{sent} events were emitted, {answer}")
            return float(answer["p99"]) / 1e3

        alone, meanwhile = [], []
        for _ in range(WINDOWS):
            alone.append(p99())
            edits = Edits(port, pictures)
            try:
                meanwhile.append(p99())
            finally:
                edits.stop()
        return statistics.median(alone), statistics.median(meanwhile)


def run(size: Size) -> list[Row]:
    """All rows. Raises `BenchmarkError`."""
    names = (STAGECAST,) if peers.without_node() else (STAGECAST, SHARP)
    seconds: dict[str, list[float]] = {}
    late: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        pictures = photographs(Path(folder))
        for _, turns in alternating(names, size):
            for name in turns:
                seconds.setdefault(name, []).append(attempt(compose, name, pictures))
            late.append(attempt(lateness, size, pictures))
    return [
        Row(
            figure="compose three 12-megapixel JPEGs to a JPEG",
            unit="s CPU",
            values=seconds[STAGECAST],
            peer=SHARP,
            peer_values=seconds.get(SHARP, ()),
            at_most=0.5,
        ),
        Row(
            figure="p99 of other users' events while three 12-megapixel JPEGs are composed",
            unit="ms",
            values=[meanwhile for _, meanwhile in late],
            peer="alone",
            peer_values=[alone for alone, _ in late],
            at_most=2.0,
        ),
    ]
